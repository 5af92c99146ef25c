"""Pictures of one image: what is drawn where, checked pixel by pixel."""

import hypothesis
import matplotlib
import numpy as np
import pytest
from hypothesis import strategies as st

from msvit_jax import visualize


def _image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _tokens_of(picture, grid, row, column, parts):
    """The interiors (border taken off) of a region's parts x parts cells."""
    height, width = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    region = picture[row * height : (row + 1) * height, column * width : (column + 1) * width]
    h, w = height // parts, width // parts
    return [
        (slice(y * h + 1, (y + 1) * h - 1), slice(x * w + 1, (x + 1) * w - 1), region)
        for y in range(parts)
        for x in range(parts)
    ]


@hypothesis.given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.sampled_from([2, 3, 4]),
    scale=st.integers(3, 5),
    seed=st.integers(0, 99),
)
def test_fine_interiors_are_the_image_and_coarse_ones_its_pooling(
    rows, columns, patch, scale, seed
):
    grid, size = (rows, columns), 2 * patch
    image = _image(rows * size, columns * size, seed)
    coarse = np.random.default_rng(seed).integers(0, 2, rows * columns)
    picture = visualize.token_map(image, coarse, grid, scale=scale, brightness=1.0)
    assert picture.shape == (image.shape[0] * scale, image.shape[1] * scale, 3)
    assert picture.dtype == np.uint8

    pooled = image.reshape(rows * patch, 2, columns * patch, 2, 3).astype(np.float64).mean((1, 3))
    sources = (
        np.kron(image, np.ones((scale, scale, 1))),
        np.kron(pooled, np.ones((2 * scale, 2 * scale, 1))),
    )
    for region, is_coarse in enumerate(coarse):
        row, column = divmod(region, columns)
        expected = sources[is_coarse]
        parts = 1 if is_coarse else 2
        drawn = _tokens_of(picture, grid, row, column, parts)
        wanted = _tokens_of(expected, grid, row, column, parts)
        for (y, x, got), (_, _, want) in zip(drawn, wanted, strict=True):
            np.testing.assert_allclose(got[y, x], want[y, x], atol=0.5)  # the mean is rounded


def test_only_coarse_regions_are_dimmed():
    image = np.full((16, 16, 3), 200, np.uint8)
    picture = visualize.token_map(image, [1, 0, 0, 0], (2, 2), scale=8, brightness=0.5)
    assert (picture[1:63, 1:63] == 100).all()
    assert (picture[1:31, 65:95] == 200).all()


def test_a_fine_region_shows_four_outlines_and_a_coarse_region_one():
    image = np.zeros((32, 32, 3), np.uint8)
    picture = visualize.token_map(image, [1, 0, 0, 0], (2, 2), scale=4)
    lines = (picture > 0).any(axis=-1)
    # Along a horizontal cut through a cell: both borders of each cell, and nothing between them.
    assert np.flatnonzero(lines[10, :64]).tolist() == [0, 63]
    assert np.flatnonzero(lines[10, 64:]).tolist() == [0, 31, 32, 63]
    assert (picture[0, 0] != picture[0, 64]).any()


def test_small_images_are_enlarged_until_they_can_be_read():
    assert visualize.enlarge(_image(64, 64)).shape == (256, 256, 3)
    assert visualize.enlarge(_image(224, 224)).shape == (448, 448, 3)
    assert visualize.enlarge(_image(300, 512)).shape == (300, 512, 3)


def test_the_heat_is_the_color_of_the_probability_of_fine():
    image = np.full((8, 16, 3), 50, np.uint8)
    picture = visualize.gate_heat_map(image, [0.25, 1.0], (1, 2), scale=1, opacity=0.8)
    for region, p_fine in enumerate([0.75, 0.0]):
        color = 255 * np.array(matplotlib.colormaps["inferno"](p_fine)[:3])
        half = picture[:, 8 * region : 8 * region + 8].reshape(-1, 3)
        np.testing.assert_allclose(half, np.tile(0.8 * color + 0.2 * 50, (64, 1)), atol=0.5)


def test_the_image_shows_through_the_heat():
    image = np.zeros((8, 8, 3), np.uint8)
    image[2, 2] = 255
    picture = visualize.gate_heat_map(image, [0.5], (1, 1), scale=1, opacity=0.6)
    brighter = (picture.astype(int) - picture[0, 0].astype(int)).sum(axis=-1)
    assert np.argwhere(brighter).tolist() == [[2, 2]]


def test_a_strip_holds_the_three_pictures_of_the_gates_columns():
    strip = visualize.gate_strip(_image(64, 64), np.ones(16), np.ones(16), (4, 4), caption="x")
    assert [picture.shape for picture in strip.pictures] == [(256, 256, 3)] * 3
    assert len(visualize.GATE_COLUMNS) == 3


@pytest.mark.parametrize("draw", [visualize.token_map, visualize.gate_heat_map])
def test_inputs_that_do_not_fit_are_named(draw):
    with pytest.raises(ValueError, match=r"shape \(15,\), but a grid of 4 x 4 regions needs \(16,"):
        draw(_image(64, 64), np.zeros(15), (4, 4))
    with pytest.raises(ValueError, match="60 x 64 pixels cannot be cut into 4 x 4 regions"):
        draw(_image(60, 64), np.zeros(16), (4, 4))
    with pytest.raises(ValueError, match=r"uint8 image \[H, W, 3\], got float64"):
        draw(_image(64, 64) / 255, np.zeros(16), (4, 4))


def test_probabilities_are_no_decisions_and_logits_no_probabilities():
    with pytest.raises(ValueError, match="0 and 1 only"):
        visualize.token_map(_image(8, 8), [0.3], (1, 1))
    with pytest.raises(ValueError, match="apply the sigmoid"):
        visualize.gate_heat_map(_image(8, 8), [-2.0], (1, 1))


