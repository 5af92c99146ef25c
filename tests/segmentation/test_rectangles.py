"""Segmenters of rectangular windows, from training to exports."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from msvit_jax import (
    Predictor,
    checkpoint,
    data,
    evaluate,
    export,
    pixels,
    predict,
    segmentation,
)
from msvit_jax import config as configs
from msvit_jax.aot import compiling
from msvit_jax.aot.topology import CHIPS, Topology
from msvit_jax.aot.variants import Variant
from msvit_jax.benchmark import options as benchmarks
from msvit_jax.benchmark import sides, training
from msvit_jax.errors import UserError
from msvit_jax.export import run as runner
from msvit_jax.segmentation import Windows
from msvit_jax.train import loop
from msvit_jax.visualize import segments
from tests import jitted, tiny_masks

SIZE = (16, 24)


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("square")
    loop.train(tiny_masks.config(steps=1, eval_every_epochs=8.0), workdir)
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory, square):
    """A mixed-scale run of rectangles that starts from a dense one of squares."""
    workdir = tmp_path_factory.mktemp("rectangles")
    size = {"data__image_size": SIZE, "init_from": str(square)}
    loop.train(tiny_masks.config("msvit", steps=3, **size), workdir)
    return workdir


def images(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def whole(model, variables, image, coarse):
    """The model's own answer for an image of its size, with the gate's decisions given."""
    normalized = pixels.normalize(image[None], model.mean, model.std)
    output = jitted.apply(model, variables, normalized, coarse=coarse.reshape(1, -1))
    return segmentation.upsample_logits(output.logits, image.shape[:2], model.patch_size)[0]


def test_crops_and_windows_have_the_shape(run):
    config = checkpoint.read_config(run)
    assert config.data.image_size == config.model.image_size == SIZE
    batch = next(data.train_iterator(config.data, batch_size=4, seed=0))
    assert (batch["image"].shape, batch["segmentation_mask"].shape) == ((4, *SIZE, 3), (4, *SIZE))
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (last,) = [record for record in records if record["kind"] == "eval"]
    assert last["examples"] == tiny_masks.VALIDATION
    # Windows of images of 16 x 24, 20 x 16 (enlarged to 30 x 24) and 12 x 30 px (to 16 x 40).
    assert last["windows"] == tiny_masks.VALIDATION // 3 * (1 + 2 + 2)
    again = evaluate.evaluate_run(run, batch_size=4)
    assert again["miou"] == pytest.approx(last["miou"], abs=1e-6)


def test_positions_of_a_square_are_resized(run, square, tmp_path):
    start = np.asarray(checkpoint.load_params(square)["pos_embed"])
    moved = np.asarray(checkpoint.load_params(run)["backbone"]["pos_embed"])
    assert (start.shape, moved.shape) == ((17, 16), (25, 16))
    # Three steps of training leave the class token's position and the middle of the others there.
    np.testing.assert_allclose(moved[0], start[0], atol=0.05)
    middle = start[1:].reshape(4, 4, 16).mean(axis=(0, 1))
    np.testing.assert_allclose(moved[1:].mean(axis=0), middle, atol=0.1)


def test_an_evaluation_at_another_shape_resizes_as_many_positions(run):
    """24 x 16 px have as many patches as 16 x 24, in another order."""
    sizes = ["model.image_size=24,16", "data.image_size=24,16"]
    found = evaluate.evaluate_run(run, overrides=sizes, batch_size=8)
    # Windows of images enlarged from 16 x 24 px to 24 x 36, from 20 x 16 to 24 x 19, and so on.
    assert found["windows"] == tiny_masks.VALIDATION // 3 * (3 + 2 + 4)


def test_a_window_that_is_the_image_is_the_model_s_own_answer(run):
    given = images(SIZE, (24, 40), (10, 30))
    predictor = Predictor.load(run, batch_size=8)
    loaded = checkpoint.load_run(run)
    answers = list(predictor.warm_up().segment(given, probabilities=True))
    assert [a.labels.shape for a in answers] == [x.shape[:2] for x in given]
    assert [len(a.tokens) for a in answers] == [1, 4, 2]
    assert answers[0].coarse.shape == (1, 2, 3)
    logits = whole(loaded.model, loaded.variables, given[0], answers[0].coarse.astype(np.float32))
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(answers[0].probabilities, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="Windows of 16 px; the model takes 16 x 24 px"):
        predictor.segment(given, windows=Windows(16))


def test_the_command_and_pictures_take_rectangles(run, tmp_path, capsys):
    file = tmp_path / "x.png"
    Image.fromarray(images((32, 48))[0]).save(file)
    predict.run([str(file)], predict.Options(workdir=str(run), out=str(tmp_path / "out")))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["windows"], summary["predictions"][0]["size"]) == (4, "32 x 48")
    loaded = checkpoint.load_run(run)
    drawn = segments.draw_run(loaded, tmp_path / "files", files=[str(file)])
    assert {picture.shape for picture in drawn.strips[0].pictures} == {(256, 384, 3)}
    drawn = segments.draw_run(loaded, tmp_path / "set", count=2)
    assert all(len(strip.pictures) == 5 for strip in drawn.strips)


@pytest.mark.parametrize("form", ["compiled", "safetensors"])
def test_exports_answer_as_the_run(run, tmp_path, form):
    out = tmp_path / ("out" if form == "compiled" else "out.safetensors")
    export.write(export.ExportBundle.load(str(run)), form, out)
    given = images(SIZE, SIZE)
    expected = [a.labels for a in Predictor.load(run).segment(given)]
    if form == "safetensors":
        loaded = Predictor.load(out)
        assert loaded.model.image_size == SIZE
        found = [a.labels for a in loaded.segment(given)]
    else:
        about = json.loads((out / "about.json").read_text())
        assert about["image_size"] == about["model"]["image_size"] == [16, 24]
        model = runner.Model(out)
        found = model.segment(np.stack(given))["labels"]
        with pytest.raises(ValueError, match=r"images are \[N, 16, 24, 3\], not \(1, 24, 16, 3\)"):
            model.segment(np.zeros((1, 24, 16, 3), np.uint8))
        file = tmp_path / "x.png"
        Image.fromarray(given[0]).save(file)
        _, read, bad = runner.read_files([str(file)], model.about)
        np.testing.assert_array_equal(read[0], given[0])
        assert not bad
    # Where two classes are as probable, rounding may decide.
    assert np.mean(np.stack(expected) == np.stack(found)) > 0.99


def test_onnx_graphs_take_rectangles(run, tmp_path):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    export.write(export.ExportBundle.load(str(run)), "onnx", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["image_size"] == [16, 24]
    session = onnxruntime.InferenceSession(tmp_path / "out" / about["functions"][0]["file"])
    given = np.stack(images(SIZE, SIZE))
    names = [x.name for x in session.get_outputs()]
    fed = {"images": given, "threshold": np.asarray(about["threshold"], np.float32)}
    found = dict(zip(names, session.run(None, fed), strict=True))
    loaded = checkpoint.load_run(run)
    logits = whole(loaded.model, loaded.variables, given[1], found["coarse"][1].astype(np.float32))
    ours = segmentation.upsample(found["logits"][1], SIZE)
    np.testing.assert_allclose(ours, logits, rtol=1e-3, atol=1e-4)


def test_speed_and_compilation_are_measured_of_rectangles():
    sizes = ("image_size=16,24", "patch_size=4", "width=16", "depth=1", "heads=2")
    made = benchmarks.Options("msvit_seg_vit_tiny_linear", overrides=sizes, batches=(1,), tokens=12)
    assert benchmarks.build(made).max_tokens == benchmarks.build(made, dense=True).max_tokens == 24
    work = sides.draw(made, 2)
    assert [len(case.calls) for case in sides.forward_sides(made, work)] == [1, 1]
    batch = training._batch(made, work, 3)
    assert (batch["image"].shape, batch["segmentation_mask"].shape) == ((2, *SIZE, 3), (2, *SIZE))
    config = configs.resolve(tiny_masks.config(data__image_size=SIZE), 3)
    chips = Topology("cpu", CHIPS["v5e"], jax.devices()[:1])
    lowered = compiling.lower(Variant("dense", "", config), compiling.PREDICT, chips)
    assert jax.tree.leaves(lowered.out_info)[0].shape == (8, 4, 6, 3)
    lowered = compiling.lower(Variant("dense", "", config), compiling.TRAIN, chips)
    assert "8x16x24x3xui8" in lowered.as_text()
