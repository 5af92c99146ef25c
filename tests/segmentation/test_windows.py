"""Windows cover every pixel, stitched answers are the whole image's, and counts are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from msvit_jax import segmentation
from msvit_jax.errors import UserError
from msvit_jax.segmentation import IGNORED, Confusion, MaskClasses, Stitcher, Windows
from msvit_jax.segmentation.windows import softmax

SIDES = st.integers(1, 70)


@given(SIDES, SIDES, st.integers(1, 16), st.sampled_from([None, 20, 40]), st.booleans())
def test_windows_cover_every_pixel_of_every_view(height, width, stride, short_side, flip):
    windows = Windows(16, stride, short_side, scales=(0.5, 1.0), flip=flip)
    views = windows.views((height, width))
    assert len(views) == 2 * (1 + flip)
    for view in views:
        covered = np.zeros(view.size, bool)
        for top, left in view.corners:
            assert 0 <= top <= view.size[0] - 16
            assert 0 <= left <= view.size[1] - 16
            covered[top : top + 16, left : left + 16] = True
        assert covered.all()
    cut = list(windows.cut(np.zeros((height, width, 3), np.uint8)))
    assert len(cut) == windows.count((height, width))
    assert all(window.shape == (16, 16, 3) for window in cut)


def test_an_image_smaller_than_a_window_is_enlarged_until_the_window_fits():
    (view,) = Windows(32).views((8, 24))
    assert view.size == (32, 96)
    (view,) = Windows(32, short_side=16).views((50, 100))
    assert view.size == (32, 64)
    (view,) = Windows((32, 64)).views((40, 20))
    assert view.size == (128, 64)


def test_camvid_s_frames_fit_into_one_window():
    (view,) = Windows((336, 448), short_side=336).views((360, 480))
    assert (view.size, view.corners) == ((336, 448), ((0, 0),))


@pytest.mark.parametrize("size", [(7, 9), (16, 5), (3, 3)])
@pytest.mark.parametrize("new", [(7, 9), (31, 8), (64, 64)])
def test_upsampling_is_jax_s_on_the_cpu_and_on_the_device(size, new):
    x = np.random.default_rng(0).normal(size=(*size, 4)).astype(np.float32)
    if new[0] >= size[0] and new[1] >= size[1]:
        expected = jax.image.resize(x, (*new, 4), "bilinear")
        np.testing.assert_allclose(segmentation.upsample(x, new), expected, rtol=1e-5, atol=1e-6)
    expected = jax.image.resize(x, (size[0] * 4, size[1] * 4, 4), "bilinear")[: size[0] * 4 - 3]
    found = segmentation.upsample_logits(jnp.asarray(x[None]), (size[0] * 4 - 3, size[1] * 4), 4)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)


def stitched(windows, size, logits_of):
    """Stitches what a function of pixels answers, for pixels that name their own position."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    stitcher = Stitcher(windows, size, patch_size=4)
    for window in windows.cut(pixels):
        stitcher.add(logits_of(window))
    return pixels, stitcher


def of_patches(window):
    """Logits [h, w, 5] of patches of 4 px that depend on their own pixels alone."""
    rows, columns = (side // 4 for side in window.shape[:2])
    patches = window.reshape(rows, 4, columns, 4, 3).astype(np.float32).mean(axis=(1, 3)) / 32
    return np.concatenate([patches, patches[..., :2] ** 2], axis=-1)


@pytest.mark.parametrize(("size", "shape"), [(32, (32, 32)), ((16, 40), (16, 40))])
def test_a_window_that_covers_the_image_once_is_the_whole_image(size, shape):
    pixels, stitcher = stitched(Windows(size), shape, of_patches)
    expected = segmentation.upsample_logits(jnp.asarray(of_patches(pixels)[None]), shape, 4)[0]
    np.testing.assert_array_equal(stitcher.labels, np.asarray(expected).argmax(axis=-1))
    np.testing.assert_allclose(
        stitcher.probabilities, jax.nn.softmax(expected, axis=-1), rtol=1e-5, atol=1e-6
    )


def test_overlapping_windows_are_averaged_as_logits():
    """Literally: every pixel's mean over the windows that hold it."""
    windows = Windows(16, stride=8)
    pixels, stitcher = stitched(windows, (24, 40), of_patches)
    total, count = np.zeros((24, 40, 5)), np.zeros((24, 40, 1))
    for top in (0, 8):
        for left in (0, 8, 16, 24):
            window = of_patches(pixels[top : top + 16, left : left + 16])
            total[top : top + 16, left : left + 16] += jax.image.resize(
                window, (16, 16, 5), "bilinear"
            )
            count[top : top + 16, left : left + 16] += 1
    expected = softmax(total / count)
    np.testing.assert_allclose(stitcher.probabilities, expected, rtol=1e-4, atol=1e-6)


def interpolated(x, size):
    """Bilinear resizing, axis by axis, between the centers of cells."""
    for axis, new in enumerate(size):
        old = x.shape[axis]
        at = (np.arange(new) + 0.5) * old / new - 0.5
        x = np.apply_along_axis(lambda column: np.interp(at, np.arange(old), column), axis, x)  # noqa: B023
    return x


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 45), st.integers(1, 45)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.none() | st.tuples(st.integers(4, 20), st.integers(4, 20)),
)
def test_rectangular_windows_are_averaged_and_cover_every_pixel(size, patches, stride):
    """Literally: the image enlarged until the window fits, and every pixel's mean over windows."""
    window = (4 * patches[0], 4 * patches[1])
    stride = stride and (min(stride[0], window[0]), min(stride[1], window[1]))
    windows = Windows(window, stride)
    pixels, stitcher = stitched(windows, size, of_patches)
    factor = max(1.0, window[0] / size[0], window[1] / size[1])
    height, width = (max(w, round(s * factor)) for w, s in zip(window, size, strict=True))
    assert height == window[0] or width == window[1] or (height, width) == size
    enlarged = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    seen = np.asarray(enlarged)
    total, count = np.zeros((height, width, 5)), np.zeros((height, width, 1))
    down, across = stride or window
    for y in range(0, height - window[0] + down, down):
        for x in range(0, width - window[1] + across, across):
            top, left = min(y, height - window[0]), min(x, width - window[1])
            here = (slice(top, top + window[0]), slice(left, left + window[1]))
            total[here] += interpolated(of_patches(seen[here]), window)
            count[here] += 1
    assert count.min() >= 1
    expected = softmax(interpolated(total / count, size))
    np.testing.assert_allclose(stitcher.probabilities, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [0, -4, 1.5, "16", (16, 24, 3), (16,), (0, 16), (16, 2.5), True])
