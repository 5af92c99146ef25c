"""The command, from a trained run and files to a table, pictures and one line of JSON."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from msvit_jax import checkpoint, export, flops
from msvit_jax.data import decode
from msvit_jax.inference import Predictor
from msvit_jax.train import loop
from msvit_jax.train.step import normalise
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
    images = normalise(images, run.model.mean, run.model.std)
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
    export.write(export.Source.load(workdir), "safetensors", file)
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
