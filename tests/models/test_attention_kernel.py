"""The TPU kernel for short sequences, in Pallas' interpreter, against plain products."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from msvit_jax import sharding
from msvit_jax.models.attention import Mask, attention, joins_heads
from msvit_jax.tokens.packing import NOBODY

# (heads, channels of one): tiles of 128 hold one head, half of one, several, or parts of two.
HEADS = [(2, 8), (4, 64), (3, 64), (1, 128), (4, 96)]


def random_case(seed, batch, length, heads, channels, scale, parts):
    """Queries, keys and values [B, N, H, d], and a mask with the named parts."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, heads, channels)
    arrays = [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for _ in range(3)]
    weights = rng.integers(0, 2, (batch, length)).astype(np.float32)
    weights[np.arange(batch), rng.integers(0, length, batch)] = 1
    apart = np.sort(rng.integers(0, 3, (batch, length)))
    alone = np.arange(length) < rng.integers(1, length + 1, (batch, 1))
    made = {
        "weights": {"weights": jnp.asarray(weights)},
        "sizes": {"sizes": jnp.asarray(rng.integers(1, 9, (batch, length)), jnp.float32)},
        "bias": {"bias": jnp.asarray(rng.normal(size=(batch, heads, length, length)), jnp.float32)},
        "segments": {"segments": jnp.asarray(apart, jnp.int32), "max_segments": 3},
        "alone": {
            "segments": jnp.asarray(np.where(alone, 1, NOBODY), jnp.int32),
            "single_segment": True,
        },
    }
    return arrays, Mask(**{k: v for part in parts for k, v in made[part].items()})


def passes(implementation, arrays, mask, cotangent):
    """The answer and every gradient, of rows that hold an image."""
    held = 1.0 if mask.segments is None else (mask.segments != NOBODY)[:, :, None, None]

    def loss(query, key, value, weights, bias):
        own = dataclasses.replace(mask, weights=weights, bias=bias)
        out = attention(query, key, value, own, implementation=implementation)
        out = jnp.where(held, out.astype(jnp.float32), 0)
        return (out * cotangent).sum(), out

    given = (*arrays, mask.weights, mask.bias)
    numbers = tuple(i for i, x in enumerate(given) if x is not None)
    gradients, out = jax.jit(jax.grad(loss, numbers, has_aux=True))(*given)
    return [out, *gradients]


@hypothesis.given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 3]),  # no images side by side, which the others have
    length=st.sampled_from([1, 9, 18]),
    shape=st.sampled_from(HEADS),
    scale=st.sampled_from([0.3, 1.0, 5.0]),
    parts=st.sampled_from(
        [
            (),
            ("weights",),
            ("segments",),
            ("alone", "sizes"),
            ("segments", "bias"),
            ("weights", "sizes", "bias"),
        ]
    ),
)
@hypothesis.settings(max_examples=10)
def test_answers_and_gradients_are_those_of_plain_products(
    seed, batch, length, shape, scale, parts
):
    heads, channels = shape
    arrays, mask = random_case(seed, batch, length, heads, channels, scale, parts)
    cotangent = np.random.default_rng(seed).normal(size=arrays[0].shape).astype(np.float32)
    with pltpu.force_tpu_interpret_mode():
        found = passes("pallas", arrays, mask, cotangent)
    # Gradients are differences of these, and both ways round them: by 1e-7, as float64 shows.
    terms = float(jnp.abs(jnp.einsum("bqhd,bkhd->bhqk", cotangent, arrays[2])).max())
    for a, b in zip(found, passes("xla", arrays, mask, cotangent), strict=True):
        atol = 1e-5 * max(1.0, float(jnp.abs(b).max())) + 1e-6 * terms
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


def test_bfloat16_is_as_near_to_float32_as_plain_products_are():
    arrays, mask = random_case(1, 4, 33, 2, 64, 1.0, ("weights", "sizes"))
    cotangent = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    exact = passes("xla", arrays, mask, cotangent)
    narrow = [x.astype(jnp.bfloat16) for x in arrays]
    with pltpu.force_tpu_interpret_mode():
        found = passes("pallas", narrow, mask, cotangent)
    plain = passes("xla", narrow, mask, cotangent)

    def errors(passed):
        return [
            float(jnp.abs(x.astype(jnp.float32) - y).max())
            for x, y in zip(passed, exact, strict=True)
        ]

    for ours, theirs in zip(errors(found), errors(plain), strict=True):
        assert 0 < ours <= 1.5 * theirs


@pytest.mark.parametrize("parts", [(), ("weights",), ("segments", "bias")])
def test_each_device_runs_it_on_its_own_images(parts):
    arrays, mask = random_case(2, 16, 9, 2, 8, 1.0, parts)
    cotangent = np.random.default_rng(2).normal(size=arrays[0].shape).astype(np.float32)
    wanted = passes("xla", arrays, mask, cotangent)
    mesh = sharding.make_mesh(fsdp=2)
    cut = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))  # noqa: E731
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        found = passes("pallas", *jax.tree.map(cut, (arrays, mask)), cotangent)
    for a, b in zip(found, wanted, strict=True):
        assert a.sharding.is_equivalent_to(sharding.batch_sharding(mesh), a.ndim)
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_auto_takes_it_on_tpus_where_it_is_known_which_images_a_device_has(monkeypatch):
    tokens = lambda *shape, dtype=jnp.bfloat16: jnp.zeros((*shape, 8), dtype)  # noqa: E731
    with jax.set_mesh(sharding.make_mesh()):
        assert not joins_heads(tokens(16, 197), None, "auto")
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    long = tokens(16, 197)
    assert not joins_heads(long, None, "auto")  # eight devices and no mesh
    with jax.set_mesh(sharding.make_mesh()):
        assert joins_heads(long, None, "auto")
        assert not joins_heads(long, None, "xla")
        for others in (
            tokens(12, 197),  # 12 images over 8 devices
            tokens(16, 128),  # XLA does a tile well
            tokens(16, 1025),
            tokens(16, 197, dtype=jnp.float16),
        ):
            assert not joins_heads(others, None, "auto")
        assert joins_heads(tokens(16, 9), None, "pallas")


def test_a_cpu_beside_the_tpu_gets_plain_products(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    arrays, mask = random_case(3, 8, 130, 2, 8, 1.0, ("weights",))
    with jax.set_mesh(sharding.make_mesh()):
        found = jax.jit(lambda *x: attention(*x, mask))(*arrays)
    np.testing.assert_allclose(found, attention(*arrays, mask, implementation="xla"), atol=1e-5)
