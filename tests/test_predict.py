"""The command, from a trained run and files to a table, pictures and one line of JSON."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import ExifTags, Image

from msvit_jax import checkpoint, export, flops, predict
from msvit_jax.data import decode
from msvit_jax.errors import UserError
from msvit_jax.inference import Predictor
from msvit_jax.pixels import normalize
from msvit_jax.train import loop
from tests import jitted, tiny_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mixed")
    loop.train(tiny_run.msvit(steps=2, model__gate_bias=0.0, log_images=0), workdir)
    return workdir


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven files of different sizes, one of them deeper."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    (folder / "more").mkdir()
    for index in range(7):
        pixels = rng.integers(0, 256, (16 + index, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if index == 6 else ".") / f"{index}.png")
    return folder


def _expected(workdir, files, threshold):
    run = checkpoint.load_run(workdir)
    images = np.stack([decode.read_file(file, tiny_run.SIDE, 1.0) for file in files])
    images = normalize(images, run.model.mean, run.model.std)
    return jitted.apply(run.model, run.variables, images, train=False, threshold=threshold)


def _predict(*arguments):
    command = [sys.executable, "-m", "msvit_jax.predict", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(workdir, photos, tmp_path):
    done = _predict(
        f"--workdir={workdir}", photos, "--tokens=9", "--batch_size=8", f"--pictures={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    result = json.loads(last)
    files = [photos / f"{i}.png" for i in range(6)] + [photos / "more" / "6.png"]
    rows = result["predictions"]
    assert [row["file"] for row in rows] == list(map(str, files))
    expected = _expected(workdir, files, result["threshold"])
    np.testing.assert_array_equal([row["label"] for row in rows], expected.logits.argmax(1))
    assert [row["class"] for row in rows] == [tiny_run.CLASSES[row["label"]] for row in rows]
    tokens = np.asarray(expected.tokens)
    assert [row["tokens"] for row in rows] == tokens.tolist()
    assert 9 - 3 / 7 < result["tokens_mean"] == tokens.mean() <= 9
    model = checkpoint.load_run(workdir).model
    assert result["gmacs_mean"] == pytest.approx(flops.macs_per_image(model, tokens).mean() / 1e9)
    assert result["images"] == 7
    table = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("/")]
    assert [line[:2] for line in table] == [[row["file"], row["class"]] for row in rows]
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == [*(f"00{i}_{i}.png" for i in range(7)), "contact_sheet.png"]


@pytest.fixture(scope="module")
def predictor(workdir):
    """Compiled once for the tests below."""
    return Predictor.load(workdir, "latest", batch_size=4, layout="slots")


@pytest.fixture
def here(predictor, workdir, photos, tmp_path, monkeypatch, capsys):
    """The command in this process, over a copy of the photos: its result and what it printed."""
    shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Predictor, "load", lambda *arguments, **options: predictor)

    def run(*patterns, **options):
        predict.run(patterns, predict.Options(workdir=str(workdir), **options))
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    return run


@pytest.mark.field(11, 12)
def test_bad_files_are_named_and_the_others_answered(here, tmp_path):
    whole, _ = here("photos")
    good = {row["file"]: row for row in whole["predictions"]}
    jpeg = io.BytesIO()
    Image.open("photos/0.png").save(jpeg, "JPEG")
    bad = {
        b"a.png": b"no image",
        b"z\xe9\n.jpg": b"",
        b"3.png": b"\x89PNG\r\n\x1a\n",
        b"cut.jpg": jpeg.getvalue()[:-60],
    }
    for name, content in bad.items():
        with open(os.path.join(b"photos", name), "wb") as file:
            file.write(content)
    shutil.copy("photos/2.png", "photos/._2.png")
    (tmp_path / "photos" / "notes.txt").write_text("")
    result, printed = here("photos", out="answers.csv")
    skipped = {os.path.join("photos", os.fsdecode(name)) for name in bad}
    assert set(result["skipped"]) == skipped
    assert "truncated" in result["skipped"]["photos/cut.jpg"]
    assert result["passed_over"] == {"hidden": 1, ".txt files": 1}
    assert "passed over: 1 .txt files: photos/notes.txt" in printed
    assert "skipped photos/z\\xe9\\n.jpg: it is empty (0 bytes)" in printed
    assert result["images"] == 6
    del good["photos/3.png"]
    for row in result["predictions"]:
        same = good.pop(row["file"])
        assert row["probability"] == pytest.approx(same["probability"], abs=1e-6)
        assert {**row, "probability": 0} == {**same, "probability": 0}
    assert not good
    with open("answers.csv", encoding="utf-8", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert len(rows) == 10
    for row in result["predictions"]:
        assert float(rows[row["file"]]["probability"]) == row["probability"]
        assert rows[row["file"]]["error"] == ""
    assert rows["photos/z\\xe9\\n.jpg"]["error"] == "it is empty (0 bytes)"


def test_bad_files_stop_it_before_the_work(here, predictor, monkeypatch):
    for name in ("photos/a.png", "photos/b.png"):
        with open(name, "wb") as file:
            file.write(b"no image")
    monkeypatch.setattr(
        predictor._executables, "upload", lambda _: pytest.fail("the work was begun")
    )
    with pytest.raises(UserError, match=r"2 of 9 files .*\n  photos/a\.png: .*\n  photos/b\.png:"):
        here("photos", on_error="stop")


def test_answers_are_in_the_file_while_others_are_computed(here, predictor, monkeypatch):
    """Whatever ends it: what was computed is there."""
    whole, _ = here("photos")
    upload, calls = predictor._executables.upload, []

    def breaks(images):
        calls.append(len(images))
        if sum(calls) > 55:  # of 67
            raise MemoryError
        return upload(images)

    monkeypatch.setattr(predictor._executables, "upload", breaks)
    for index in range(60):
        shutil.copy("photos/0.png", f"photos/more{index}.png")
    with pytest.raises(MemoryError):
        here("photos", out="answers.jsonl")
    expected = {row["file"]: row["label"] for row in whole["predictions"]}
    with open("answers.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert 8 <= len(rows) < 67
    for row in rows:
        copied = os.path.basename(row["file"]).startswith("more")
        assert row["label"] == expected["photos/0.png" if copied else row["file"]]


@pytest.mark.fault(12)
@pytest.mark.field(22)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pictures": "photos/0.png"}, "--pictures='photos/0.png' is a file"),
        ({"pictures": "photos"}, "--pictures=photos holds other files"),
        ({"pictures": "/dev/null/x"}, "--pictures='/dev/null' is a file"),
        ({"out": "photos/0.png/a.csv"}, "--out='photos/0.png' is a file"),
        ({"out": "answers.txt"}, r"\.csv or \.jsonl"),
    ],
)
def test_places_to_write_are_tried_first(options, message, here, predictor, monkeypatch):
    monkeypatch.setattr(
        predictor._executables, "upload", lambda _: pytest.fail("the work was begun")
    )
    with pytest.raises(UserError, match=message):
        here("photos", **options)


def test_photos_are_turned_unless_told_otherwise(workdir, tmp_path):
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    upright.save(tmp_path / "upright.png")
    upright.rotate(180).save(tmp_path / "turned.png", exif=exif)
    upright.rotate(180).save(tmp_path / "stored.png")
    files = [tmp_path / f"{name}.png" for name in ("upright", "turned", "stored")]
    for turned, same in ((True, 0), (False, 2)):
        predictor = Predictor.load(
            workdir, "latest", batch_size=4, layout="slots", exif_orientation=turned
        )
        logits = predictor(files).logits
        np.testing.assert_allclose(logits[1], logits[same], atol=1e-5)
        assert np.abs(logits[1] - logits[2 - same]).max() > 1e-3


def test_files_that_all_fail_end_in_a_message(here):
    with open("bad.jpg", "wb") as file:
        file.write(b"no image")
    with pytest.raises(UserError, match="None of the 1 files can be read"):
        here("bad.jpg")


def test_calibration_leaves_bad_files_out(here):
    whole, _ = here("photos", tokens=9.0)
    with open("photos/a.png", "wb") as file:
        file.write(b"no image")
    result, _ = here("photos", tokens=9.0)
    assert result["threshold"] == whole["threshold"]
    assert result["tokens_mean"] == whole["tokens_mean"]


@pytest.mark.field(18, 19)
def test_linked_folders_and_rarer_suffixes_are_answered(here, tmp_path):
    for name, form in (("a.avif", "AVIF"), ("b.jfif", "JPEG"), ("c.jp2", "JPEG2000")):
        (tmp_path / "disk").mkdir(exist_ok=True)
        Image.open("photos/0.png").save(tmp_path / "disk" / name, form)
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "disk")
    result, _ = here("photos")
    files = [row["file"] for row in result["predictions"]]
    assert files[-4:-1] == [f"photos/linked/{name}" for name in ("a.avif", "b.jfif", "c.jp2")]
    assert result["images"] == 10


@pytest.mark.field(15)
def test_a_name_that_is_no_text_is_answered(here):
    """What captures the output encodes strictly, as terminals do."""
    name = os.fsdecode(b"photos/caf\xe9.png")
    shutil.copy("photos/0.png", name)
    result, printed = here("photos")
    labels = {row["file"]: row["label"] for row in result["predictions"]}
    assert result["images"] == len(labels) == 8
    assert labels[name] == labels["photos/0.png"]
    assert "photos/caf\\xe9.png" in printed


@pytest.mark.slow
def test_pictures_of_a_run_that_merges_tokens(photos, tmp_path):
    config = tiny_run.config("mergence_tiny_patch16_224", steps=2, log_images=0)
    config.model.update(scales=(2, 4), keep=0.6)
    loop.train(config, tmp_path / "run")
    done = _predict(f"--workdir={tmp_path / 'run'}", photos, f"--pictures={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 8
    result = json.loads(done.stdout.splitlines()[-1])
    model = checkpoint.load_run(tmp_path / "run").model
    assert result["gmacs_mean"] == pytest.approx(model.macs(16) / 1e9)
    assert result["tokens_mean"] == 16


@pytest.mark.slow
def test_pictures_of_a_dense_run_are_refused(photos, tmp_path):
    loop.train(tiny_run.config(steps=1), tmp_path / "run")
    done = _predict(f"--workdir={tmp_path / 'run'}", photos, f"--pictures={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "this model does neither" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_ends_with_a_message_and_no_traceback(workdir):
    done = _predict(f"--workdir={workdir}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: Name the image files")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_weights_file_answers_as_its_run(workdir, photos, tmp_path):
    file = tmp_path / "run.safetensors"
    export.write(export.ExportBundle.load(workdir), "safetensors", file)
    done = _predict(f"--weights={file}", photos)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    expected = Predictor.load(workdir)(sorted(photos.glob("*.png")))
    assert result["weights"] == str(file)
    assert [row["class"] for row in result["predictions"]][:6] == expected.names
    assert [row["tokens"] for row in result["predictions"]][:6] == expected.tokens.tolist()


def test_a_run_brings_its_class_names_and_crop(workdir, photos):
    predictor = Predictor.load(workdir, "latest", batch_size=8, layout="slots")
    assert predictor.class_names == tiny_run.CLASSES
    predictions = predictor([photos / "3.png", str(photos / "5.png")])
    expected = _expected(workdir, [photos / "3.png", photos / "5.png"], predictor.threshold)
    np.testing.assert_allclose(predictions.logits, expected.logits, atol=1e-4)
    assert predictions.names == [tiny_run.CLASSES[label] for label in predictions.labels]
    assert Predictor.load(workdir, layout="slots", class_names=None, crop=0.5).crop == 0.5
