"""From runs and images to files: what is drawn is what the model said of these images."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from msvit_jax import checkpoint, visualize
from msvit_jax import config as configs
from msvit_jax.errors import UserError
from msvit_jax.inference import Predictions
from msvit_jax.pixels import normalize
from msvit_jax.visualize import examples
from tests import jitted, tiny_run


def _run(config):
    model = configs.build_model(configs.resolve(config, len(tiny_run.CLASSES)))
    images = np.zeros((1, tiny_run.SIDE, tiny_run.SIDE, 3), np.float32)
    return checkpoint.Run(config, model, jitted.init(model, images))


@pytest.fixture(scope="module")
def gated():
    return _run(tiny_run.msvit(model__gate_bias=0.0))


def _pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def _outputs(run, images):
    shown = normalize(images, run.model.mean, run.model.std)
    return jitted.apply(run.model, run.variables, shown, train=False)


def test_examples_are_spread_over_the_split_and_carry_their_labels(gated):
    chosen = examples.from_dataset(gated.config.data, 5)
    assert [example.name for example in chosen] == [f"validation {i}" for i in (0, 5, 10, 15, 20)]
    for example in chosen:
        brightest = int(example.image.astype(int).mean(axis=(0, 1)).argmax())
        assert example.label == 2 - brightest  # the classes are blue, green, red
    everything = examples.from_dataset(gated.config.data, 1000)
    assert len(everything) == tiny_run.VALIDATION
    with pytest.raises(UserError, match="at least 1, not 0"):
        examples.from_dataset(gated.config.data, 0)


def test_captions_say_what_the_model_said(gated):
    chosen = examples.from_dataset(gated.config.data, 5)
    output = _outputs(gated, np.stack([example.image for example in chosen]))
    shares = jax.nn.softmax(output.logits)
    strips = examples.strips(
        chosen, examples.predict(gated.model, gated.variables, chosen, tiny_run.CLASSES)
    )
    for row, (example, strip) in enumerate(zip(chosen, strips, strict=True)):
        predicted = int(shares[row].argmax())
        assert strip.caption == (
            f"label {tiny_run.CLASSES[example.label]}"
            f" · predicted {tiny_run.CLASSES[predicted]} ({shares[row, predicted]:.0%})"
            f" · {output.tokens[row]} of 16 tokens"
        )
        assert strip.wrong == (predicted != example.label)
    assert len({int(tokens) for tokens in output.tokens}) > 1  # or the captions could be one


def test_every_example_gets_a_file_and_all_share_a_sheet(gated, tmp_path):
    drawn = examples.draw_run(gated, tmp_path, count=5)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [*(f"00{n}_validation_{5 * n}.png" for n in range(5)), drawn.sheet.name]
    single, sheet = (_pixels(tmp_path / name) for name in (files[0], files[-1]))
    assert sheet.shape[1] == 2 * single.shape[1]
    assert sheet.shape[0] > 2 * single.shape[0]


def test_files_of_any_shape_are_cut_as_in_evaluation(gated, tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[..., 0] = 255
    pixels[:, 17:43] = (0, 0, 255)  # the central square and what bicubic filters reach
    for folder in ("a", "b"):  # equal names must not overwrite each other
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "wide.png")
    files = [str(tmp_path / folder / "wide.png") for folder in ("a", "b")]
    (example, _) = examples.from_files(files, gated.config.data)
    assert example.image.shape == (tiny_run.SIDE, tiny_run.SIDE, 3)
    assert (example.image == (0, 0, 255)).all()
    drawn = examples.draw_run(gated, tmp_path / "out", files=files)
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert drawn.strips[0].caption.startswith("wide.png · predicted ")
    assert not drawn.strips[0].wrong


def test_classes_are_numbers_where_the_data_set_is_not_here(gated, tmp_path):
    config = gated.config.copy_and_resolve_references()
    config.data.data_dir = str(tmp_path / "elsewhere")
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    drawn = examples.draw_run(
        gated._replace(config=config), tmp_path / "out", files=[str(tmp_path / "x.png")]
    )
    assert any(f"predicted {label} (" in drawn.strips[0].caption for label in range(3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "The image '.*bad.png' cannot be read: No such file"),
        (b"no image at all", "The image '.*bad.png' cannot be read: it is no image"),
        ("truncated", "The image '.*bad.png' cannot be read: .*truncated"),
    ],
)
def test_files_that_cannot_be_drawn_are_named(gated, tmp_path, content, message):
    path = tmp_path / "bad.png"
    if content == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        examples.from_files([str(path)], gated.config.data)


REDUCING = {
    "mergence": ("mergence_tiny_patch16_224", {"scales": (2, 4)}),
    "topk": ("vit_tiny_patch16_224", {"reducer": "topk"}),
    "mixed-scale": ("msvit_tiny_patch16_224", {"reducer": "mergence", "gate_bias": 0.0}),
}


def _reducing(kind):
    name, options = REDUCING[kind]
    config = tiny_run.config(name)
    config.model.update({**options, "keep": 0.6})
    return _run(config)


@pytest.mark.parametrize("kind", REDUCING)
def test_merge_maps_are_drawn_layer_by_layer(kind, tmp_path):
    run = _reducing(kind)
    assert examples.reducing_layers(run.model) == (1, 2)  # of two
    chosen = examples.from_dataset(run.config.data, 3)
    images = np.stack([example.image for example in chosen])
    output = _outputs(run, images)
    maps = np.asarray(output.merge_maps((4, 4)))
    predictions = examples.predict(run.model, run.variables, chosen, tiny_run.CLASSES)
    strips = examples.strips(chosen, predictions)
    gated = kind == "mixed-scale"
    counts = [[len(set(m.reshape(-1).tolist()) - {-1}) for m in stages] for stages in maps]
    for row, strip in enumerate(strips):
        assert len(strip.pictures) == 3 + 2 * gated
        coarse = output.gate.coarse[row].reshape(2, 2) if gated else None
        for drawn, hosts in zip(strip.pictures[-2:], maps[row], strict=True):
            expected = visualize.merge_map(images[row], hosts, coarse=coarse)
            np.testing.assert_array_equal(drawn, expected)
        first = f"{output.tokens[row]} of 16" if gated else "16"
        assert strip.caption.endswith(f"{first} tokens, {counts[row][-1]} after the last layer")
    titles = [column.title for column in examples.headings(predictions, (1, 2))]
    if gated:
        assert [column.title for column in visualize.GATE_COLUMNS[1:]] == titles[1:3]
    else:
        assert titles == ["image", "layer 1: 10 tokens", "layer 2: 6 tokens"]
    drawn = examples.draw_run(run, tmp_path, count=3)
    assert len(list(tmp_path.iterdir())) == 4
    assert len(drawn.strips) == 3


def test_headings_say_how_many_tokens_the_images_of_the_sheet_have():
    hosts = np.full((2, 1, 2, 2), -1, np.int16)
    hosts[0, 0, 0], hosts[1, 0, 0, 0] = (0, 1), 0
    logits, tokens = np.zeros((2, 3)), np.full(2, 4)
    predictions = Predictions(logits, tokens, merge_maps=hosts)
    heading = lambda *images: examples.headings(predictions, (4,), *images)[1].title  # noqa: E731
    assert heading() == "layer 4: 1 to 2 tokens"
    assert heading(slice(1, 2)) == "layer 4: 1 tokens"


def test_of_many_layers_a_few_are_drawn():
    assert examples.shown_stages(3) == [0, 1, 2]
    shown = examples.shown_stages(12)
    assert len(shown) == examples.MOST_STAGES
    assert shown[0] == 0
    assert shown[-1] == 11


def test_a_model_that_gives_all_tokens_to_all_images_has_nothing_to_draw(tmp_path):
    with pytest.raises(UserError, match=r"no gate and reduces no tokens.*nothing to draw"):
        examples.draw_run(_run(tiny_run.config()), tmp_path / "out", count=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_ends_with_the_message_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "msvit_jax.visualize", f"--workdir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "is not the workdir of a run" in done.stderr
    assert "Traceback" not in done.stderr