def test_windows_of_no_size_are_refused(size):
    with pytest.raises(UserError, match=r"Windows of size=.* px: one whole number of px"):
        Windows(size)
    if size:
        with pytest.raises(UserError, match=r"Windows of stride="):
            Windows(16, stride=size)


@pytest.mark.parametrize("stride", [25, (8, 25), (17, 8)])
def test_steps_that_leave_pixels_out_are_refused(stride):
    with pytest.raises(UserError, match=r"Windows of 16 x 24 px in steps of .* leave pixels out"):
        Windows((16, 24), stride)


def test_mirrored_views_are_mirrored_back():
    windows = Windows(16, flip=True)
    _, stitcher = stitched(windows, (16, 32), of_patches)
    _, plain = stitched(Windows(16), (16, 32), of_patches)
    # Answers depend on each patch alone and 16 is symmetric: both views answer alike.
    np.testing.assert_allclose(stitcher.probabilities, plain.probabilities, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stitcher.probabilities.sum(axis=-1), 1, rtol=1e-5)


def test_answers_have_the_size_of_the_image():
    for size in ((250, 384), (3, 5), (16, 16)):
        windows = Windows(16, stride=13, short_side=20, scales=(0.75, 1.5), flip=True)
        _, stitcher = stitched(windows, size, of_patches)
        assert stitcher.labels.shape == size
        assert stitcher.probabilities.shape == (*size, 5)
        np.testing.assert_allclose(stitcher.probabilities.sum(axis=-1), 1, rtol=1e-5)


def test_an_unfinished_image_has_no_answer():
    stitcher = Stitcher(Windows(16), (16, 32), 4)
    stitcher.add(np.zeros((4, 4, 5)))
    assert stitcher.missing == 1
    with pytest.raises(ValueError, match="1 windows of the image are missing"):
        _ = stitcher.labels


@pytest.mark.parametrize("classes", [2, 7])
def test_figures_are_those_of_scikit_learn(classes):
    from sklearn import metrics

    rng = np.random.default_rng(classes)
    actual = rng.integers(0, classes, (6, 30, 40))
    predicted = np.where(rng.random(actual.shape) < 0.6, actual, rng.integers(0, classes, 1))
    ignored = rng.random(actual.shape) < 0.2
    confusion = Confusion(classes)
    for mask, answer, none in zip(actual, predicted, ignored, strict=True):
        confusion.add(answer.astype(np.uint8), np.where(none, IGNORED, mask).astype(np.uint8))
    known, found = actual[~ignored], predicted[~ignored]
    matrix = metrics.confusion_matrix(known, found, labels=range(classes))
    np.testing.assert_array_equal(confusion.counts, matrix)
    figures = confusion.figures()
    jaccard = metrics.jaccard_score(known, found, average=None, labels=range(classes))
    np.testing.assert_allclose(list(figures["iou"].values()), 100 * jaccard)
    assert figures["miou"] == pytest.approx(100 * jaccard.mean())
    assert figures["pixel_accuracy"] == pytest.approx(100 * (known == found).mean())
    recall = metrics.recall_score(known, found, average="macro", labels=range(classes))
    assert figures["mean_accuracy"] == pytest.approx(100 * recall)


def test_classes_that_are_nowhere_and_images_without_classes_do_not_count():
    confusion = Confusion(3)
    confusion.add(np.zeros((4, 4), np.uint8), np.full((4, 4), IGNORED, np.uint8))
    nothing = confusion.figures()
    assert np.isnan(nothing["miou"])
    assert np.isnan(nothing["pixel_accuracy"])
    confusion.add(np.asarray([[0, 1]]), np.asarray([[0, 0]]))
    figures = confusion.figures(("a", "b", "c"))
    assert figures["iou"] == {"a": 50.0, "b": 0.0, "c": None}
    assert figures["miou"] == 25.0


def test_values_become_classes_and_others_are_named():
    classes = MaskClasses(("road", "sky"), first=1, ignored=0)
    found = segmentation.to_classes(np.asarray([[0, 1], [2, 1]], np.uint8), classes)
    np.testing.assert_array_equal(found, [[IGNORED, 0], [1, 0]])
    with pytest.raises(ValueError, match=r"value 3, 9; the 2 classes are 1 to 2, and 0 is ignored"):
        segmentation.to_classes(np.asarray([[9, 3]], np.uint16), classes)
    with pytest.raises(ValueError, match="ignored value 1 is a class's"):
        MaskClasses(("a", "b"), ignored=1)
    with pytest.raises(ValueError, match="0 classes"):
        MaskClasses(())
