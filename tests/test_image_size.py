"""Rectangular images: sizes of configs and models, classification, and what takes squares alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import given
from hypothesis import strategies as st

from msvit_jax import Predictor, create_model, data, export, image_size, sharding, weights
from msvit_jax import config as configs
from msvit_jax.data import image_files, on_device, pipeline
from msvit_jax.errors import UserError
from msvit_jax.tokens import grid
from msvit_jax.train import loop
from msvit_jax.tree import flat_names
from tests import jitted, tiny_run

SIZES = {"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "num_classes": 3}
SEGMENTER = "digits_segmenter"
BAD = [
    "1,2,3",
    "0",
    "-4",
    "64,0",
    "1.5",
    "64,2.5",
    "big",
    "'64','64'",
    "true",
    "none",
    "()",
    "16x24",
]


def rough(model, seed=0):
    zeros = jnp.zeros((1, *model.image_shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), zeros)
    rng = np.random.default_rng(seed)
    draw = lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("key", ["data.image_size", "model.image_size", "data.window_stride"])
def test_what_is_no_size_is_refused_and_named(key, value):
    if (key, value) == ("data.window_stride", "none"):
        return  # a whole window
    with pytest.raises(UserError) as error:
        configs.load(SEGMENTER, [f"{key}={value}"])
    message = str(error.value)
    assert message.startswith(f"{key}=")
    assert "one whole number of px (1 or more) or two as (height, width)" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [(1, 2, 3), 0, -1, (8, 0), 1.5, (8, 8.0), "8", None, True])
def test_models_refuse_what_is_no_size(value):
    with pytest.raises(
        UserError, match=r"Model 'vit': image_size=.* two as \(height, width\) expected"
    ):
        create_model("vit", image_size=value, **SIZES)


@pytest.mark.parametrize(
    ("text", "size"), [("48,64", (48, 64)), ("(48, 64)", (48, 64)), ("56", 56), ("56.0", 56)]
)
def test_a_size_is_one_number_or_two_on_the_command_line(text, size):
    config = configs.load(SEGMENTER, [f"data.image_size={text}", f"data.window_stride={text}"])
    assert config.data.image_size == config.data.window_stride == size
    model = configs.build_model(configs.resolve(config, 2))
    assert model.image_size == size
    again = configs.from_json(configs.to_json(config))
    assert (again.data.image_size, again.data.window_stride) == (size, size)
    assert configs.differences(config, again) == []


def test_a_config_file_says_a_rectangle_and_sides_that_are_equal_are_a_square():
    config = configs.base()
    config.data.image_size = (48, 64)
    config.data.window_stride = (12, 32)
    config.data.image_size = (32, 32)
    configs.set_key(config, "model.patch_size", 8)
    assert configs.build_model(config).image_size == 32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit", {"image_size": (16, 18)}, r"\(16, 18\) is not divisible by patch_size=4"),
        ("msvit", {"image_size": (16, 20)}, r"not divisible by the coarse patch of 8 px"),
        (
            "mergence",
            {"image_size": (16, 20), "scales": (4, 8)},
            "do not divide an image of 16 x 2",
        ),
        ("vit", {"image_size": (16, 24), "fixed_grid_size": 4}, "is a rectangle. Give one number"),
        ("t2t_vit_12", {"image_size": (64, 96)}, "is a rectangle. Give one number"),
        ("dvt", {"image_size": (16, 24), "grid_sizes": (2, 4)}, "is a rectangle. Give one number"),
    ],
)
def test_sizes_that_do_not_fit_a_model_are_refused(name, options, message):
    given = {k: v for k, v in SIZES.items() if name != "dvt" or k != "patch_size"}
    if name.startswith("t2t"):
        given = {}
    with pytest.raises(UserError, match=message):
        create_model(name, **{**given, **options})


@pytest.mark.parametrize(
    ("file", "overrides", "message"),
    [
        ("digits_dvt", ["model.image_size=48,64"], "a cascade's stages, makes square grids"),
        ("imagenet/deit_tiny", [], r"random crops \(data\.crop_scale\) .* Set data\.crop_scale to"),
        (SEGMENTER, ["model.patch_size=9"], r"image_size=\(48, 64\) is not divisible by patch_s"),
    ],
)
def test_a_config_whose_parts_need_squares_is_refused_when_it_is_read(file, overrides, message):
    with pytest.raises(UserError, match=message):
        configs.load(file, [*overrides, "data.image_size=48,64"])


def turned(params):
    """Parameters that answer for an image's transpose what others answer for the image."""
    flat = dict(flat_names(params))
    for name, x in flat.items():
        if name.endswith("proj/kernel") and np.ndim(x) == 4:
            flat[name] = np.swapaxes(x, 0, 1)
        if name.endswith("pos_embed"):
            cells = x[1:].reshape(4, 6, -1).swapaxes(0, 1).reshape(24, -1)
            flat[name] = np.concatenate([x[:1], cells])
    return flat


