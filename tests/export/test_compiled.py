"""Exported functions against the Predictor, in this process and in one without the library."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax import export as jax_export
from PIL import ExifTags, Image

from msvit_jax import sharding
from msvit_jax.data import decode
from msvit_jax.errors import UserError
from msvit_jax.exits import exit_thresholds
from msvit_jax.export import Options, compiled, write
from msvit_jax.export import run as runner
from msvit_jax.export.run import Model
from msvit_jax.inference import Predictor
from tests.export import made

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
GATED = "msvit_tiny_patch16_224"
# Model, its options, how it is exported, and names of its functions.
KINDS = {
    "plain": ("deit_tiny_distilled_patch16_224", {"scan_layers": True}, {}, ["forward"]),
    "budget": (GATED, {}, {"layout": "budget", "token_capacity": 7}, ["budget", "slots"]),
    "mergence": (
        *("mergence_tiny_patch16_224", {"scales": (2, 4), "reduce_layers": (1,), "keep": 0.6}),
        *({}, ["forward"]),
    ),
    "cascade": ("dvt_deit_small", {}, {}, ["stage_1", "stage_2"]),
}


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    """These tests compile much and compute next to nothing: half the time of optimized programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function of the kind: its directory, exported once."""
    root = tmp_path_factory.mktemp("exported")

    @functools.cache
    def export(kind):
        name, options, given, _ = KINDS[kind]
        write(made.source(name, **options), "compiled", root / kind, Options(**given))
        return root / kind

    return export


@pytest.fixture(scope="module")
def model(exported):
    """A function of the kind: what its run.py makes of the directory; compiles a batch once."""
    return functools.cache(lambda kind: Model(exported(kind)))


@functools.cache
def _predictor(kind):
    name, changes, *_ = KINDS[kind]
    source = made.source(name, **changes)
    variables = {"params": unflatten_dict(source.params, sep="/")}
    layout = {"layout": "slots"} if name == GATED else {}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Predictor(source.model, variables, batch_size=made.COUNT, mesh=mesh, **layout)


@functools.cache
def _predictions(kind):
    return _predictor(kind)(made.images())


def _check(answers, predictions):
    np.testing.assert_allclose(answers["logits"], predictions.logits, **CLOSE)
    for name in set(answers) & {"tokens", "coarse", "exit_index", "merge_maps"}:
        np.testing.assert_array_equal(answers[name], getattr(predictions, name))
    if "coarse_probability" in answers:
        probability = predictions.coarse_probability
        np.testing.assert_allclose(answers["coarse_probability"], probability, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_answers_batches_of_any_size_as_the_predictor(kind, exported, model):
    expected = _predictions(kind)
    assert np.abs(expected.logits[1:] - expected.logits[0]).max(axis=1).min() > 1e-3
    about = model(kind).about
    assert [entry["name"] for entry in about["functions"]] == KINDS[kind][3]
    for entry in about["functions"]:
        held = jax_export.deserialize(bytearray((exported(kind) / entry["file"]).read_bytes()))
        assert held.platforms == ("cpu", "cuda", "tpu")
    _check(model(kind).classify(made.images()), expected)
    alone = model(kind).classify(made.images()[3:4])
    np.testing.assert_allclose(alone["logits"][0], expected.logits[3], **CLOSE)


@pytest.mark.fault(6)
@pytest.mark.parametrize("name", ["about.json", "model.safetensors", "forward.jaxexport"])
def test_files_that_changed_after_the_export_are_refused(exported, tmp_path, name):
    shutil.copytree(exported("plain"), tmp_path / "copy")
    file = tmp_path / "copy" / name
    whole = file.read_bytes()
    if name == "about.json":
        file.write_bytes(whole.replace(b'"crop": 1.0', b'"crop": 0.5'))
    else:
        file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    assert file.read_bytes() != whole
    with pytest.raises(ValueError, match=f"{name} changed after the export"):
        Model(tmp_path / "copy")


def test_exports_from_before_there_were_digests_are_read(exported, tmp_path):
    shutil.copytree(exported("plain"), tmp_path / "copy")
    file = tmp_path / "copy" / "about.json"
    about = json.loads(file.read_text())
    del about["sha256"]
    file.write_text(json.dumps(about))
    assert Model(tmp_path / "copy").about == about


def test_what_does_not_fit_the_budget_is_told(model):
    expected = _predictions("budget")
    budget, slots = model("budget")._functions
    done = budget(made.images(), np.float32(0.5))
    np.testing.assert_array_equal(done["within_capacity"], expected.tokens <= 7)
    assert 0 < done["within_capacity"].sum() < made.COUNT
    np.testing.assert_array_equal(np.isnan(done["logits"]).all(axis=1), ~done["within_capacity"])
    done = slots(made.images(), np.float32(0.5))
    assert done["within_capacity"].all()
    _check(jax.device_get(done), expected)


def test_the_threshold_is_an_input(model):
    predictor = _predictor("budget")
    for threshold in (-1.0, 0.3, 2.0):
        predictor.threshold = threshold
        expected = predictor(made.images())
        _check(model("budget").classify(made.images(), threshold=threshold), expected)
    predictor.threshold = 0.5


def test_images_leave_a_cascade_as_they_leave_the_predictor_s(model):
    predictor = _predictor("cascade")
    certain = predictor.certainty(made.images())
    # Halfway between two, so that rounding decides nothing.
    thresholds = (float(np.sort(certain[:, 0])[1:3].mean()),)
    pixels = np.concatenate([made.images(), made.images()[::-1]])
    predictor.thresholds = thresholds
    expected = predictor(pixels)
    predictor.thresholds = (exit_thresholds.NEVER,)
    assert set(expected.exit_index) == {0, 1}
    for batch in (1, made.COUNT):
        _check(model("cascade").classify(pixels, batch=batch, thresholds=thresholds), expected)


@pytest.mark.parametrize("batch", [1, 3, 7, 50])
def test_what_is_handed_on_goes_with_its_image(batch, exported):
    """A cascade of functions whose answers give away which image they were computed from."""
    calls = []

    def stage(index, images, handed=None):
        number = images[:, 0, 0, 0].astype(np.float32)
        calls.append((index, len(images)))
        if index:
            np.testing.assert_array_equal(handed["tokens"], number * index)
        sure = np.where(number % 3 <= index, 9.0, 0.0)  # a third leaves at each exit
        logits = np.stack([sure, 0 * sure, number / 1e6], axis=1)
        return {"logits": logits, "handed": {"tokens": number * (index + 1)}}

    model = Model(exported("cascade"))
    model._functions = [functools.partial(stage, index) for index in range(3)]
    images = np.zeros((20, made.SIDE, made.SIDE, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(20)
    answers = model.classify(images, batch=batch, thresholds=(0.9, 0.9))
    np.testing.assert_array_equal(answers["exit_index"], np.arange(20) % 3)
    np.testing.assert_allclose(answers["logits"][:, 2], np.arange(20) / 1e6)
    assert {count for _, count in calls} == {min(batch, 20)}
    counts = [sum(index == exit_ for index, _ in calls) for exit_ in range(3)]
    assert counts == [-(-left // min(batch, 20)) for left in (20, 13, 6)]


def test_stages_that_hand_nothing_on(tmp_path):
    options = {"feature_reuse": False, "relation_reuse": False}
    source = made.source("dvt_deit_small", **options)
    write(source, "compiled", tmp_path / "out", Options(thresholds=(0.4,)))
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["thresholds"] == [0.4, 0.0]
    assert about["functions"][1]["inputs"]["handed"] == {}


def test_a_gate_of_fixed_share_has_no_threshold_to_give(tmp_path):
    write(made.source(GATED, fine_share=0.5), "compiled", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert [entry["name"] for entry in about["functions"]] == ["slots"]
    assert list(about["functions"][0]["inputs"]) == ["params", "images"]
    assert about["threshold"] is None


def test_float_pixels_are_on_the_same_scale(tmp_path, model):
    name, options, _, _ = KINDS["plain"]
    write(made.source(name, **options), "compiled", tmp_path / "out", Options(pixels="float32"))
    floats = Model(tmp_path / "out")
    for pixels in (made.images(), made.images().astype(np.float32)):
        answers = floats.classify(pixels)
        np.testing.assert_allclose(answers["logits"], _predictions("plain").logits, **CLOSE)
    with pytest.raises(ValueError, match="uint8 of 0 to 255, not float32"):
        model("plain").classify(made.images().astype(np.float32))
    with pytest.raises(ValueError, match=r"\[N, 16, 16, 3\], not \(5, 8, 8, 3\)"):
        model("plain").classify(made.images(side=8))


def test_about(exported):
    about = json.loads((exported("budget") / "about.json").read_text())
    source = made.source(GATED)
    assert about["model"]["name"] == GATED
    assert about["mean"] == [0.5, 0.5, 0.5]
    assert about["class_names"] == list(made.NAMES)
    assert (about["layout"], about["token_capacity"], about["threshold"]) == ("budget", 7, 0.5)
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["jax"] == jax.__version__
    held = jax_export.deserialize(bytearray((exported("budget") / "budget.jaxexport").read_bytes()))
    assert about["calling_convention"] == held.calling_convention_version
    function = about["functions"][0]
    assert function["inputs"] == {
        "params": f"{len(source.params)} arrays by name",
        "images": "uint8[b, 16, 16, 3]",
        "threshold": "float32[]",
    }
    assert function["outputs"]["logits"] == "float32[b, 3]"
    assert function["outputs"]["coarse"] == "bool[b, 2, 2]"
    stages = json.loads((exported("cascade") / "about.json").read_text())["functions"]
    assert stages[1]["inputs"]["handed"] == stages[0]["outputs"]["handed"]
    assert stages[1]["inputs"]["handed"]["scores"] == "float32[b, 2, 5, 5]"


def test_about_says_until_when_it_is_read_and_how_it_is_made_again(exported, tmp_path):
    about = json.loads((exported("budget") / "about.json").read_text())
    assert about["made_by"] == (
        "python -m msvit_jax.export --workdir=RUN --format=compiled --out=OUT --layout=budget "
        "--token_capacity=7"
    )
    assert about["readable"] == compiled.readable(jax.__version_info__)
    for version, until in [
        ((0, 10, 0), "2026-10-16"),
        ((0, 11, 1), "2026-12-17"),  # not known: as old as 0.10.2
        ((0, 12, 0, 1), "2027-04-16"),
        ((1, 0, 0), "2027-04-16"),
    ]:
        assert compiled.readable(version)["until"] == until
    step = made.source("dvt_deit_small")
    step = dataclasses.replace(step, step=7, workdir=pathlib.Path("my runs/a"))
    assert compiled.command(step, "onnx", Options(thresholds=(0.5, 0.25))) == (
        "python -m msvit_jax.export '--workdir=my runs/a' --which=7 --format=onnx --out=OUT "
        "--thresholds=0.5,0.25"
    )


def test_the_pinned_versions_of_jax_are_known():
    pins = pathlib.Path(__file__).parents[2].joinpath("requirements.txt").read_text()
    pinned = {tuple(map(int, v.split("."))) for v in re.findall(r"^jax==([\d.]+)", pins, re.M)}
    assert pinned
    assert pinned <= set(compiled._JAX_BUILT)


# As if nothing but JAX and its own requirements were installed; flatbuffers from the export alone.
ALONE = """
import importlib.machinery, runpy, sys

