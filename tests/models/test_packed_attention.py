"""Sequences that lie end to end, as cuDNN is told of them, against attention image by image."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.special import softmax

from msvit_jax.models import attention, packed_attention
from msvit_jax.models.attention import Mask
from msvit_jax.tokens.packing import NOBODY

HEADS, CHANNELS = 2, 8


def by_flat_positions(query, key, value, starts, lengths):
    """What cuDNN does: rows are end to end, and what is in no sequence is left as it was, NaN."""
    length = query.shape[1]
    q, k, v = (np.asarray(x, np.float64).reshape(-1, *x.shape[2:]) for x in (query, key, value))
    out = np.full_like(q, np.nan)
    assert starts.shape == lengths.shape
    for row, (begins, counts) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        for begin, count in zip(begins, counts, strict=True):
            assert (begin < 0) == (count < 0)
            assert count != 0
            assert count <= length
            if count > 0:
                cut = slice(row * length + begin, row * length + begin + count)
                score = np.einsum("qhd,khd->hqk", q[cut], k[cut]) / np.sqrt(CHANNELS)
                assert np.isnan(out[cut]).all(), "two sequences share a position"
                out[cut] = np.einsum("hqk,khd->qhd", softmax(score, axis=-1), v[cut])
    return jnp.asarray(out.reshape(query.shape), jnp.float32)


@pytest.fixture
def packed(monkeypatch):
    """Attention as on a GPU whose cuDNN takes packed sequences."""
    monkeypatch.setattr(packed_attention, "available", lambda: True)
    monkeypatch.setattr(packed_attention, "_call", by_flat_positions)
    monkeypatch.setattr(attention, "_has_cudnn", lambda dtype: True)


def same_as_xla(mask, groups, total, seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    given = [jax.random.normal(key, (groups, total, HEADS, CHANNELS)) for key in keys]
    wanted = attention.attention(*given, mask, implementation="xla")
    found = attention.attention(*given, mask, implementation="fused")
    held = np.asarray(mask.segments) != NOBODY
    np.testing.assert_allclose(found[held], wanted[held], atol=2e-5)
    assert np.isfinite(found).all()


@hypothesis.given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 3),
    buckets=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), min_size=2, max_size=4),
)
@hypothesis.settings(
    max_examples=5, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_length_buckets_of_any_sizes_and_fillings(packed, seed, groups, buckets):
    buckets = tuple(sorted(buckets, key=lambda bucket: -bucket[1]))
    hypothesis.assume(packed_attention.Sequences(buckets).row_length % 2 == 0)
    rng = np.random.default_rng(seed)
    groups_of_runs = []
    for group in range(groups):
        runs = []
        for rows, length in buckets:
            for _ in range(rows):
                filled = rng.integers(0, length + 1)
                runs += [len(runs) + 100 * group] * filled + [NOBODY] * (length - filled)
        groups_of_runs.append(runs)
    segments = jnp.asarray(groups_of_runs, jnp.int32)
    mask = Mask(segments=segments, single_segment=True, length_buckets=buckets)
    same_as_xla(mask, groups, segments.shape[1], seed)


@hypothesis.given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    width=st.integers(1, 6).map(lambda half: 2 * half),
    flat=st.booleans(),
)
@hypothesis.settings(
    max_examples=5, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_rows_of_several_images(packed, seed, rows, width, flat):
    rng = np.random.default_rng(seed)
    segments, image = np.full((rows, width), NOBODY), 0
    for row in segments:
        begin = 0
        while begin < width and rng.random() < 0.8:
            end = begin + rng.integers(1, width - begin + 1)
            row[begin:end], begin, image = image, end, image + 1
    most = max(1 + np.count_nonzero(np.diff(row)) for row in segments)
    given = jnp.asarray(segments.reshape(1, -1) if flat else segments, jnp.int32)
    mask = Mask(
        segments=given, max_segments=int(most), length_buckets=((rows, width),) if flat else ()
    )
    same_as_xla(mask, *given.shape, seed)


def test_groups_are_cut_into_rows_that_hold_the_longest_sequence():
    segments = jnp.zeros((1, 256 * 130), jnp.int32)
    buckets = tuple((64, length) for length in (197, 141, 101, 81))
    sequences = packed_attention.Sequences(buckets)
    starts, lengths = sequences.find(segments)
    width = sequences.row_length
    assert 197 <= width < 2 * 197
    assert width * starts.shape[0] == segments.shape[1]
    assert (np.asarray(starts) >= 0).sum() == 256
    assert np.asarray(lengths).max() == 197


def test_gradients_where_what_lies_in_no_sequence_is_not_written(monkeypatch, packed):
    """The kernel's outputs and gradients are NaN there, and nothing of it gets out."""
    segments = jnp.asarray([[0] * 3 + [1] * 2 + [NOBODY], [2] * 4 + [NOBODY] * 2], jnp.int32)
    unwritten = (segments == NOBODY)[:, :, None, None]

    @jax.custom_vjp
    def attend(query, key, value, starts, lengths):
        assert starts.shape == lengths.shape == (2, 3)
        mask = Mask(segments=segments, max_segments=3)
        mixed = attention.attention(query, key, value, mask, implementation="xla")
        return jnp.where(unwritten, jnp.nan, mixed)

    def forward(*given):
        out, back = jax.vjp(lambda *qkv: attend.fun(*qkv, *given[3:]), *given[:3])
        return out, back

    def backward(back, cotangent):
        return (*(jnp.where(unwritten, jnp.nan, g) for g in back(cotangent)), None, None)

    attend.defvjp(forward, backward)
    monkeypatch.setattr(packed_attention, "_call", attend)
    keys = jax.random.split(jax.random.key(3), 4)
    given = [jax.random.normal(key, (2, 6, HEADS, CHANNELS)) for key in keys]
    mask = Mask(segments=segments, max_segments=3)

    def gradients(kind):
        attend = lambda *qkv: attention.attention(*qkv, mask, implementation=kind)  # noqa: E731
        out, back = jax.vjp(attend, *given[:3])
        return out, *back(jnp.where(unwritten, 0, given[3]))

    for found, wanted in zip(gradients("fused"), gradients("xla"), strict=True):
        held = np.broadcast_to(~unwritten, found.shape)
        np.testing.assert_allclose(found[held], wanted[held], atol=2e-5)
        assert np.isfinite(found).all()