YELLOW, GRAY = (255, 221, 51), (150, 150, 150)


def _random_hosts(rows, columns, seed):
    """Some patches hold tokens, the others are in one of those or dropped."""
    rng = np.random.default_rng(seed)
    merge_targets = np.arange(rows * columns)
    holds = rng.random(rows * columns) < 0.4
    holds[rng.integers(rows * columns)] = True
    merge_targets[~holds] = rng.choice([-1, *np.flatnonzero(holds)], (~holds).sum())
    return merge_targets.reshape(rows, columns)


def _sides(picture, size, row, column):
    """The lines inside a patch, corners left out."""
    cell = picture[row * size : (row + 1) * size, column * size : (column + 1) * size]
    lines = {(-1, 0): cell[0], (1, 0): cell[-1], (0, -1): cell[:, 0], (0, 1): cell[:, -1]}
    return {side: line[1:-1] for side, line in lines.items()}


@hypothesis.given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 999))
def test_lines_lie_exactly_where_groups_differ_and_frames_around_hosts(rows, columns, seed):
    merge_targets = _random_hosts(rows, columns, seed)
    image = np.full((4 * rows, 4 * columns, 3), 90, np.uint8)
    picture = visualize.merge_map(image, merge_targets, scale=2)
    for row, column in np.ndindex(rows, columns):
        own = merge_targets[row, column]
        for (down, across), line in _sides(picture, 8, row, column).items():
            y, x = row + down, column + across
            inside = 0 <= y < rows and 0 <= x < columns
            if own == row * columns + column:
                assert (line == YELLOW).all()
            elif not inside or merge_targets[y, x] != own:
                assert (line == GRAY).all()
            else:
                assert not (line == GRAY).all()
                assert not (line == YELLOW).all()


@hypothesis.given(rows=st.integers(1, 4), columns=st.integers(1, 4), seed=st.integers(0, 999))
def test_hosts_show_the_image_merged_patches_their_groups_mean_dropped_ones_hardly_anything(
    rows, columns, seed
):
    merge_targets = _random_hosts(rows, columns, seed)
    image = _image(3 * rows, 3 * columns, seed)
    picture = visualize.merge_map(image, merge_targets, scale=3, brightness=0.5).astype(float)
    for row, column in np.ndindex(rows, columns):
        own = merge_targets[row, column]
        inner = picture[9 * row + 1 : 9 * row + 8, 9 * column + 1 : 9 * column + 8]
        cell = image[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        pixels = np.kron(cell, np.ones((3, 3, 1)))[1:-1, 1:-1]
        if own == row * columns + column:
            np.testing.assert_array_equal(inner, pixels)
        elif own < 0:
            np.testing.assert_allclose(inner, 0.12 * pixels, atol=0.5)
        else:
            members = [
                image[3 * y : 3 * y + 3, 3 * x : 3 * x + 3].reshape(-1, 3)
                for y, x in np.argwhere(merge_targets == own)
            ]
            mean = 0.5 * np.concatenate(members).mean(axis=0)
            np.testing.assert_allclose(inner, np.tile(mean, (7, 7, 1)), atol=0.5)


def test_a_coarse_token_is_one_patch():
    # Regions: fine, coarse and a host, coarse and merged, dropped. Cells are counted row by row.
    merge_targets = np.array([[0, 1, 2, 2], [4, 5, 2, 2], [2, 2, -1, -1], [2, 2, -1, -1]])
    image = _image(16, 16)
    picture = visualize.merge_map(image, merge_targets, coarse=[[0, 1], [1, 1]], scale=4)
    assert visualize.count_tokens(merge_targets) == 5
    framed = (picture == YELLOW).all(axis=-1)
    corner = framed[:32, 32:]  # one frame around the region and nothing inside it
    np.testing.assert_array_equal(corner[1:-1, 1:-1], np.zeros((30, 30), bool))
    assert corner[0].all()
    assert corner[-1].all()
    assert corner[:, 0].all()
    assert corner[:, -1].all()
    assert not framed[32:].any()
    pooled = image[:8, 8:].reshape(4, 2, 4, 2, 3).astype(float).mean((1, 3))
    np.testing.assert_allclose(
        picture[1:31, 33:63], np.kron(pooled, np.ones((8, 8, 1)))[1:-1, 1:-1], atol=0.5
    )
    # The merged region has no lines inside, either.
    assert not (picture[33:63, 1:31] == GRAY).all(axis=-1).any()


def test_tokens_are_counted_in_maps_of_any_batch():
    merge_targets = np.stack([_random_hosts(3, 4, seed) for seed in range(6)])
    alive = [len(set(h.reshape(-1).tolist()) - {-1}) for h in merge_targets]
    np.testing.assert_array_equal(visualize.count_tokens(merge_targets), alive)
    np.testing.assert_array_equal(
        visualize.count_tokens(merge_targets.reshape(2, 3, 3, 4)), np.reshape(alive, (2, 3))
    )


@pytest.mark.parametrize(
    ("merge_targets", "message"),
    [
        (np.zeros((3, 3), int), "64 x 64 pixels cannot be cut into 3 x 3 patches"),
        (np.full((2, 2), 4), "name patches that name themselves"),
        (np.full((2, 2), -2), "name patches that name themselves"),
        (np.array([[1, 0]]), "name patches that name themselves"),
        (np.zeros((2, 2)), r"Expected integers \[rows, columns\], got float64"),
        (np.zeros(4, int), r"Expected integers \[rows, columns\], got int64 \(4,\)"),
    ],
)
def test_maps_that_are_none_are_named(merge_targets, message):
    with pytest.raises(ValueError, match=message):
        visualize.merge_map(_image(64, 64), merge_targets)