class OnlyJax:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("msvit_jax", "flax", "orbax", "safetensors", "tests"):
            raise ModuleNotFoundError(name)
        if name == "flatbuffers":
            packed = [place for place in sys.path if place.endswith("flatbuffers.zip")]
            return importlib.machinery.PathFinder.find_spec(name, packed)

sys.meta_path.insert(0, OnlyJax())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _run_alone(directory, *arguments):
    command = [sys.executable, "-I", "-c", ALONE, directory / "run.py", *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=directory
    )


def test_run_py_needs_jax_alone(exported, tmp_path):
    np.save(tmp_path / "images.npy", made.images())
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.tile(made.images()[3], (2, 3, 1))).save(folder / "wide.png")
    (folder / "bad.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("")
    files = (tmp_path / "images.npy", folder / "wide.png")
    done = _run_alone(exported("plain"), files[0], folder, f"--out={tmp_path / 'out.npz'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"passed over: 1 .txt files: {folder}/notes.txt",
        f"skipped {folder}/bad.jpg: it is no image, or of a format that is not read here",
    ]
    wide = decode.read_file(files[1], made.SIDE, 1.0)
    expected = _predictor("plain")(np.concatenate([made.images(), wide[None]]))
    with np.load(tmp_path / "out.npz") as answers:
        _check(dict(answers), expected)
    names = [*(f"{files[0]}[{row}]" for row in range(made.COUNT)), files[1]]
    labels, shares = expected.labels, expected.probabilities.max(axis=1)
    assert done.stdout.splitlines() == [
        f"{name}  {made.NAMES[label]}  {share:.4f}"
        for name, label, share in zip(names, labels, shares, strict=True)
    ]


ABOUT = {"task": "classification", "image_size": made.SIDE, "crop": 1.0, "pixels": "uint8"}


def test_run_py_names_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "small.npy", made.images()[:, 1:])
    np.save(tmp_path / "floats.npy", made.images().astype(np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "small.npy").read_bytes()[:70])
    (tmp_path / "empty.png").write_bytes(b"")
    reasons = {
        "small.npy": r"images are [N, 16, 16, 3], not (5, 15, 16, 3)",
        "floats.npy": "images are uint8 of 0 to 255, not float32",
        "objects.npy": "Object arrays cannot be loaded when allow_pickle=False",
        "cut.npy": "",
        "gone.npy": "[Errno 2] No such file or directory",
        "empty.png": "it is empty (0 bytes)",
    }
    names = [str(tmp_path / name) for name in reasons]
    named, images, bad = runner.read_files(names, ABOUT)
    assert (named, images) == ([], [])
    for line, (name, reason) in zip(bad, reasons.items(), strict=True):
        assert line.startswith(f"{tmp_path}/{name}: {reason}")
    monkeypatch.setattr(runner, "Model", lambda: types.SimpleNamespace(about=ABOUT))
    for option, message in (("skip", "none of the files"), ("stop", "6 files cannot be read")):
        with pytest.raises(ValueError, match=message):
            runner.main([*names, f"--on_error={option}", f"--out={tmp_path / 'out'}"])
        assert capsys.readouterr().err.count(str(tmp_path)) == 6 + 1  # gone.npy twice in its line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.field(13, 14)
