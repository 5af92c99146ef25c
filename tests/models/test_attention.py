"""Attention: every implementation against softmax written out in NumPy, whatever the mask."""

import dataclasses
from contextlib import nullcontext

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from scipy.special import softmax

from msvit_jax import flops
from msvit_jax.models.attention import IMPLEMENTATIONS, Mask, _fused, attention, scores
from msvit_jax.tokens.packing import NOBODY

HEADS, CHANNELS = 2, 8


def random_qkv(seed, batch, length, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (batch, length, HEADS, CHANNELS)
    return [scale * jax.random.normal(key, shape) for key in keys]


def expected(query, key, value, visible):
    """[B, N, H, d]; visible [B, N, N]."""
    q, k, v = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(CHANNELS)
    scores = np.where(visible[:, None], scores, -np.inf)
    return (softmax(scores, axis=-1) @ v).transpose(0, 2, 1, 3)


def runs(implementation):
    """Where to run it: the TPU kernel in Pallas' interpreter."""
    return pltpu.force_tpu_interpret_mode() if implementation == "pallas" else nullcontext()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_a_mask(implementation):
    query, key, value = random_qkv(0, 2, 9, scale=3.0)
    with runs(implementation):
        found = attention(query, key, value, implementation=implementation)
    np.testing.assert_allclose(found, expected(query, key, value, np.ones((2, 9, 9))), atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("alone", [False, True])
def test_segments_see_themselves_only_and_poison_stays_where_it_is(implementation, alone):
    if alone:
        segments = np.asarray([[4] * 7 + [NOBODY] * 3, [2] * 10])
    else:
        segments = np.asarray([[0] * 3 + [5] * 4 + [NOBODY] * 3, [1] * 6 + [3] * 4])
    query, key, value = random_qkv(1, 2, 10)
    empty = jnp.asarray(segments == NOBODY)[:, :, None, None]
    poisoned = [jnp.where(empty, jnp.nan, x) for x in (query, key, value)]
    mask = Mask(segments=jnp.asarray(segments, jnp.int32), single_segment=alone, max_segments=3)
    with runs(implementation):
        found = attention(*poisoned, mask, implementation=implementation)
    visible = segments[:, :, None] == segments[:, None, :]
    good = segments != NOBODY
    np.testing.assert_allclose(found[good], expected(query, key, value, visible)[good], atol=2e-5)


def test_an_empty_row_is_finite():
    segments = jnp.full((1, 4), NOBODY)
    query, key, value = random_qkv(2, 1, 4)
    for alone in (False, True):
        found = attention(query, key, value, Mask(segments=segments, single_segment=alone))
        assert np.isfinite(found).all()


@hypothesis.given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 20.0]))
def test_weights_of_zero_hide(seed, scale):
    query, key, value = random_qkv(seed, 2, 6, scale)
    weights = np.random.default_rng(seed).integers(0, 2, (2, 6)).astype(np.float32)
    weights[:, 0] = 1
    found = attention(query, key, value, Mask(weights=jnp.asarray(weights)))
    visible = np.broadcast_to(weights[:, None] > 0, (2, 6, 6))
    np.testing.assert_allclose(found, expected(query, key, value, visible), atol=1e-4 * scale)


def switched_on(score, value, weights, key):
    """Attention in float64 with one more key: score [H, N, N], value [N, H, d], weights [N]."""
    shown = np.where((weights > 0) | (np.arange(len(weights)) == key), score, -np.inf)
    return np.einsum("hqk,khd->qhd", softmax(shown, axis=-1), np.asarray(value, np.float64))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("counted", [False, True])
