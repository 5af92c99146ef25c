"""From encoded bytes to uint8 pixels: crops and resizes that decode no more than they need.

A JPEG is decoded at 1/2, 1/4 or 1/8 of its size (in the DCT domain, at a fraction of the cost)
where the crop then still holds as many pixels as asked for. EXIF orientation is not applied, as in
the pipelines that published ImageNet figures come from.
"""

import functools
import io
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from msvit_jax.errors import UserError

Box = tuple[float, float, float, float]  # left, upper, right, lower in pixels


def open_image(encoded: bytes | np.ndarray) -> Image.Image:
    """Opens an image from its encoded bytes (not decoded yet) or from uint8 [H, W, C] pixels."""
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded)
    return Image.open(io.BytesIO(encoded))


def resized_crop(
    image: Image.Image, box: Box, size: int, resize: "Resize | None" = None
) -> np.ndarray:
    """Cuts a box out of an image and resizes it to uint8 [S, S, 3].

    Args:
        image: as `open_image` returns it.
        box: what to cut, in pixels of the full image.
        size: side of the result.
        resize: one of `RESIZES`; Pillow's by default.
    """
    full = image.size
    _decode_scaled(image, min(box[2] - box[0], box[3] - box[1]), size)
    rgb = to_rgb(image)
    across, down = rgb.width / full[0], rgb.height / full[1]
    box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    # Rounding must not put an edge a hair outside.
    box = (box[0], box[1], min(box[2], rgb.width), min(box[3], rgb.height))
    if rgb.size == (size, size) and box == (0, 0, size, size):
        return np.asarray(rgb)
    return (resize or resize_pillow)(rgb, box, size)


def resize_pillow(rgb: Image.Image, box: Box, size: int) -> np.ndarray:
    """Bicubic with antialiasing, as in the papers' PyTorch recipes."""
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=box))


def resize_opencv(rgb: Image.Image, box: Box, size: int) -> np.ndarray:
    """Bicubic over the nearest four pixels, several times faster than `resize_pillow`.

    Like tf.data's default it does not antialias; scaled decoding leaves it factors below 2.
    """
    left, upper, right, lower = (round(edge) for edge in box)
    cut = np.asarray(rgb.crop((left, upper, right, lower)))
    return import_opencv().resize(cut, (size, size), interpolation=import_opencv().INTER_CUBIC)


Resize = Callable[[Image.Image, Box, int], np.ndarray]
RESIZES: dict[str, Resize] = {"pillow": resize_pillow, "opencv": resize_opencv}


@functools.cache
def import_opencv() -> Any:
    """Returns the optional module `cv2`, held to one thread, or says how to install it."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "data.resize='opencv' needs OpenCV: pip install opencv-python-headless, or use "
            "data.resize='pillow'."
        ) from error
    cv2.setNumThreads(1)  # the pipeline's workers are the parallelism
    return cv2


def _decode_scaled(image: Image.Image, crop: float, size: int) -> None:
    """Asks the JPEG decoder for the smallest scale at which `crop` is still `size` pixels long."""
    if image.format == "JPEG" and crop >= 2 * size:
        factor = crop / size
        image.draft("RGB", (int(image.width / factor), int(image.height / factor)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes; grey, palette, RGBA, CMYK and 16-bit images become RGB (transparency is dropped)."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def centre_box(width: int, height: int, fraction: float) -> Box:
    """Returns the central square whose side is `fraction` of the shorter side.

    Cutting it and resizing it once is the same picture as resizing the short side to
    size / fraction and cutting the centre, at less cost.
    """
    side = min(width, height) * fraction
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """Draws the box of a random resized crop (Szegedy et al. 2015, as torchvision does it).

    Args:
        width: the image's width in pixels.
        height: the image's height in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height; the logarithm is uniform.
        rng: source of the draw.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return _largest_centre_box(width, height, ratio)


def _largest_centre_box(width: int, height: int, ratio: tuple[float, float]) -> Box:
    w, h = min(width, height * ratio[1]), min(height, width / ratio[0])
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def decode_mask(encoded: bytes | np.ndarray, size: int, fraction: float) -> np.ndarray:
    """Decodes a segmentation mask with the evaluation's geometry, nearest pixel: uint8 [S, S]."""
    mask = open_image(encoded)
    if mask.mode not in ("L", "P", "1"):
        raise UserError(f"a segmentation mask needs one channel of class numbers, not {mask.mode}")
    box = centre_box(*mask.size, fraction)
    return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST, box=box), np.uint8)


def unreadable(example: dict[str, Any], error: Exception) -> UserError:
    """The message for an image that cannot be decoded."""
    return UserError(
        f"Cannot read the image of {example['name']}: {error}. Replace or remove it and prepare "
        "the data set again (msvit_jax.data.prepare --on_error=skip leaves such files out)."
    )


# What Pillow raises on truncated, damaged and unknown data.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def read_file(path: str | pathlib.Path, size: int, fraction: float) -> np.ndarray:
    """Reads an image file as evaluation does: its central square, resized to uint8 [S, S, 3].

    Args:
        path: of the file.
        size: side of the result.
        fraction: see `centre_box`.

    Raises:
        UserError: it is missing or cannot be decoded; names it.
    """
    name = str(path)
    try:
        image = open_image(pathlib.Path(path).read_bytes())
        return resized_crop(image, centre_box(*image.size, fraction), size)
    except FileNotFoundError as error:
        raise UserError(f"There is no image file {name!r}.") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name!r} is no image, or one of a format that is not known.") from error
    except DECODE_ERRORS as error:
        raise UserError(f"The image {name!r} cannot be read: {error}.") from error
