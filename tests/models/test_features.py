"""Models without a head: class token and patches on their grid."""

import functools

import jax
import numpy as np
import pytest

from msvit_jax import Predictor, create_model
from msvit_jax.errors import UserError
from msvit_jax.tree import flat_names
from msvit_jax.weights import adapt, formats, loading
from tests import jitted

OPTIONS = {"width": 16, "depth": 2, "heads": 2, "num_classes": 0, "image_size": 16, "patch_size": 4}


@functools.cache
def images():
    return np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)


def variables(model):
    return jitted.init(model, images())


def test_a_dense_model_gives_what_the_head_and_mean_pooling_would_read():
    model = create_model("deit_tiny_patch16_224", **OPTIONS)
    params = variables(model)["params"]
    assert not any("head" in name for name in flat_names(params))
    output = jitted.apply(model, {"params": params}, images())
    assert output.logits.shape == (3, 0)
    assert output.features.patches.shape == (3, 4, 4, 16)
    # A head that copies shows what a model with one has in its place.
    copies = {"head": {"kernel": np.eye(16, dtype=np.float32), "bias": np.zeros(16, np.float32)}}
    with_head = model.clone(num_classes=16)
    expected = jitted.apply(with_head, {"params": {**params, **copies}}, images()).logits
    np.testing.assert_allclose(output.features.class_token, expected, rtol=1e-5, atol=1e-5)
    mean = with_head.clone(pool="mean")
    pooled = jitted.apply(mean, {"params": {**params, **copies}}, images()).logits
    means = output.features.patches.mean(axis=(1, 2))
    np.testing.assert_allclose(means, pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reducer", ["mergence", "topk"])
def test_merged_patches_are_put_back_on_the_grid(reducer):
    model = create_model("deit_tiny_patch16_224", **OPTIONS, reducer=reducer, reduce_layers=(1,))
    output = jitted.apply(model, variables(model), images())
    patches = np.asarray(output.features.patches).reshape(3, 16, 16)
    hosts = np.asarray(output.merge_targets[0])
    for image in range(3):
        for patch in range(16):
            host = hosts[image, patch]
            expected = np.zeros(16) if host < 0 else patches[image, host]
            np.testing.assert_array_equal(patches[image, patch], expected)
    assert (hosts != np.arange(16)).any()


@pytest.mark.parametrize(
    "layout",
    [{"layout": "budget", "token_capacity": 16}, {"layout": "rows", "rows": 3, "row_width": 17}],
)
def test_a_coarse_token_stands_on_its_four_patches_in_every_layout(layout):
    model = create_model("msvit_deit_tiny_patch16_224", **OPTIONS, gate="random")
    params = variables(model)
    coarse = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    expected = jitted.apply(model, params, images(), coarse=coarse).features
    packed = jitted.apply(model.clone(**layout), params, images(), coarse=coarse).features
    for found in (expected, packed):
        cells = np.asarray(found.patches)
        assert cells.shape == (3, 4, 4, 16)
        np.testing.assert_array_equal(cells[0, :2, :2], np.broadcast_to(cells[0, 0, 0], (2, 2, 16)))
        assert np.abs(cells[0, 0, 2] - cells[0, 0, 3]).max() > 1e-3
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_predictor_returns_features_in_the_order_of_the_images():
    model = create_model("deit_tiny_patch16_224", **OPTIONS)
    params = variables(model)
    many = np.concatenate([images()] * 5)[:11]
    answers = Predictor(model, params, batch_size=8)(many)
    expected = jitted.apply(model, params, many).features
    np.testing.assert_allclose(answers.features.patches, expected.patches, rtol=1e-4, atol=1e-5)
    token = expected.class_token
    np.testing.assert_allclose(answers.features.class_token, token, rtol=1e-4, atol=1e-5)
    for ask in ("labels", "names", "probabilities"):
        with pytest.raises(UserError, match=r"no head.*\.features"):
            getattr(answers, ask)


def test_a_head_is_left_out_where_the_model_has_none():
    with_head = create_model("deit_tiny_patch16_224", **{**OPTIONS, "num_classes": 3})
    shapes = flat_names(adapt.model_shapes(with_head))
    flat = {name: np.ones(s.shape, np.float32) for name, s in shapes.items()}
    headless = with_head.clone(num_classes=0)
    for form in ("timm", "huggingface", "big_vision"):
        found = loading.convert(formats.to_theirs(form, flat, with_head), headless)
        told = {f"head/{part} (the model has no head)" for part in ("kernel", "bias")}
        assert set(found.unused) == told
        found.params_for(headless)
        back = formats.to_theirs(form, found.flat, headless)
        assert not any("head" in name or "classifier" in name for name in back)
        with pytest.raises(UserError, match=r"features alone \(num_classes=0\)"):
            loading.convert(back, with_head).params_for(with_head)


def test_what_needs_classes_says_so():
    with pytest.raises(UserError, match="a cascade needs classes"):
        create_model("dvt_deit_small", num_classes=0)
    with pytest.raises(UserError, match=r"num_classes=-1 .* at least 0 expected"):
        create_model("deit_tiny_patch16_224", num_classes=-1)
