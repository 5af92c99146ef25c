"""T2T-ViT: official sizes, the first soft split, and the tokenizer against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import erf

import msvit_jax
from msvit_jax import flops
from msvit_jax.models import block as blocks
from msvit_jax.models import t2t
from tests.jitted import apply, init
from tests.models.test_vit import rough

TINY = {"image_size": 32, "width": 16, "depth": 1, "heads": 2, "num_classes": 5}


@functools.cache
def make(**overrides):
    model = msvit_jax.create_model("t2t_vit_12", **(TINY | {"fixed_grid_size": 2} | overrides))
    side = model.image_size
    images = jax.random.normal(jax.random.key(1), (2, side, side, 3))
    return model, init(model, images), images


# Millions of parameters and GMACs as the T2T-ViT repository lists them.
@pytest.mark.parametrize(
    ("depth", "millions", "gmacs"),
    [(12, 6.9, 1.8), (14, 21.5, 4.8), (19, 39.2, 8.5), (24, 64.1, 13.8)],
)
def test_sizes_are_the_official_ones(depth, millions, gmacs):
    model = msvit_jax.create_model(f"t2t_vit_{depth}")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    assert float(model.macs(196)) / 1e9 == pytest.approx(gmacs, rel=0.025)


def test_analytic_macs_agree_with_xla(monkeypatch):
    # XLA counts the polynomials behind erf and the exponential; a MAC count must not.
    monkeypatch.setattr(t2t, "gelu", jax.nn.relu)
    monkeypatch.setitem(blocks.GELUS, "exact", jax.nn.relu)
    model = msvit_jax.create_model("t2t_vit_12", depth=2)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = flops.xla_macs(lambda v, x: model.apply(v, x).logits, variables, images)
    assert float(model.macs(196)) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    ("size", "side", "window", "stride", "padding", "first"),
    [(224, 14, 7, 4, 2, 56), (224, 10, 11, 6, 5, 38), (224, 7, 14, 8, 3, 28), (64, 8, 4, 2, 1, 32)],
)
def test_first_soft_split(size, side, window, stride, padding, first):
    assert t2t.first_split(size, side) == t2t.SoftSplit(window, stride, padding, first)
    x = jnp.zeros((1, size, size, 1))
    for args in ((window, stride, padding), (3, 2, 1), (3, 2, 1)):
        x = t2t.grid.windows(x, *args)[..., :1]
    assert x.shape == (1, side, side, 1)


def test_every_first_split_leads_to_its_grid():
    for size in (16, 32, 48, 64, 224):
        for side in filter(lambda side: t2t._first_split(size, side), range(1, size // 4 + 1)):
            split = t2t.first_split(size, side)
            x = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
            for args in ((split.window, split.stride, split.padding), (3, 2, 1), (3, 2, 1)):
                x = jax.eval_shape(lambda x: t2t.grid.windows(x, *args)[..., :1], x)  # noqa: B023
            assert x.shape == (1, side, side, 1)


def test_a_grid_without_a_split_is_told():
    with pytest.raises(ValueError, match=r"5 x 5; sides that fit: 1, 2, 3, 4, 8"):
        make(fixed_grid_size=5)


def reference_tokens(params, image, split):
    """Tokens of one image in float64, window by window."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def unfold(x, window, stride, padding):
        x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
        count = (x.shape[0] - window) // stride + 1
        return np.stack(
            [
                [x[y * stride :, c * stride :][:window, :window].reshape(-1) for c in range(count)]
                for y in range(count)
            ]
        )

    def norm(x, q):
        centered = x - x.mean(-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * q["scale"] + q["bias"]

    def dense(x, q):
        return x @ q["kernel"] + q["bias"]

    def kernel_features(x, w):
        return np.asarray([np.exp(w @ row - row @ row / 2) / np.sqrt(len(w)) for row in x])

    def performer(x, q):
        k, query, v = np.split(dense(norm(x, q["norm1"]), q["kqv"]), 3, axis=-1)
        k, query = (kernel_features(a, q["random_features"]) for a in (k, query))
        similarity = query @ k.T
        mixed = similarity @ v / (similarity.sum(1, keepdims=True) + 1e-8)
        y = v + dense(mixed, q["proj"])
        h = dense(norm(y, q["norm2"]), q["fc1"])
        return y + dense(h * (1 + erf(h / np.sqrt(2))) / 2, q["fc2"])

    x = unfold(np.asarray(image, np.float64), split.window, split.stride, split.padding)
    for step in (1, 2):
        side = len(x)
        x = performer(x.reshape(side * side, -1), p[f"performer_{step}"]).reshape(side, side, -1)
        x = unfold(x, 3, 2, 1)
    return dense(x, p["proj"])


def test_tokens_equal_a_numpy_tokenizer():
    model, variables, images = make()
    variables = rough(variables)
    tokens_of = lambda m, x: m.patch_embed(x, train=False)  # noqa: E731
    found = apply(model, variables, images, method=tokens_of)
    params = variables["params"]["patch_embed"]
    expected = np.stack([reference_tokens(params, image, model.split) for image in images])
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_random_features_are_orthogonal_and_of_the_official_length():
    _, variables, _ = make()
    matrix = np.asarray(variables["params"]["patch_embed"]["performer_1"]["random_features"])
    assert matrix.shape == (32, 64)
    np.testing.assert_allclose(matrix @ matrix.T, 32 * np.eye(32), atol=1e-3)


def test_positions_are_the_sinusoid_of_the_place_in_the_sequence():
    _, variables, _ = make()
    table = np.asarray(variables["params"]["pos_embed"])
    for place in range(5):
        for channel in range(16):
            angle = place / 10000 ** (2 * (channel // 2) / 16)
            expected = np.cos(angle) if channel % 2 else np.sin(angle)
            assert table[place, channel] == pytest.approx(expected, abs=1e-6)


def test_what_is_fixed_stays_as_it_is_under_adamw():
    model, variables, images = make()

    def loss(v):
        return (model.apply(v, images).logits ** 2).sum()

    optimizer = optax.adamw(1e-2, mask=lambda tree: jax.tree.map(lambda x: False, tree))

    @jax.jit
    def step(v):
        updates, _ = optimizer.update(jax.grad(loss)(v), optimizer.init(v), v)
        return optax.apply_updates(v, updates)

    with jax.numpy_dtype_promotion("standard"):
        after = step(variables)["params"]
    before = variables["params"]
    np.testing.assert_array_equal(after["pos_embed"], before["pos_embed"])
    for step in ("performer_1", "performer_2"):
        ours, theirs = (tree["patch_embed"][step] for tree in (after, before))
        np.testing.assert_array_equal(ours["random_features"], theirs["random_features"])
        assert jnp.abs(ours["kqv"]["kernel"] - theirs["kqv"]["kernel"]).max() > 1e-3


def test_dropout_of_the_tokenizer_is_on_in_training_alone():
    model, variables, images = make()
    a, b = (
        apply(model, variables, images, train=True, rngs={"dropout": jax.random.key(k)}).logits
        for k in range(2)
    )
    assert jnp.abs(a - b).max() > 1e-6
    still = [apply(model, variables, images).logits for _ in range(2)]
    np.testing.assert_array_equal(*still)
