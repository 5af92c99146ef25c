"""Grids, regions and slots: orders against plain loops, and what must hold for any decisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msvit_jax.tokens import grid

sizes = st.integers(1, 4)


@settings(max_examples=8)
@given(rows=sizes, columns=sizes, size=st.integers(1, 3))
def test_patches_are_the_squares_of_the_image(rows, columns, size):
    image = np.random.default_rng(0).random((2, rows * size, columns * size, 3)).astype(np.float32)
    squares = np.asarray(grid.patches(jnp.asarray(image), size))
    for y in range(rows):
        for x in range(columns):
            expected = image[:, y * size : (y + 1) * size, x * size : (x + 1) * size]
            np.testing.assert_array_equal(squares[:, y, x], expected)


def test_an_image_that_is_no_whole_number_of_patches_is_told():
    with pytest.raises(ValueError, match="divisible by 4"):
        grid.patches(jnp.zeros((1, 8, 6, 3)), 4)


@settings(max_examples=8)  # every shape is compiled anew
@given(rows=sizes, columns=sizes)
def test_regions_and_back(rows, columns):
    cells = jax.random.normal(jax.random.key(0), (2, 2 * rows, 2 * columns, 3))
    regions = grid.to_regions(cells)
    assert regions.shape == (2, rows * columns, 4, 3)
    np.testing.assert_array_equal(grid.from_regions(regions, (rows, columns)), cells)
    last = np.asarray(regions[:, -1]).reshape(2, 2, 2, 3)
    np.testing.assert_array_equal(last, cells[:, -2:, -2:])


def test_pooling_is_the_mean_and_bilinear_halving():
    cells = jax.random.normal(jax.random.key(0), (2, 6, 8, 3))
    expected = jax.image.resize(cells, (2, 3, 4, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(grid.pool(cells), expected, atol=1e-6)


@given(seed=st.integers(0, 1000))
def test_slots_hold_each_cell_exactly_once(seed):
    rng = np.random.default_rng(seed)
    coarse = jnp.asarray(rng.integers(0, 2, (3, 6)), jnp.float32)
    weights, areas = grid.slot_weights(coarse), grid.slot_areas(coarse)
    np.testing.assert_array_equal(weights.sum((1, 2)), 24 - 3 * coarse.sum(1))
    np.testing.assert_array_equal(areas.sum(2), 4)  # every region's cells are stood for
    np.testing.assert_array_equal(areas > 0, weights > 0)


@given(seed=st.integers(0, 1000))
def test_filled_slots_and_the_map_back(seed):
    rng = np.random.default_rng(seed)
    fine = rng.random((2, 6, 4, 5)).astype(np.float32)
    token = rng.random((2, 6, 5)).astype(np.float32)
    coarse = rng.integers(0, 2, (2, 6))
    slots = grid.mix_slots(jnp.asarray(fine), jnp.asarray(token), jnp.asarray(coarse, jnp.float32))
    dense = np.asarray(grid.slots_to_map(slots, jnp.asarray(coarse, jnp.float32), (2, 3)))
    for b in range(2):
        for y in range(4):
            for x in range(6):
                region, cell = y // 2 * 3 + x // 2, y % 2 * 2 + x % 2
                expected = token[b, region] if coarse[b, region] else fine[b, region, cell]
                np.testing.assert_array_equal(dense[b, y, x], expected)


def test_gradient_to_a_decision_is_coarse_minus_fine():
    fine, coarse = jnp.full((1, 1, 4, 2), 3.0), jnp.full((1, 1, 2), 5.0)
    decide = lambda m: grid.mix_slots(fine, coarse, m).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(decide)(jnp.zeros((1, 1))), [[2 * (5.0 - 3.0)]])


def test_positions_of_the_same_grid_are_untouched_and_smooth_ones_keep_their_shape():
    positions = jax.random.normal(jax.random.key(0), (4, 4, 3))
    assert grid.resize_positions(positions, (4, 4)) is positions
    ramp = jnp.broadcast_to(jnp.linspace(0.0, 1.0, 8)[:, None, None], (8, 8, 2))
    larger = np.asarray(grid.resize_positions(ramp, (16, 12)))
    assert larger.shape == (16, 12, 2)
    steps = np.diff(larger[3:-3, 0, 0])
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.02)