def test_run_py_answers_a_folder_and_names_its_bad_file(tmp_path, monkeypatch, capsys):
    images = made.images()[:2]
    for name, image in zip("ac", images, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    cut = tmp_path / "b.jpg"
    Image.fromarray(np.tile(images[0], (4, 4, 1))).save(cut)
    cut.write_bytes(cut.read_bytes()[:-60])

    def classify(pixels, **options):
        np.testing.assert_array_equal(pixels, images)
        return {"logits": np.log([[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]])}

    about = {**ABOUT, "class_names": made.NAMES}
    model = types.SimpleNamespace(about=about, classify=classify)
    monkeypatch.setattr(runner, "Model", lambda: model)
    runner.main([str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"{tmp_path}/a.png  ant  0.7000",
        f"{tmp_path}/c.png  cat  0.6000",
    ]
    (line,) = printed.err.splitlines()
    assert line.startswith(f"skipped {cut}: image file is truncated")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere"], "'nowhere' is no file, no folder with images"),
        (["x.npy", "--batch=0"], "--batch=0: at least 1"),
        (["x.npy", "--out=/dev/null/x.npz"], "Not a directory"),
    ],
)
def test_run_py_stops_before_the_work(arguments, error, monkeypatch):
    monkeypatch.setattr(runner, "Model", lambda: types.SimpleNamespace(about=ABOUT))
    with pytest.raises((ValueError, OSError), match=error):
        runner.main(arguments)