@pytest.mark.parametrize("name", ["vit", "segmenter"])
def test_a_turned_model_answers_for_the_turned_image(name):
    wide, tall = (create_model(name, image_size=s, **SIZES) for s in ((16, 24), (24, 16)))
    variables = rough(wide)
    images = np.random.default_rng(1).normal(size=(2, 16, 24, 3)).astype(np.float32)
    logits = np.asarray(jitted.apply(wide, variables, images).logits)
    params = unflatten_dict(turned(variables["params"]), sep="/")
    others = jitted.apply(tall, {"params": params}, images.swapaxes(1, 2)).logits
    if name == "segmenter":
        assert logits.shape == (2, 4, 6, 3)
        logits = logits.swapaxes(1, 2)
    np.testing.assert_allclose(others, logits, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["vit", "msvit", "mergence", "segmenter"])
def test_costs_are_those_of_a_square_of_as_many_tokens(name):
    scales = {"scales": (4, 8)} if name == "mergence" else {}
    wide, square = (
        create_model(name, image_size=s, **SIZES, **scales) for s in ((8, 32), (16, 16))
    )
    assert wide.max_tokens == square.max_tokens == 16
    assert wide.num_regions == square.num_regions
    tokens = np.asarray([7, 16])
    np.testing.assert_array_equal(wide.macs(tokens), square.macs(tokens))
    with pytest.raises(ValueError, match="use `patch_grid`"):
        _ = wide.grid_size
    assert (wide.patch_grid, square.grid_size) == ((2, 8), 4)


@given(st.integers(1, 6), st.integers(1, 6))
def test_waves_of_a_rectangle_are_a_part_of_a_square_s(rows, columns):
    square = grid.sincos((6, 6), 8).reshape(6, 6, 8)[:rows, :columns]
    np.testing.assert_array_equal(grid.sincos((rows, columns), 8), square.reshape(-1, 8))


@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.integers(1, 90),
    st.integers(1, 90),
    st.floats(0.1, 1),
)
def test_the_center_has_the_shape_that_is_asked_for_and_touches_the_border(
    w, h, rows, columns, part
):
    left, top, right, bottom = image_files.center_box(w, h, part, (rows, columns))
    assert (right - left) * rows == pytest.approx((bottom - top) * columns)
    assert left + right == pytest.approx(w)
    assert top + bottom == pytest.approx(h)
    assert max((right - left) / w, (bottom - top) / h) == pytest.approx(part)


def test_a_classifier_of_rectangles_is_trained_evaluated_and_asked(tmp_path):
    size = {"data__image_size": (8, 16), "data__eval_crop": 0.9}
    config = tiny_run.config(**size, steps=2, eval_every_epochs=4.0)
    figures = loop.train(config, tmp_path)
    assert figures["tokens_mean"] == 8
    batch = next(iter(pipeline.eval_batches(config.data, batch_size=4)))
    assert batch["image"].shape == (4, 8, 16, 3)
    predictor = Predictor.load(tmp_path)
    assert len(predictor(batch["image"])) == 4
    with pytest.raises(
        UserError, match=r"16 x 8 px; the model takes 8 x 16\. .*resize\(\(16, 8\)\)"
    ):
        predictor(batch["image"].swapaxes(1, 2))
    kept = tiny_run.config(**size, data__on_device=True, data__pad_shift=2)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = next(on_device.train_iterator(kept.data, batch_size=4, seed=0, mesh=mesh))
    assert made["image"].shape == (4, 8, 16, 3)
    plain = next(data.train_iterator(config.data, batch_size=4, seed=0))
    assert plain["image"].shape == (4, 8, 16, 3)


@pytest.mark.parametrize("form", ["timm", "huggingface", "big_vision", "segmenter"])
def test_formats_whose_grids_are_square_are_refused(form):
    name = "segmenter" if form == "segmenter" else "vit"
    model = create_model(name, image_size=(16, 24), **SIZES)
    with pytest.raises(UserError, match=r"16 x 24 px .* our own format \(--format=safetensors\)"):
        weights.to_theirs(form, dict(flat_names(rough(model)["params"])), model)
    assert "safetensors" in export.FORMATS


def test_sizes_are_shown_with_their_unit():
    assert [image_size.shown(s) for s in (64, (64, 64), (48, 64))] == [
        "64 px",
        "64 px",
        "48 x 64 px",
    ]