@hypothesis.given(seed=st.integers(0, 2**31), largest=st.sampled_from([1.0, 10.0, 80.0]))
@hypothesis.settings(max_examples=10)
def test_a_hidden_key_is_passed_back_what_switching_it_on_changes(dtype, counted, seed, largest):
    rng = np.random.default_rng(seed)
    query, key, value = (x.astype(dtype) for x in random_qkv(seed, 1, 6))
    raw = np.einsum("qhd,khd->hqk", *(np.asarray(x[0], np.float64) for x in (query, key)))
    query = query * jnp.asarray(largest * CHANNELS**0.5 / np.abs(raw).max(), dtype)
    weights = rng.integers(0, 2, 6).astype(np.float32)
    weights[rng.integers(6)] = 1
    sizes = rng.integers(1, 5, (1, 6)).astype(np.float32) if counted else None
    bias = rng.normal(size=(1, HEADS, 6, 6)).astype(np.float32)
    mask = Mask(sizes=None if sizes is None else jnp.asarray(sizes), bias=jnp.asarray(bias))
    cotangent = rng.normal(size=(6, HEADS, CHANNELS)).astype(np.float32)

    @jax.jit
    def passed_back(query, key, value, weights):
        def loss(w):
            out = attention(query, key, value, dataclasses.replace(mask, weights=w))
            return (out[0].astype(jnp.float32) * cotangent).sum()

        return jax.grad(loss)(weights)

    found = np.asarray(passed_back(query, key, value, jnp.asarray(weights[None])))[0]
    score = np.einsum("qhd,khd->hqk", *(np.asarray(x[0], np.float64) for x in (query, key)))
    score = score / np.sqrt(CHANNELS) + bias[0] + (0 if sizes is None else np.log(sizes[0]))
    now = np.einsum(
        "hqk,khd->qhd",
        softmax(np.where(weights > 0, score, -np.inf), axis=-1),
        np.asarray(value[0], np.float64),
    )
    share = softmax(np.where(weights > 0, score, -np.inf), axis=-1)
    for j in range(6):
        if weights[j] == 0:
            change = switched_on(score, value[0], weights, j) - now
        else:  # the derivative of the weighted softmax
            change = np.einsum(
                "hq,qhd->qhd", share[:, :, j], np.asarray(value[0, j], np.float64)[None] - now
            )
        wanted = (change * cotangent).sum()
        size = np.abs(change * cotangent).sum() + 1
        tolerance = 1e-4 * max(largest, 1) if dtype == jnp.float32 else 0.1 * max(1, largest / 10)
        assert abs(found[j] - wanted) <= tolerance * size
    # However far a hidden key's score lies above the others', what it is passed back is bounded.
    reach = 2 * np.abs(np.asarray(value, np.float64)).max() * np.abs(cotangent).sum()
    assert np.abs(found[weights == 0]).max(initial=0) <= 1.05 * reach


@pytest.mark.parametrize("masked", ["weights", "segments", "nothing"])
def test_shelves_equal_their_rows_one_by_one(masked):
    length_buckets = ((2, 5), (3, 2))  # places of one group: 2 rows of 5, then 3 rows of 2
    query, key, value = random_qkv(4, 2, 16)
    rng = np.random.default_rng(0)
    fields = {
        "weights": {"weights": jnp.asarray(rng.integers(1, 2, (2, 16)), jnp.float32)},
        "segments": {"segments": jnp.asarray(np.sort(rng.integers(0, 2, (2, 16))), jnp.int32)},
        "nothing": {},
    }[masked]
    found = attention(query, key, value, Mask(**fields, length_buckets=length_buckets))
    offset = 0
    for rows, length in length_buckets:
        for _ in range(rows):
            cut = slice(offset, offset + length)
            own = {name: x[:, cut] for name, x in fields.items()}
            one = attention(query[:, cut], key[:, cut], value[:, cut], Mask(**own))
            np.testing.assert_allclose(found[:, cut], one, atol=1e-5)
            offset += length


def test_what_is_not_possible_is_told():
    query, key, value = random_qkv(0, 1, 4)
    with pytest.raises(ValueError, match="'flash' is not one of auto, xla"):
        attention(query, key, value, implementation="flash")
    with pytest.raises(ValueError, match="no gradient to the weights"):
        attention(query, key, value, Mask(weights=jnp.ones((1, 4))), implementation="fused")
    query, key, value = random_qkv(0, 1, 1025)
    with pytest.raises(ValueError, match="takes more than 1024 tokens only without"):
        attention(query, key, value, Mask(weights=jnp.ones((1, 1025))), implementation="pallas")