def test_run_py_turns_photos_as_about_json_says(tmp_path):
    pixels = made.images()[0]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    for turned, expected in ((True, pixels[::-1, ::-1]), (False, pixels)):
        about = {**ABOUT, "exif_orientation": turned}
        _, (read,), _ = runner.read_files([str(tmp_path)], about)
        np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize(
    ("mode", "kind", "size"),
    [("RGB", "jpg", (90, 70)), ("L", "png", (16, 16)), ("RGB", "png", (16, 16))],
)
def test_image_files_are_read_as_the_library_reads_them(mode, kind, size, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    file = tmp_path / f"image.{kind}"
    Image.fromarray(pixels).convert(mode).save(file)
    for crop in (1.0, 0.875):
        expected = decode.read_file(file, made.SIDE, crop)
        about = {"image_size": made.SIDE, "crop": crop}
        ((name, read),) = runner.read_images(str(file), about)
        assert name == str(file)
        np.testing.assert_array_equal(read, expected)


BAD = [
    ("plain", {"layout": "slots"}, "layout is for models with a gate"),
    ("plain", {"threshold": 0.5}, "threshold is for models with a gate"),
    ("plain", {"token_capacity": 7}, "token_capacity is for models with a gate"),
    ("plain", {"thresholds": (0.5,)}, "one exit"),
    ("plain", {"pixels": "int8"}, "'int8' is not one of uint8, float32"),
    ("budget", {"layout": "rows"}, "exported functions take batches of any"),
    ("budget", {"layout": "rings"}, "'rings' is not one of slots, budget"),
    ("budget", {"layout": "budget"}, "'budget' needs token_capacity="),
    ("budget", {"token_capacity": 7}, "only this layout takes it"),
    (
        "budget",
        {"layout": "budget", "token_capacity": 17},
        "token_capacity=17 is not possible.* 4 to 16 patch",
    ),
    ("budget", {"layout": "budget", "token_capacity": 7.5}, "7.5 is not a whole number"),
    ("share", {"threshold": 0.5}, "the gate decides by rank"),
    ("plain", {"gmacs_budget": 1.0}, "gmacs_budget is for cascades"),
    ("cascade", {"thresholds": (0.5, 0.4, 0.3)}, "3 thresholds for 2 exits"),
    ("cascade", {"layout": "budget"}, "layout is for models with a gate"),
    ("cascade", {"gmacs_budget": 1.0}, "of a run that eval.py fitted"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD)
def test_what_is_not_possible_is_told(kind, options, message, tmp_path):
    name, changes, *_ = KINDS.get(kind, (GATED, {"fine_share": 0.5}))
    with pytest.raises(UserError, match=message):
        write(made.source(name, **changes), "compiled", tmp_path / "out", Options(**options))
    assert not list(tmp_path.iterdir())
