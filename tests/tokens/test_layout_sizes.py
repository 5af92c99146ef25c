"""Sizes of layouts: they hold what they are made for, the device agrees, and none is smaller."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msvit_jax.tokens import layout_sizes, packing

pack_rows = jax.jit(packing.rows, static_argnums=(1, 2))
counts_of = st.lists(st.integers(4, 16), min_size=1, max_size=12)


@given(counts_of, st.data(), st.sampled_from([1, 4, 8]))
def test_ladder_holds_each_part_and_nothing_smaller_does(counts, data, multiple):
    parts = data.draw(st.sampled_from([p for p in range(1, 13) if len(counts) % p == 0]))
    capacities = layout_sizes.fitting_capacities(counts, parts, multiple, most=16)
    assert len(capacities) == parts
    assert list(capacities) == sorted(capacities)
    need = [max(part) for part in np.split(np.sort(counts), parts)]
    for capacity, least in zip(capacities, need, strict=True):
        assert least <= capacity < least + multiple
        assert capacity % multiple == 0 or capacity == 16


def test_a_part_of_a_ladder_is_not_beyond_the_grid():
    assert layout_sizes.fitting_capacities([190, 196], 2, 24, most=196) == (192, 196)
    assert layout_sizes.fitting_capacities([190, 196], 2, 24) == (192, 216)


@hypothesis.settings(max_examples=15)
@given(st.lists(st.integers(4, 16), min_size=8, max_size=8))
def test_rows_hold_all_images_on_the_device_and_one_row_less_does_not(counts):
    lengths = jnp.asarray(counts, jnp.int32)[None] + 1
    rows = layout_sizes.row_sizes(counts, 1, 30)
    placed = pack_rows(lengths, rows.rows, 30)
    assert placed.within_capacity.all()
    np.testing.assert_array_equal(layout_sizes.first_fit(lengths[0], 30), placed.start[0] // 30)
    if rows.rows > 1:
        assert not pack_rows(lengths, rows.rows - 1, 30).within_capacity.all()


@given(counts_of, st.sets(st.integers(18, 60), min_size=1))
def test_cheapest_rows_by_hand(counts, widths):
    best = layout_sizes.cheapest_rows(counts, 1, widths, lambda width: 10.0 * width + width**2)
    price = {w: layout_sizes.row_sizes(counts, 1, w).rows * (10.0 * w + w**2) for w in widths}
    assert best.width == min(w for w in widths if price[w] == min(price.values()))
    assert best == layout_sizes.row_sizes(counts, 1, best.width)


@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (12, 6), (32, 8), (7, 7), (11, 1)])
def test_parts_of_a_batch(batch, parts):
    assert layout_sizes.largest_part(batch, 8) == parts


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match="7 images cannot be cut into 2"):
        layout_sizes.fitting_capacities([5] * 7, 2)
    with pytest.raises(ValueError, match="21 tokens does not fit a row of 20"):
        layout_sizes.first_fit([3, 21], 20)
