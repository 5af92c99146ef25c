"""Augmentations against what NumPy computes from their definitions."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from msvit_jax.data import augment

PIXELS = load_sample_images().images[1][100:164, 200:264].copy()


def operate(name, strength, sign=1, pixels=PIXELS):
    return np.asarray(augment.OPERATIONS[name](Image.fromarray(pixels), strength, sign))


def gray(pixels):
    """ITU-R 601 luma, as Pillow rounds it."""
    weights = np.array([19595, 38470, 7471])
    return ((pixels.astype(np.int64) @ weights + 0x8000) >> 16).astype(float)


def test_invert():
    np.testing.assert_array_equal(operate("invert", 0.5), 255 - PIXELS)


@pytest.mark.parametrize(("strength", "bits"), [(0.0, 4), (0.5, 2), (0.9, 1), (1.0, 1)])
def test_posterize_keeps_fewer_bits_the_stronger_it_is(strength, bits):
    expected = PIXELS >> (8 - bits) << (8 - bits)
    np.testing.assert_array_equal(operate("posterize", strength), expected)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_solarize_inverts_what_is_bright(strength):
    threshold = 256 - int(256 * strength)
    expected = np.where(threshold > PIXELS, PIXELS, 255 - PIXELS)
    np.testing.assert_array_equal(operate("solarize", strength), expected)


def test_solarize_add_brightens_what_is_dark():
    expected = np.where(PIXELS < 128, np.minimum(PIXELS.astype(int) + 55, 255), PIXELS)
    np.testing.assert_array_equal(operate("solarize_add", 0.5), expected)


def test_auto_contrast_stretches_each_channel():
    low, high = PIXELS.min((0, 1)).astype(float), PIXELS.max((0, 1)).astype(float)
    expected = ((PIXELS - low) * 255 / (high - low)).clip(0, 255)
    assert np.abs(operate("auto_contrast", 0.5) - expected).max() <= 1


def test_equalize_flattens_the_histogram():
    got = operate("equalize", 0.5)
    for channel in range(3):
        cumulative = (
            np.cumsum(np.bincount(got[..., channel].ravel(), minlength=256)) / got[..., 0].size
        )
        before = (
            np.cumsum(np.bincount(PIXELS[..., channel].ravel(), minlength=256)) / got[..., 0].size
        )
        uniform = (np.arange(256) + 1) / 256
        assert np.abs(cumulative - uniform).mean() < 0.5 * np.abs(before - uniform).mean()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", ["color", "contrast", "brightness"])
def test_enhancers_blend_with_their_degenerate_image(name, sign):
    factor = max(0.1, 1 + 0.9 * 0.8 * sign)
    degenerate = {
        "color": gray(PIXELS)[..., None],
        "contrast": np.floor(gray(PIXELS).mean() + 0.5),
        "brightness": 0.0,
    }[name]
    expected = (degenerate + factor * (PIXELS - degenerate)).clip(0, 255)
    assert np.abs(operate(name, 0.8, sign) - expected).max() <= 1


def test_sharpness_blends_with_a_smoothed_image():
    """Pillow's SMOOTH kernel is 3 x 3 ones with a 5 in the middle, over 13."""
    padded = PIXELS.astype(float)
    shifts = [np.roll(padded, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    smooth = (sum(shifts) + 4 * padded) / 13
    expected = (smooth + 1.45 * (padded - smooth)).clip(0, 255)
    assert np.abs(operate("sharpness", 0.5) - expected)[1:-1, 1:-1].max() <= 1.5


@pytest.mark.parametrize("sign", [-1, 1])
def test_translations_move_by_their_share_and_fill_with_the_mean_color(sign):
    # 0.45 * strength of 64 pixels: 8 of them.
    strength = 8 / 64 / 0.45
    across, down = (operate(f"translate_{axis}", strength, sign) for axis in "xy")
    moved = slice(0, -8) if sign > 0 else slice(8, None)
    origin = slice(8, None) if sign > 0 else slice(0, -8)
    uncovered = slice(-8, None) if sign > 0 else slice(0, 8)
    np.testing.assert_array_equal(across[:, moved], PIXELS[:, origin])
    np.testing.assert_array_equal(down[moved], PIXELS[origin])
    assert (across[:, uncovered] == augment.MEAN_COLOR).all()
    assert (down[uncovered] == augment.MEAN_COLOR).all()


@pytest.mark.parametrize("axis", ["x", "y"])
def test_shears_move_rows_in_proportion(axis):
    """A vertical edge leans by 0.3 pixels a row at full strength."""
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 40:] = 255
    edge = edge if axis == "x" else edge.swapaxes(0, 1).copy()
    got = operate(f"shear_{axis}", 1.0, 1, edge)
    got = got if axis == "x" else got.swapaxes(0, 1)
    for row in (0, 20, 60):
        place = np.argmax(got[row, : 64 - int(0.3 * row) - 2, 0] > 127)
        assert abs(place - (40 - 0.3 * row)) <= 1


def test_rotation_by_thirty_degrees_moves_a_dot_as_geometry_says():
    dot = np.zeros((65, 65, 3), np.uint8)
    dot[31:34, 51:54] = 255  # 20 right of the center
    got = operate("rotate", 1.0, 1, dot)[..., 0].astype(float)
    got[(operate("rotate", 1.0, 1, dot) == augment.MEAN_COLOR).all(-1)] = 0
    rows, columns = np.indices(got.shape)
    place = np.array([(columns * got).sum(), (rows * got).sum()]) / got.sum() - 32
    # Counter-clockwise on the screen, where y points down.
    np.testing.assert_allclose(place, [20 * np.cos(np.pi / 6), -10], atol=0.3)


def test_zero_strength_leaves_geometry_and_enhancers_alone():
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        np.testing.assert_array_equal(operate(name, 0.0), PIXELS)
    for name in ("color", "contrast", "brightness", "sharpness", "solarize", "solarize_add"):
        np.testing.assert_array_equal(operate(name, 0.0), PIXELS)


def test_rand_augment_applies_half_of_its_draws(monkeypatch):
    applied = []

    def record(image, strength, sign):
        applied.append((strength, sign))
        return image

    monkeypatch.setattr(augment, "OPERATIONS", dict.fromkeys(augment.OPERATIONS, record))
    rng = np.random.default_rng(0)
    for _ in range(500):
        same = augment.rand_augment(PIXELS, 4, 5.0, 1.0, rng)
    np.testing.assert_array_equal(same, PIXELS)
    strengths, signs = np.array(applied).T
    assert abs(len(applied) / 2000 - 0.5) < 0.05
    assert abs(strengths.mean() - 0.5) < 0.01
    assert abs(strengths.std() - 0.1) < 0.01
    assert abs(signs.mean()) < 0.1


def test_rand_augment_draws_every_operation():
    images = [
        augment.rand_augment(PIXELS, 1, 9.0, 0.0, np.random.default_rng(seed))
        for seed in range(600)
    ]
    different = {image.tobytes() for image in images}
    # 15 operations, those with a direction twice, and the untouched image.
    directed = ("rotate", "color", "contrast", "brightness", "sharpness")
    directed += ("shear_x", "shear_y", "translate_x", "translate_y")
    assert len(augment.OPERATIONS) == 15
    assert len(different) == 15 + len(directed) + 1


def test_shift_is_pad_and_crop():
    padded = np.pad(PIXELS, ((3, 3), (3, 3), (0, 0)), mode="edge")
    crops = {padded[y : y + 64, x : x + 64].tobytes() for y in range(7) for x in range(7)}
    rng = np.random.default_rng(0)
    seen = {augment.shift(PIXELS, 3, rng).tobytes() for _ in range(600)}
    assert seen == crops


def test_flip_mirrors_half_of_the_time():
    rng = np.random.default_rng(0)
    flipped = [not (augment.flip(PIXELS, rng) == PIXELS).all() for _ in range(400)]
    assert 0.4 < np.mean(flipped) < 0.6
    mirrored = next(
        out for out in (augment.flip(PIXELS, rng) for _ in range(20)) if (out != PIXELS).any()
    )
    np.testing.assert_array_equal(mirrored[:, 5], PIXELS[:, -6])


def test_color_jitter_stays_within_its_strength():
    flat = np.full((4, 4, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    values = np.array([augment.color_jitter(flat, 0.2, rng)[0, 0, 0] for _ in range(300)])
    # A flat gray image has no contrast or saturation to change: brightness alone shows.
    assert values.min() >= 79
    assert values.max() <= 120
    assert values.std() > 8


def test_erasing_fills_one_rectangle_of_the_right_size():
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(300):
        erased = augment.random_erasing(PIXELS, 0.5, rng)
        changed = (erased != PIXELS).any(-1)
        if changed.any():
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert box.mean() > 0.98  # noise may hit the old value now and then
            areas.append(box.size / changed.size)
    assert abs(len(areas) / 300 - 0.5) < 0.1
    assert min(areas) > 0.015
    assert max(areas) < 0.36
    assert abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.03
