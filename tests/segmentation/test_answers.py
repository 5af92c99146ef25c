"""Segmenters through the Predictor, the command and pictures."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from msvit_jax import Predictor, checkpoint, create_model, export, pixels, predict, segmentation
from msvit_jax.errors import UserError
from msvit_jax.inference import segmenting
from msvit_jax.segmentation import Windows
from msvit_jax.train import loop
from msvit_jax.visualize import segments
from tests import jitted, tiny_masks

SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2}


def images(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def made():
    """A mixed-scale segmenter whose gate differs from region to region."""
    model = create_model("segmenter", encoder="msvit", gate="random", num_classes=4, **SIZES)
    return model, jitted.init(model, np.zeros((1, 16, 16, 3), np.float32))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    loop.train(tiny_masks.config("msvit", steps=1, data__window_stride=8), workdir)
    return workdir


@pytest.mark.parametrize("options", [{"layout": "slots"}, {"layout": "budget", "buckets": (10,)}])
def test_images_of_any_size_are_answered_in_their_order(made, options):
    model, variables = made
    given = images((16, 16), (24, 40), (10, 30), (16, 16))
    predictor = Predictor(model, variables, batch_size=8, **options)
    answers = list(predictor.segment(given, probabilities=True))
    assert [a.labels.shape for a in answers] == [x.shape[:2] for x in given]
    for image, answer in zip(given, answers, strict=True):
        assert len(answer.tokens) == len(answer.coarse) == predictor.windows.count(image.shape[:2])
        np.testing.assert_array_equal(answer.probabilities.argmax(axis=-1), answer.labels)
        if image.shape[:2] != (16, 16):
            continue
        # The random gate goes by the last bits of the pixels, which rounding decides.
        decided = answer.coarse[:1].reshape(1, -1).astype(np.float32)
        normalized = pixels.normalize(image[None], model.mean, model.std)
        output = jitted.apply(model, variables, normalized, coarse=decided)
        whole = segmentation.upsample_logits(output.logits, (16, 16), 4)[0]
        expected = jax.nn.softmax(whole, axis=-1)
        np.testing.assert_allclose(answer.probabilities, expected, rtol=1e-4, atol=1e-5)
        assert answer.tokens[0] == output.tokens[0]


def test_bad_calls_say_what_to_do(made):
    model, variables = made
    predictor = Predictor(model, variables, batch_size=8)
    with pytest.raises(UserError, match=r"pixel by pixel; call predictor\.segment"):
        predictor(np.zeros((1, 16, 16, 3), np.uint8))
    for given, message in (
        ([], "list is empty"),
        ([np.zeros((8, 8, 4), np.uint8)], r"uint8 \[H, W, 3\], not uint8 \(8, 8, 4\)"),
        ([np.zeros((8, 8, 3), np.float32)], "not float32"),
        ([np.zeros((0, 8, 3), np.uint8)], r"no pixels: its shape is \(0, 8, 3\)"),
        (np.zeros((8, 8, 3), np.uint8), r"images\[None\] for a single one"),
        (["nowhere.png"], "'nowhere.png' cannot be read"),
        (["nowhere.png", np.zeros((8, 8, 3), np.uint8)], "both paths and arrays"),
    ):
        with pytest.raises(UserError, match=message):
            list(predictor.segment(given))
    with pytest.raises(UserError, match="Windows of 32 px; the model takes 16 px"):
        predictor.segment(images((16, 16)), windows=Windows(32))
    dense = create_model("vit", num_classes=3, **SIZES)
    classifier = Predictor(dense, jitted.init(dense, np.zeros((1, 16, 16, 3), np.float32)))
    with pytest.raises(UserError, match="classifies whole images"):
        classifier.segment(images((16, 16)))


def test_colors_are_those_of_pascal_voc():
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    np.testing.assert_array_equal(segmentation.palette(5), expected)
    assert len(np.unique(segmentation.palette(150), axis=0)) == 150


def test_label_maps_are_read_back_as_numbers(tmp_path):
    labels = np.random.default_rng(0).integers(0, 200, (9, 7)).astype(np.uint8)
    segmenting.write_labels(labels, tmp_path / "x.png", 200)
    with Image.open(tmp_path / "x.png") as image:
        np.testing.assert_array_equal(np.asarray(image), labels)
        assert image.getpalette()[3:6] == [128, 0, 0]


def test_the_command_writes_a_label_map_for_each_image(run, tmp_path, capsys):
    files = []
    for name, image in zip("abc", images((20, 30), (16, 16), (40, 18)), strict=True):
        files.append(str(tmp_path / f"{name}.png"))
        Image.fromarray(image).save(files[-1])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    out = tmp_path / "out"
    predict.run([*files, str(broken)], predict.Options(workdir=str(run), out=str(out)))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["images"] == 3
    assert list(summary["skipped"]) == [str(broken)]
    assert {p.name for p in out.iterdir()} == {"a.png", "b.png", "c.png"}
    predictor = Predictor.load(run)
    assert predictor.windows.stride == 8
    expected = list(predictor.segment(files))
    for name, answer, row in zip("abc", expected, summary["predictions"], strict=True):
        with Image.open(out / f"{name}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), answer.labels)
        assert sum(row["classes"].values()) == pytest.approx(1)
        assert row["windows"] == len(answer.tokens)
    for options, message in (
        ({"out": str(out)}, "exists and is left as it is"),
        ({"out": str(tmp_path / "x.csv")}, "label maps into a folder"),
        ({"pictures": str(out)}, "msvit visualize"),
    ):
        with pytest.raises(UserError, match=message):
            predict.run(files, predict.Options(workdir=str(run), **options))


def test_weights_go_out_and_come_back(run, tmp_path):
    bundle = export.ExportBundle.load(str(run))
    export.write(bundle, "safetensors", tmp_path / "w.safetensors")
    given = images((16, 16))
    (ours,) = Predictor.load(run).segment(given, probabilities=True)
    (theirs,) = Predictor.load(tmp_path / "w.safetensors").segment(given, probabilities=True)
    np.testing.assert_allclose(theirs.probabilities, ours.probabilities, rtol=1e-5, atol=1e-6)


def test_pictures_show_answer_mask_and_tokens(run, tmp_path):
    loaded = checkpoint.load_run(run)
    drawn = segments.draw_run(loaded, tmp_path / "set", count=3)
    assert len(drawn.strips) == 3
    assert all(len(strip.pictures) == 5 for strip in drawn.strips)  # with mask, tokens and gate
    assert all("of the pixels right" in strip.caption for strip in drawn.strips)
    assert drawn.sheet.is_file()
    file = tmp_path / "x.png"
    Image.fromarray(images((20, 30))[0]).save(file)
    (strip,) = segments.draw_run(loaded, tmp_path / "files", files=[str(file)]).strips
    assert len(strip.pictures) == 4


def test_an_overlay_blends_colors_of_known_classes():
    from msvit_jax import pictures

    image = np.full((256, 256, 3), 100, np.uint8)
    labels = np.zeros((256, 256), np.uint8)
    labels[0, 0], labels[0, 1] = 1, 255
    colors = np.asarray([[0, 0, 0], [200, 0, 50]], np.uint8)
    drawn = pictures.mask_overlay(image, labels, colors, opacity=0.5)
    np.testing.assert_array_equal(drawn[0, :3], [[150, 50, 75], [50, 50, 50], [50, 50, 50]])
    with pytest.raises(ValueError, match="do not fit"):
        pictures.mask_overlay(image, labels[:-1], colors)
