"""Grids, regions and slots: orders against plain loops, and what must hold for any decisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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


def test_small_squares_are_sorted_by_their_place_in_the_larger_ones():
    image = np.random.default_rng(0).random((2, 12, 18, 3)).astype(np.float32)
    found = grid.subpatches(jnp.asarray(image), 2, 3)
    assert len(found) == 9
    for place, part in enumerate(found):
        y, x = divmod(place, 3)
        expected = [
            [image[:, 6 * r + 2 * y :][:, :2, 6 * c + 2 * x :][:, :, :2] for c in range(3)]
            for r in range(2)
        ]
        expected = np.concatenate([np.concatenate(row, axis=2) for row in expected], axis=1)
        np.testing.assert_array_equal(part, expected)


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
    slots = grid.fill_slots(jnp.asarray(fine), jnp.asarray(token), jnp.asarray(coarse, jnp.float32))
    dense = np.asarray(grid.slots_to_map(slots, jnp.asarray(coarse, jnp.float32), (2, 3)))
    for b in range(2):
        for y in range(4):
            for x in range(6):
                region, cell = y // 2 * 3 + x // 2, y % 2 * 2 + x % 2
                expected = token[b, region] if coarse[b, region] else fine[b, region, cell]
                np.testing.assert_array_equal(dense[b, y, x], expected)


@given(seed=st.integers(0, 1000))
def test_both_scales_hold_the_slots_tokens_in_their_order(seed):
    rng = np.random.default_rng(seed)
    fine, token = rng.random((2, 6, 4, 5)), rng.random((2, 6, 5))
    coarse = jnp.asarray(rng.integers(0, 2, (2, 6)), jnp.float32)
    both = np.asarray(grid.both_scales(jnp.asarray(fine), jnp.asarray(token)))
    slots = np.asarray(grid.fill_slots(jnp.asarray(fine), jnp.asarray(token), coarse))
    pairs = (
        (both, grid.both_weights(coarse), grid.both_areas(coarse)),
        (slots, grid.slot_weights(coarse), grid.slot_areas(coarse)),
    )
    for image in range(2):
        ours, theirs = (
            [np.asarray(x)[image][np.asarray(weights)[image] > 0] for x in (tokens, areas)]
            for tokens, weights, areas in pairs
        )
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_positions_of_the_same_grid_are_untouched_and_smooth_ones_keep_their_shape():
    positions = jax.random.normal(jax.random.key(0), (4, 4, 3))
    assert grid.resize_positions(positions, (4, 4)) is positions
    ramp = jnp.broadcast_to(jnp.linspace(0.0, 1.0, 8)[:, None, None], (8, 8, 2))
    larger = np.asarray(grid.resize_positions(ramp, (16, 12)))
    assert larger.shape == (16, 12, 2)
    steps = np.diff(larger[3:-3, 0, 0])
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.02)


def nearest_then_pooled(image, new):
    """[h, w] by loops: nearest neighbor to whole multiples, then the mean over pooling windows."""
    old, between = image.shape, [-(-n // o) * o for n, o in zip(new, image.shape, strict=True)]
    large = np.empty(between)
    for y in range(between[0]):
        for x in range(between[1]):
            large[y, x] = image[y * old[0] // between[0], x * old[1] // between[1]]
    found = np.empty(new)
    for y in range(new[0]):
        for x in range(new[1]):
            rows, columns = (
                slice(int(np.floor(i * b / n)), int(np.ceil((i + 1) * b / n)))
                for i, b, n in zip((y, x), between, new, strict=True)
            )
            found[y, x] = large[rows, columns].mean()
    return found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((7, 7), (10, 10)),
        ((10, 10), (14, 14)),
        ((4, 6), (6, 8)),
        ((3, 5), (9, 2)),
        ((4, 4), (4, 4)),
    ],
)
@pytest.mark.parametrize("prefix", [0, 2])
def test_upsampling_is_nearest_then_adaptive_average_pooling(old, new, prefix):
    rng = np.random.default_rng(0)
    image, first = rng.standard_normal(old), rng.standard_normal(prefix)
    matrix = grid.grid_upsampling(old, new, prefix)
    assert matrix.dtype == np.float32
    found = matrix @ np.concatenate([first, image.ravel()])
    np.testing.assert_array_equal(found[:prefix], first)
    expected = nearest_then_pooled(image, new)
    np.testing.assert_allclose(found[prefix:].reshape(new), expected, atol=1e-6)


# Column: weight of each row, from the official code.
PUBLISHED_ROWS = {
    (7, 10): "0:1 | 0:.5 1:.5 | 1:2/3 2:1/3 | 2:1 | 2:.5 3:.5 | 3:.5 4:.5 | 4:1 | 4:1/3 5:2/3 | "
    "5:.5 6:.5 | 6:1",
    (10, 14): "0:1 | 0:.5 1:.5 | 1:2/3 2:1/3 | 2:1 | 2:1/3 3:2/3 | 3:.5 4:.5 | 4:1 | 5:1 | "
    "5:.5 6:.5 | 6:2/3 7:1/3 | 7:1 | 7:1/3 8:2/3 | 8:.5 9:.5 | 9:1",
}


@pytest.mark.parametrize("pair", PUBLISHED_ROWS)
def test_upsampling_matrices_are_the_published_ones(pair):
    expected = np.zeros(pair[::-1])
    for row, text in enumerate(PUBLISHED_ROWS[pair].split("|")):
        for entry in text.split():
            column, weight = entry.split(":")
            over, _, under = weight.partition("/")
            expected[row, int(column)] = float(over) / float(under or 1)
    np.testing.assert_allclose(grid.upsampling(*pair), expected, atol=1e-6)


@pytest.mark.parametrize("size", [6, 9, 11])
def test_a_resized_kernel_sees_enlarged_patches_as_it_saw_them_before(size):
    rng = np.random.default_rng(size)
    kernel, patches = rng.normal(size=(5, 5, 3, 4)), rng.normal(size=(7, 5, 5, 3))
    resized = grid.resize_kernel(kernel, size)
    channels = [
        [Image.fromarray(p.astype(np.float32)).resize((size, size), Image.BILINEAR) for p in patch]
        for patch in np.moveaxis(patches, -1, 1)
    ]
    enlarged = np.moveaxis(np.asarray(channels), 1, -1)
    tokens = np.einsum("npqc,pqcd->nd", patches, kernel)
    np.testing.assert_allclose(np.einsum("npqc,pqcd->nd", enlarged, resized), tokens, atol=1e-4)


def test_an_empty_grid_is_told():
    with pytest.raises(ValueError, match="at least 1"):
        grid.upsampling(0, 3)


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (7, 4, 2), (2, 2, 0)])
def test_windows_are_the_squares_at_every_stride(size, stride, padding):
    x = np.random.default_rng(0).random((2, 9, 11, 3)).astype(np.float32)
    found = grid.windows(jnp.asarray(x), size, stride, padding)
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((n + 2 * padding - size) // stride + 1 for n in (9, 11))
    assert found.shape == (2, rows, columns, size * size * 3)
    for y in range(rows):
        for column in range(columns):
            top, left = y * stride, column * stride
            square = padded[:, top : top + size, left : left + size]
            np.testing.assert_array_equal(found[:, y, column], square.reshape(2, -1))


# By PyTorch 2.14.1: timm.layers.resample_abs_pos_embed (1.0.31), interpolate(size=, "bicubic") as
# in transformers, and interpolate(scale_factor=(new + 0.1) / old, "bicubic") as in DINOv2.
_RESIZED = {
    ("timm", 3): "2.70879 5.07281 7.95491 3.7849 5.95724 3.28285 4.86101 6.52288 5.42862",
    ("transformers", 3): "1.73729 5.04518 8.55244 3.68924 6.3623 2.21687 5.64119 6.60283 5.71696",
    ("dinov2", 3): "1.51706 5.35454 7.92855 4.02477 5.99936 3.25986 5.13779 6.36059 5.44666",
    ("timm", 6): "-0.90287 3.5178 7.11793 2.81628 6.41641 10.83708",
    ("transformers", 6): "-1.21136 3.92112 7.27533 2.63786 5.99208 11.12455",
    ("dinov2", 6): "-1.23635 3.7592 7.37425 2.79369 5.50794 10.95104",
}


@pytest.mark.parametrize(("method", "side"), _RESIZED)
def test_positions_are_resized_as_other_projects_do(method, side):
    positions = (jnp.arange(16.0).reshape(4, 4, 1) * 7) % 11
    resized = np.asarray(grid.resize_positions(positions, (side, side), method)).ravel()
    expected = np.array(_RESIZED[method, side].split(), float)
    np.testing.assert_allclose(resized[: expected.size], expected, atol=2e-5)


@pytest.mark.parametrize("method", sorted(grid.RESIZINGS))
def test_even_positions_stay_even_and_the_two_axes_are_apart(method):
    even = jnp.full((5, 5, 2), 3.0)
    np.testing.assert_allclose(grid.resize_positions(even, (8, 3), method), 3.0, rtol=1e-6)
    rows = jnp.broadcast_to(jnp.arange(5.0)[:, None, None], (5, 5, 1))
    resized = np.asarray(grid.resize_positions(rows, (8, 3), method))
    np.testing.assert_allclose(resized, np.broadcast_to(resized[:, :1], (8, 3, 1)), atol=1e-5)
    assert (np.diff(resized[:, 0, 0]) > 0).all()