@pytest.mark.parametrize("masked", ["segments", "nothing"])
def test_gradients_are_those_of_softmax_attention(masked):
    query, key, value = random_qkv(5, 2, 6)
    segments = np.asarray([[0, 0, 1, 1, 1, NOBODY], [2, 2, 2, 3, 3, 3]])
    mask = None if masked == "nothing" else Mask(segments=jnp.asarray(segments), max_segments=3)
    same = segments[:, :, None] == segments[:, None, :]
    visible = jnp.asarray(np.ones((2, 1, 6, 6), bool) if mask is None else same[:, None])
    held = jnp.asarray(segments != NOBODY)[:, :, None, None]

    def literal(query, key, value):
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.float32(np.sqrt(CHANNELS))
        shares = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", shares, value)

    def gradients(function):
        loss = lambda *qkv: jnp.sum(jnp.where(held, jnp.sin(function(*qkv)), 0))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)

    ours = gradients(lambda *qkv: attention(*qkv, mask))
    for a, b in zip(ours, gradients(literal), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_is_added_to_the_scores_and_the_scores_can_be_had(implementation):
    query, key, value = random_qkv(6, 2, 5)
    bias = jax.random.normal(jax.random.key(7), (2, HEADS, 5, 5))
    mask = Mask(bias=bias)
    q, k, v = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (query, key, value))
    wanted = q @ k.transpose(0, 1, 3, 2) / np.sqrt(CHANNELS) + np.asarray(bias)
    np.testing.assert_allclose(scores(query, key, mask), wanted, atol=1e-5)
    mixed = (softmax(wanted, axis=-1) @ v).transpose(0, 2, 1, 3)
    with runs(implementation):
        found = attention(query, key, value, mask, implementation=implementation)
    np.testing.assert_allclose(found, mixed, atol=2e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_with_a_bias_whose_scores_are_used_again(weighted):
    query, key, value = random_qkv(8, 2, 5)
    bias = jax.random.normal(jax.random.key(9), (2, HEADS, 5, 5))
    seen = jnp.asarray([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], jnp.float32)
    weights = seen if weighted else None

    def literal(query, key, value, bias):
        score = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.float32(np.sqrt(CHANNELS)) + bias
        shown = score if weights is None else jnp.where(seen[:, None, None] > 0, score, -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(shown, axis=-1), value), score

    def ours(query, key, value, bias):
        mask = Mask(weights=weights, bias=bias)
        return attention(query, key, value, mask), scores(query, key, mask)

    def gradients(function):
        loss = lambda *x: sum(jnp.sin(part).sum() for part in function(*x))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(query, key, value, bias)

    for a, b in zip(gradients(ours), gradients(literal), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("masked", ["nothing", "alone", "segments", "sizes", "bias", "both"])
def test_a_place_that_makes_the_length_even_changes_nothing(masked):
    query, key, value = random_qkv(11, 2, 7)
    sizes = jnp.asarray(np.random.default_rng(0).integers(1, 5, (2, 7)), jnp.float32)
    bias = jax.random.normal(jax.random.key(12), (2, HEADS, 7, 7))
    alone = jnp.asarray([[4] * 5 + [NOBODY] * 2, [2] * 7])
    apart = jnp.asarray([[0] * 3 + [5] * 2 + [NOBODY] * 2, [1] * 6 + [3]])
    mask = {
        "nothing": Mask(),
        "alone": Mask(segments=alone, single_segment=True),
        "segments": Mask(segments=apart, max_segments=3),
        "sizes": Mask(sizes=sizes),
        "bias": Mask(bias=bias),
        "both": Mask(segments=alone, single_segment=True, sizes=sizes),
    }[masked]
    held = True if mask.segments is None else (mask.segments != NOBODY)[:, :, None, None]

    def passes(attend):
        loss = lambda *qkv: jnp.sum(jnp.where(held, jnp.sin(attend(*qkv)), 0))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value)

    wanted = passes(lambda *qkv: attention(*qkv, mask, implementation="xla"))
    found = passes(lambda *qkv: _fused(*qkv, mask, even=True))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_scores_that_are_handed_on_cost_no_second_product():
    query, key, value = random_qkv(10, 1, 64)
    product = HEADS * 64 * 64 * CHANNELS
    counted = flops.xla_macs(lambda q, k, v: (attention(q, k, v), scores(q, k)), query, key, value)
    alone = flops.xla_macs(lambda q, k, v: attention(q, k, v), query, key, value)
    assert counted - alone < product / 10


def test_a_bias_that_is_not_possible_is_told():
    query, key, value = random_qkv(0, 1, 4)
    bias = jnp.zeros((1, HEADS, 4, 4))
    with pytest.raises(ValueError, match="length buckets"):
        attention(query, key, value, Mask(bias=bias, length_buckets=((2, 2),)))
