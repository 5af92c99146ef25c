"""Packing against plain loops: every active token placed once, the not-fitting exactly reported."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msvit_jax.tokens import packing

TOKENS = 12
SHAPES = [(2, 4), (1, 12)]  # groups, images of a group: each is compiled once


@st.composite
def batches(draw):
    groups, images = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0.1, 0.5, 0.9]))
    active = rng.random((groups * images, TOKENS)) < share
    active[:, 0] = True  # every image has a token
    return groups, active


def best_assignment(lengths, widths):
    """How many images of a group can have a run at all: largest first, by hand."""
    left, count = sorted(widths), 0
    for length in sorted(lengths, reverse=True):
        if left and left[-1] >= length:
            left.pop()
            count += 1
    return count


def first_fit(lengths, rows, width):
    """First-fit, longest first, by hand: (row, start) of each image, None where it does not fit."""
    filled, found = [0] * rows, {}
    for image in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r in range(rows) if filled[r] + lengths[image] <= width), None)
        found[image] = None if row is None else (row, filled[row])
        if row is not None:
            filled[row] += lengths[image]
    return found


@jax.jit
def there_and_back(packed, values):
    gathered = packed.gather(values, fill=jnp.nan)
    return packed.restore(gathered), packed.restore(gathered, count=2)


def check(groups, active, packed):
    """What holds for any packing without filling."""
    batch, count = active.shape
    images, total = batch // groups, packed.owner.shape[1]
    source, owner, place, fits = (
        packed.source,
        packed.owner,
        packed.position,
        packed.within_capacity,
    )
    for group in range(groups):
        mine = slice(group * images, (group + 1) * images)
        held = source[group][owner[group] != packing.NOBODY]
        wanted = [
            i * count + t for i in range(images) for t in range(count) if active[mine][i, t]
            and fits[mine][i]
        ]  # fmt: skip
        assert sorted(held.tolist()) == wanted  # each exactly once, and nothing else
        np.testing.assert_array_equal(held // count, owner[group][owner[group] >= 0])
        assert (source[group][owner[group] < 0] == images * count).all()
    for image, token in zip(*np.nonzero(active), strict=True):
        group, local = divmod(image, images)
        if fits[image]:
            assert source[group, place[image, token]] == local * count + token
        else:
            assert place[image, token] == total
    assert (place[~active] == total).all()
    # There and back: placed tokens as they were, zeros for all others.
    values = np.random.default_rng(0).random((batch, count, 2)).astype(np.float32)
    back, first = there_and_back(packed, values)
    np.testing.assert_array_equal(back, values * (active & fits[:, None])[:, :, None])
    np.testing.assert_array_equal(first, back[:, :2])


@functools.partial(jax.jit, static_argnums=(1, 2))
def ladder(active, groups, widths):
    runs = packing.assign_buckets(active.sum(axis=1, dtype=jnp.int32).reshape(groups, -1), widths)
    return runs, packing.pack(active, runs)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def rows_of(active, groups, rows, width):
    runs = packing.rows(active.sum(axis=1, dtype=jnp.int32).reshape(groups, -1), rows, width)
    return runs, packing.pack(active, runs)


@functools.partial(jax.jit, static_argnums=(2, 3))
def filled(active, extra, groups, capacity):
    runs = packing.assign_buckets(
        active.sum(axis=1, dtype=jnp.int32).reshape(groups, -1), (capacity,)
    )
    return packing.pack(active, runs, extra)


@hypothesis.given(batch=batches(), widths=st.sampled_from([(8,), (3, 8), (2, 6, 9, 12)]))
def test_a_ladder_places_as_many_images_as_is_possible(batch, widths):
    groups, active = batch
    runs, packed = jax.device_get(ladder(active, groups, widths))
    check(groups, active, packed)
    lengths = active.sum(axis=1).reshape(groups, -1)
    images = lengths.shape[1]
    for group in range(groups):
        every = [w for w in widths for _ in range(images // len(widths))]
        mine = np.asarray(lengths[group])
        assert np.asarray(runs.within_capacity[group]).sum() == best_assignment(
            mine.tolist(), every
        )
        room = np.asarray(runs.room[group])
        assert (
            room[np.asarray(runs.within_capacity[group])]
            >= mine[np.asarray(runs.within_capacity[group])]
        ).all()


@hypothesis.given(batch=batches(), size=st.sampled_from([(2, 13), (3, 20), (6, 24)]))
def test_rows_are_packed_first_fit_longest_first(batch, size):
    groups, active = batch
    rows, width = size
    runs, packed = jax.device_get(rows_of(active, groups, rows, width))
    check(groups, active, packed)
    lengths = active.sum(axis=1).reshape(groups, -1)
    for group in range(groups):
        expected = first_fit(np.asarray(lengths[group]).tolist(), rows, width)
        for image, where in expected.items():
            assert bool(runs.within_capacity[group, image]) == (where is not None)
            if where is not None:
                assert int(runs.start[group, image]) == where[0] * width + where[1]


@hypothesis.given(batch=batches(), capacity=st.sampled_from([4, 8, 12]))
def test_extra_tokens_lie_behind_the_active_ones_as_far_as_there_is_room(batch, capacity):
    groups, active = batch
    extra = np.random.default_rng(1).random(active.shape) < 0.3
    packed = jax.device_get(filled(active, extra, groups, capacity))
    place, fits = packed.position, packed.within_capacity
    np.testing.assert_array_equal(fits, active.sum(1) <= capacity)
    for image in range(len(active)):
        expected = [*np.flatnonzero(active[image]), *np.flatnonzero(extra[image] & ~active[image])]
        expected = expected[:capacity] if fits[image] else []
        held = [t for t in range(TOKENS) if place[image, t] < packed.owner.shape[1]]
        assert sorted(held, key=lambda t: place[image, t]) == expected


def test_unequal_parts_are_refused():
    with pytest.raises(ValueError, match="5 images cannot be cut into 2 equal parts"):
        packing.assign_buckets(jnp.ones((1, 5), jnp.int32), (4, 8))
