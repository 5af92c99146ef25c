"""Crops and resizes encoded images for the pipeline; `image_files` opens and decodes."""

import functools
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from msvit_jax.data import image_files
from msvit_jax.data.image_files import Box, ImageError, Resize, Size, height_and_width
from msvit_jax.errors import UserError


def resize_opencv(rgb: Image.Image, box: Box, size: Size) -> np.ndarray:
    """Resizes by bicubic interpolation over 4 x 4 pixels, without antialiasing.

    It is several times faster than `resize_pillow`. tf.data's default does not antialias either.
    JPEGs are decoded at a reduced scale first, which leaves factors below 2.
    """
    left, upper, right, lower = (round(edge) for edge in box)
    cut = np.asarray(rgb.crop((left, upper, right, lower)))
    shape = height_and_width(size)[::-1]
    return import_opencv().resize(cut, shape, interpolation=import_opencv().INTER_CUBIC)


RESIZES: dict[str, Resize] = {"pillow": image_files.resize_pillow, "opencv": resize_opencv}


@functools.cache
def import_opencv() -> Any:
    """Returns the optional module `cv2`, limited to one thread, or raises with install help."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "data.resize='opencv' needs OpenCV: pip install opencv-python-headless, or use "
            "data.resize='pillow'."
        ) from error
    cv2.setNumThreads(1)  # the pipeline's workers already run in parallel
    return cv2


def random_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """Draws the box of a random resized crop (Szegedy et al. 2015, as in torchvision).

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height; its logarithm is uniformly distributed.
        rng: Random generator.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return _largest_center_box(width, height, ratio)


def _largest_center_box(width: int, height: int, ratio: tuple[float, float]) -> Box:
    w, h = min(width, height * ratio[1]), min(height, width / ratio[0])
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


@image_files.guarded()
def decode_mask(
    encoded: bytes | np.ndarray, size: Size, fraction: float, exif_orientation: bool = True
) -> np.ndarray:
    """Decodes a segmentation mask, cropped as in evaluation, by nearest pixel: uint8 [h, w].

    Raises:
        ImageError: The mask is not an image, is damaged, or has several channels.
    """
    opened = image_files.open_image(encoded, exif_orientation)
    mask = opened.image
    if mask.mode not in ("L", "P", "1"):
        raise ImageError(f"a segmentation mask needs one channel of class numbers, not {mask.mode}")
    if opened.turn is not None:
        mask = mask.transpose(opened.turn)
    box = image_files.center_box(*mask.size, fraction, size)
    shape = height_and_width(size)[::-1]
    return np.asarray(mask.resize(shape, Image.Resampling.NEAREST, box=box), np.uint8)


@image_files.guarded()
def decode_mask_values(encoded: bytes, exif_orientation: bool = True) -> np.ndarray:
    """Decodes a segmentation mask at its own size: the numbers of its pixels, [H, W] uint8 or 16.

    A palette does not matter: its indices are the numbers. A mask with three equal channels, as
    some tools write gray ones, is read as one.

    Raises:
        ImageError: The mask is not an image, is damaged, or its pixels are colors.
    """
    opened = image_files.open_image(encoded, exif_orientation)
    mask = opened.image if opened.turn is None else opened.image.transpose(opened.turn)
    if mask.mode.startswith("I"):
        values = np.asarray(mask)
        if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise ImageError("its pixels are no numbers of classes, from 0 to 65535")
        return values.astype(np.uint16)
    if mask.mode in ("L", "P", "1"):
        return np.asarray(mask).astype(np.uint8)
    if mask.mode == "RGB":
        values = np.asarray(mask)
        if (values == values[..., :1]).all():
            return values[..., 0]
        raise ImageError(
            "its pixels are colors, not numbers of classes; prepare it with --classes=FILE, whose "
            "palette says which color is which class"
        )
    raise ImageError(f"a segmentation mask needs one channel of class numbers, not {mask.mode}")


def unreadable(example: dict[str, Any], error: Exception) -> UserError:
    """The error for an image that cannot be decoded."""
    return UserError(
        f"Cannot read the image of {example['name']}: {error}. Replace or remove it and prepare "
        "the data set again (msvit_jax.data.prepare --on_error=skip leaves such files out)."
    )


def read_file(
    path: str | pathlib.Path, size: Size, fraction: float, exif_orientation: bool = True
) -> np.ndarray:
    """Reads an image file as in evaluation: its central box of `size`'s shape, resized to that.

    Args:
        path: Path of the file.
        size: Side of the result in pixels, or its (height, width).
        fraction: Share of the box's sides that is kept, see `image_files.center_box`.
        exif_orientation: Whether the image is rotated upright by its EXIF data.

    Raises:
        UserError: The file is missing or cannot be decoded; the message names it.
    """
    try:
        return image_files.read_image(path, size, fraction, exif_orientation)
    except ImageError as error:
        name = image_files.shown(path)
        raise UserError(f"The image '{name}' cannot be read: {error}.") from error
