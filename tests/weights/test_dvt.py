"""Official DVT weights: every key of the published state dicts, there and back, and misfits."""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import msvit_jax
from msvit_jax.errors import UserError
from msvit_jax.tokens import grid
from msvit_jax.tree import flat_names
from msvit_jax.weights import dvt, entries
from msvit_jax.weights.adapt import model_shapes

NAMES = ("dvt_deit_small", "dvt_t2t_vit_12", "dvt_t2t_vit_14")


@functools.cache
def published(name):
    """Names and shapes of the official state dict; '*' in the file stands for every layer."""
    depth = 14 if name.endswith("14") else 12
    text = pathlib.Path(__file__).with_name(f"{name}.txt").read_text()
    keys = {}
    for line in text.splitlines():
        key, shape = line.split("\t")
        for layer in range(depth):
            keys[key.replace("*", str(layer))] = tuple(map(int, shape.strip("[]").split(", ")))
    return keys


@functools.cache
def made(name):
    model = msvit_jax.create_model(name)
    return model, flat_names(model_shapes(model))


def state(name):
    """Weights of the published shapes; in an array every number is another."""
    return {
        key: np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        for key, shape in published(name).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_published_key_is_mapped_and_comes_back_exactly(name):
    model, shapes = made(name)
    theirs = state(name)
    ours = entries.to_ours(theirs, dvt.table(model), shapes)
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in shapes.items()}
    back = entries.to_theirs(ours, dvt.table(model))
    assert back.keys() == theirs.keys()
    for key, x in theirs.items():
        np.testing.assert_array_equal(back[key], x)


def test_windows_and_convolutions_compute_the_same():
    """A linear layer over windows with the channel first is ours over windows with it last."""
    rng = np.random.default_rng(1)
    image = rng.standard_normal((1, 6, 6, 2)).astype(np.float32)
    weight = rng.standard_normal((5, 2 * 3 * 3)).astype(np.float32)
    (entry, _) = dvt._window_linear("kqv", "kqv", 3)
    found = grid.windows(jnp.asarray(image), 3, 1, 0) @ entry.to_ours(weight)
    (conv, _) = entries.conv("proj", "proj")
    kernel = conv.to_ours(weight.reshape(5, 2, 3, 3))
    for y in range(4):
        for x in range(4):
            window = image[0, y : y + 3, x : x + 3]
            expected = weight @ window.transpose(2, 0, 1).reshape(-1)
            np.testing.assert_allclose(found[0, y, x], expected, rtol=1e-4, atol=1e-5)
            by_kernel = np.einsum("hwc,hwcd->d", window, kernel)
            np.testing.assert_allclose(by_kernel, expected, rtol=1e-4, atol=1e-5)


def test_all_misfits_are_listed_at_once():
    model, shapes = made("dvt_t2t_vit_12")
    weights = state("dvt_t2t_vit_12")
    weights["less_token.norm.wight"] = weights.pop("less_token.norm.weight")
    weights["normal_token.head.weight"] = np.zeros((10, 256), np.float32)
    with pytest.raises(UserError, match="3 misfits") as error:
        entries.to_ours(weights, dvt.table(model), shapes)
    message = str(error.value)
    assert "less_token.norm.weight: missing. Did you mean 'less_token.norm.wight'?" in message
    assert "normal_token.head.weight: (10, 256) in the source, (1000, 256) expected" in message
    assert "less_token.norm.wight: unexpected" in message


def test_weights_of_another_variant_are_told():
    model, shapes = made("dvt_t2t_vit_14")
    with pytest.raises(UserError, match=r"blocks\.13\.norm1\.weight: missing"):
        entries.to_ours(state("dvt_t2t_vit_12"), dvt.table(model), shapes)
    two = msvit_jax.create_model("dvt_deit_small", grid_sizes=(7, 14))
    with pytest.raises(UserError, match="3 stages, not 2"):
        dvt.table(two)
