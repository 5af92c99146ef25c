"""Small weights of other libraries' models: our model gives their logits, and we give them back."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from msvit_jax import create_model, weights
from msvit_jax.tree import flat_names, map_names
from msvit_jax.weights import adapt, files

GOLDEN = pathlib.Path(__file__).with_name("golden")
CASES = json.loads((GOLDEN / "golden.json").read_text())["cases"]
# What we write is the same model in the format's usual form: layers apart, positions as numbers.
OTHERWISE_WRITTEN = {"big_vision_scanned", "big_vision_sincos"}


def path(name):
    (found,) = GOLDEN.glob(f"{name}.*")
    return found


def format_of(name):
    return "big_vision" if "vision" in name else name.split("_")[0]


def made(name, **changes):
    return create_model("vit_tiny_patch16_224", **{**CASES[name]["options"], **changes})


@functools.cache
def images():
    return np.load(GOLDEN / "images.npy")


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def logits(model, flat):
    """Of the golden images; a head that the weights lack copies the class token."""
    shapes = adapt.model_shapes(model)
    taken, _ = adapt.adapt_weights(flat, shapes)
    if "head/kernel" not in taken:
        size = model.num_classes
        taken |= {"head/kernel": np.eye(size), "head/bias": np.zeros(size)}
    params = map_names(lambda name, _: np.asarray(taken[name], np.float32), shapes)
    with jax.default_matmul_precision("highest"):
        return compiled(model)({"params": params}, images()).logits


def close(found, name):
    expected = np.asarray(CASES[name]["logits"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_other_library(name):
    model = made(name)
    found = weights.load(path(name), model)
    assert found.format == format_of(name)
    close(logits(model, found.flat), name)


@pytest.mark.parametrize("name", sorted(set(CASES) - OTHERWISE_WRITTEN))
def test_the_files_come_back_exactly(name):
    model, theirs = made(name), files.read(path(name))
    found = weights.load(path(name), model)
    back = weights.to_theirs(found.format, found.flat, model)
    if "headless" in name:  # we write the names of the model with a head, which both read
        back = {key.removeprefix("dinov2."): x for key, x in back.items()}
    assert back.keys() == theirs.keys() - set(found.unused)
    for key, x in back.items():
        np.testing.assert_array_equal(x, theirs[key])
    assert all("mask_token" in key or "pooler" in key for key in found.unused)


@pytest.mark.parametrize("name", sorted(OTHERWISE_WRITTEN))
def test_what_is_written_otherwise_is_the_same_model(name, tmp_path):
    model = made(name)
    np.savez(
        tmp_path / "w.npz",
        **weights.to_theirs("big_vision", weights.read(path(name), model), model),
    )
    assert "params/pos_embedding" in files.read(tmp_path / "w.npz")
    close(logits(model, weights.read(tmp_path / "w.npz", model)), name)


@pytest.mark.parametrize("name", ["timm_vit", "big_vision_scanned"])
def test_scanned_layers_take_and_give_the_same(name):
    model = made(name, scan_layers=True)
    flat = weights.read(path(name), model)
    assert flat["blocks/norm1/scale"].shape == (2, 16)
    close(logits(model, flat), name)
    plain = made(name)
    expected = weights.to_theirs(format_of(name), weights.read(path(name), plain), plain)
    for key, x in weights.to_theirs(format_of(name), flat, model).items():
        np.testing.assert_array_equal(x, expected[key])


def test_a_mixed_scale_model_takes_and_gives_its_backbone():
    options = CASES["timm_vit"]["options"]
    model = create_model("msvit_tiny_patch16_224", **options)
    flat = weights.read(path("timm_vit"), model)
    plain = weights.read(path("timm_vit"), made("timm_vit"))
    assert flat.keys() == {f"backbone/{name}" for name in plain}
    flat["gate_mlp/fc1/kernel"] = np.zeros((3, 3), np.float32)
    theirs = files.read(path("timm_vit"))
    back = weights.to_theirs("timm", flat, model)
    assert back.keys() == theirs.keys()
    np.testing.assert_array_equal(back["head.weight"], theirs["head.weight"])


@pytest.mark.parametrize(
    "name", ["timm_dinov2", "huggingface_dinov2_registers", "vision_transformer"]
)
def test_a_token_without_position_takes_the_positions_in(name):
    """Weights with a position of the class token, in a model that has none, are the same model."""
    model = made(name, prefix_positions=False)
    flat = weights.read(path(name), model)
    assert flat["pos_embed"].shape == (16, 16)
    close(logits(model, flat), name)


def test_a_token_gets_a_position_of_zeros_where_the_source_has_none():
    name = "big_vision_scanned"
    model = made(name, prefix_positions=True)
    flat = weights.read(path(name), model)
    np.testing.assert_array_equal(flat["pos_embed"][0], 0)
    close(logits(model, flat), name)


def test_files_name_no_other_parameters_than_the_model():
    for name in CASES:
        wanted = flat_names(adapt.model_shapes(made(name)))
        assert weights.read(path(name), made(name)).keys() <= wanted.keys()
