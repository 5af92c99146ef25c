"""Crops, scaled decoding and color modes against Pillow and NumPy done the long way."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from msvit_jax.data import decode, image_files

PHOTO = Image.fromarray(load_sample_images().images[0])  # 640 x 427


def encoded(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def test_a_crop_is_resized_as_pillow_does_it_in_two_steps():
    got = image_files.resized_crop(image_files.open_image(encoded(PHOTO)), (100, 50, 300, 250), 64)
    expected = PHOTO.crop((100, 50, 300, 250)).resize((64, 64), Image.Resampling.BICUBIC)
    # box= also looks at the pixels beside the crop, which only its border can show.
    difference = np.abs(got.astype(int) - np.asarray(expected, int))
    assert difference[2:-2, 2:-2].max() <= 1


@pytest.mark.parametrize("divisor", [2, 4])
def test_scaled_decoding_gives_nearly_the_same_picture(divisor):
    jpeg = encoded(PHOTO, "JPEG", quality=95)
    box = (120.0, 20.0, 520.0, 420.0)
    image = image_files.open_image(jpeg)
    got = image_files.resized_crop(image, box, 400 // divisor)
    assert image.image.size == (-(-640 // divisor), -(-427 // divisor))  # was decoded at this scale
    full = Image.open(io.BytesIO(jpeg)).resize(got.shape[:2], Image.Resampling.BICUBIC, box=box)
    assert np.abs(got.astype(int) - np.asarray(full, int)).mean() < 5


def test_large_crops_relative_to_the_size_alone_are_decoded_scaled():
    image = image_files.open_image(encoded(PHOTO, "JPEG"))
    image_files.resized_crop(image, (0.0, 0.0, 399.0, 399.0), 200)
    assert image.image.size == (640, 427)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    gray = PHOTO.convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gray, np.uint16) * 257)
    else:
        image = PHOTO.convert(mode)
    fmt = "TIFF" if mode == "CMYK" else "PNG"
    got = image_files.resized_crop(
        image_files.open_image(encoded(image, fmt)), (0, 0, 400, 400), 100
    )
    source = gray if mode in ("L", "LA", "1", "I;16") else PHOTO
    expected = source.convert("RGB").resize(
        (100, 100), Image.Resampling.BICUBIC, box=(0, 0, 400, 400)
    )
    assert got.shape == (100, 100, 3)
    # A palette and one bit per pixel keep the brightness only roughly.
    limit = {"P": 25, "1": 40}.get(mode, 2)
    assert np.abs(got.astype(int) - np.asarray(expected, int)).mean() < limit


@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.tuples(st.floats(0.05, 0.5), st.floats(0.5, 1.0)),
    st.integers(0, 2**31),
)
def test_random_boxes_lie_inside_and_keep_their_bounds(width, height, scale, seed):
    rng = np.random.default_rng(seed)
    left, top, right, bottom = decode.random_box(width, height, scale, (3 / 4, 4 / 3), rng)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    if min(w, h) > 20 and max(width, height) / min(width, height) < 4 / 3:
        assert 0.98 * 3 / 4 <= w / h <= 4 / 3 / 0.95
        assert scale[0] * 0.95 <= w * h / (width * height) <= scale[1] * 1.05


def test_random_boxes_have_a_uniform_area():
    rng = np.random.default_rng(0)
    boxes = [decode.random_box(1000, 1000, (0.08, 0.5), (3 / 4, 4 / 3), rng) for _ in range(2000)]
    areas = np.array([(r - x) * (b - y) / 1e6 for x, y, r, b in boxes])
    assert abs(areas.mean() - 0.29) < 0.01
    assert abs(areas.var() - (0.42**2) / 12) < 0.002


def test_center_box_is_resize_then_crop():
    size, fraction = 112, 0.875
    box = image_files.center_box(*PHOTO.size, fraction)
    got = np.asarray(PHOTO.resize((size, size), Image.Resampling.BICUBIC, box=box), int)
    resized = PHOTO.resize((round(640 * 128 / 427), 128), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (128 - size) // 2
    two_steps = np.asarray(resized.crop((left, top, left + size, top + size)), int)
    assert np.abs(got - two_steps).mean() < 4


def test_masks_keep_their_class_numbers():
    numbers = np.arange(16, dtype=np.uint8).reshape(4, 4)
    mask = Image.fromarray(numbers.repeat(10, 0).repeat(10, 1))
    np.testing.assert_array_equal(decode.decode_mask(encoded(mask), 8, 1.0)[::2, ::2], numbers)
    np.testing.assert_array_equal(decode.decode_mask(encoded(mask), 2, 0.5), numbers[1:3, 1:3])


def test_a_mask_with_colors_is_refused():
    with pytest.raises(image_files.ImageError, match="one channel of class numbers, not RGB"):
        decode.decode_mask(encoded(PHOTO), 8, 1.0)


def test_opencv_agrees_where_it_is_installed():
    pytest.importorskip("cv2")
    image = image_files.open_image(encoded(PHOTO))
    box = (100.0, 50.0, 356.0, 306.0)
    got = image_files.resized_crop(image, box, 256, decode.resize_opencv)
    np.testing.assert_array_equal(got, np.asarray(PHOTO)[50:306, 100:356])
