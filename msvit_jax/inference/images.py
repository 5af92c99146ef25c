"""Sources of images (arrays or files), checked once and then read a batch at a time."""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax import Array

from msvit_jax import paths
from msvit_jax.data import image_files
from msvit_jax.data.image_files import Found, ImageError, shown
from msvit_jax.errors import UserError, check_choice
from msvit_jax.image_size import ImageSize, height_and_width

File: TypeAlias = str | pathlib.Path
Images: TypeAlias = np.ndarray | Array | Sequence[np.ndarray | Array] | File | Sequence[File]

_NONE = "There are no images to predict: the list is empty."
_NAMED = 8  # most indices or sizes listed in a message
_NORMALIZED_MOST = 4  # pixels beyond this multiple of the greatest normalized value are rejected


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A source of images of one size and type.

    Attributes:
      count: Number of images.
      read: Function that reads a slice of the images: uint8 or float32 [n, h, w, 3]. For files, it
        returns a list with an `ImageError` for each image that cannot be read.
      failed: The reason why each skipped image could not be read, by its index; filled while images
        are read.
    """

    count: int
    read: Callable[[slice], np.ndarray | list[np.ndarray | ImageError]]
    failed: dict[int, str] = dataclasses.field(default_factory=dict)

    def chunks(self, size: int) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yields indices of images and the images themselves, at most `size` at a time."""
        for start in range(0, self.count, size):
            numbers: Sequence[int] = range(start, min(start + size, self.count))
            images = self.read(slice(start, start + size))
            if not isinstance(images, np.ndarray):
                numbers, images = self._readable(numbers, images)
            if len(numbers):
                yield numbers, images

    def _readable(
        self, numbers: Sequence[int], images: list[np.ndarray | ImageError]
    ) -> tuple[list[int], np.ndarray]:
        good = {}
        for number, image in zip(numbers, images, strict=True):
            if isinstance(image, ImageError):
                self.failed[number] = str(image)
            else:
                good[number] = image
        return list(good), np.stack(list(good.values())) if good else np.zeros(0, np.uint8)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Settings for reading images.

    Attributes:
      size: Side of the model's images in px, or their (height, width); arrays must have this size,
        files are cropped and resized to it.
      crop: Share of a file's largest central square, or rectangle of that shape, that is kept.
      exif_orientation: Whether files are rotated upright by their EXIF data.
      on_error: 'stop' at a file that cannot be read, or 'skip' it.
      mean: Means, per channel and for pixels of 0 to 1, that the model normalizes images with;
        None: float images are not checked for normalization.
      std: Standard deviations, per channel and for pixels of 0 to 1; None: as for `mean`.
    """

    size: ImageSize
    crop: float = 1.0
    exif_orientation: bool = True
    on_error: str = "stop"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def open_images(images: Images, how: Reading) -> ImageSource:
    """Checks images and makes them readable.

    Args:
      images: An array [N, H, W, 3] or a sequence of [H, W, 3] arrays: uint8 of 0 to 255, or floats
        that are already normalized; or one or several paths of files.
      how: Size, crop and error handling.

    Raises:
      UserError: There are no images, they have a wrong shape, size or type, NaN pixels or floats
        that are not normalized, or a file is missing and `on_error` is 'stop'.
    """
    check_choice("on_error", how.on_error, ("stop", "skip"))
    if isinstance(images, File):
        images = [images]
    if not hasattr(images, "ndim"):
        images = _as_list(images)
    if hasattr(images, "ndim"):
        return _from_array(np.asarray(images), how)
    if not images:
        raise UserError(_NONE)
    if all(isinstance(image, File) for image in images):
        return _from_files([pathlib.Path(str(path)) for path in images], how)
    if any(isinstance(image, File) for image in images):
        raise UserError("The list holds both paths and arrays; give one or the other.")
    return _from_list([_as_array(image) for image in images], how)


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, Mapping):
        raise UserError(
            f"Images are arrays, or paths of image files, not a {type(images).__name__} with "
            f"{', '.join(map(repr, images))}; give the images of a batch, batch['image']."
        )
    try:
        return list(images)
    except TypeError as error:
        raise UserError(
            f"Images are arrays, or paths of image files, not a {type(images).__name__}."
        ) from error


def _as_array(image: Any) -> np.ndarray:
    if isinstance(image, tuple | list) and len(image) and np.ndim(image[-1]) == 0:
        raise UserError(
            f"The list holds {type(image).__name__}s, as data sets of images and labels do; give "
            "the images alone: [image for image, label in dataset]."
        )
    try:
        array = np.asarray(image)
    except (ValueError, TypeError) as error:
        raise UserError(f"An image is an array [H, W, 3], not a {type(image).__name__}.") from error
    if array.dtype == object:
        raise UserError(f"An image is an array [H, W, 3], not a {type(image).__name__}.")
    return array


def _from_array(images: np.ndarray, how: Reading) -> ImageSource:
    if images.shape[:1] == (0,):
        raise UserError(_NONE)
    if images.ndim != 4:
        hint = " For a single image write images[None]." if images.ndim == 3 else ""
        raise UserError(f"Images must be [N, H, W, 3], not {images.shape}.{hint}")
    _check_shapes([images.shape[1:]], how.size)
    _check_type(images.dtype)
    _check_values(images, how)
    return ImageSource(len(images), lambda part: _as_read(images[part]))


def _from_list(images: list[np.ndarray], how: Reading) -> ImageSource:
    for dtype in {image.dtype for image in images}:
        _check_type(dtype)
    if len({image.dtype == np.uint8 for image in images}) > 1:
        raise UserError("The list mixes uint8 images with normalized float ones; give one kind.")
    _check_shapes([image.shape for image in images], how.size)
    _check_values(images, how)
    return ImageSource(len(images), lambda part: _as_read(np.stack(images[part])))


def _from_files(paths: list[pathlib.Path], how: Reading) -> ImageSource:
    if how.on_error == "stop":
        # Report missing files before the first image is run, not after an hour.
        for path in paths:
            if not os.path.isfile(path):
                raise UserError(f"There is no image file '{shown(path)}'.")

    def read(part: slice) -> list[np.ndarray | ImageError]:
        images = [_read_file(path, how) for path in paths[part]]
        if how.on_error == "stop":
            for path, image in zip(paths[part], images, strict=True):
                if isinstance(image, ImageError):
                    raise UserError(f"The image '{shown(path)}' cannot be read: {image}.")
        return images

    return ImageSource(len(paths), read)


def _read_file(path: pathlib.Path, how: Reading) -> np.ndarray | ImageError:
    try:
        return image_files.read_image(path, how.size, how.crop, how.exif_orientation)
    except ImageError as error:
        return error


def find_unreadable(paths: Sequence[pathlib.Path], how: Reading) -> dict[pathlib.Path, str]:
    """Reads and decodes every file; returns the unreadable ones, each with the reason."""
    read = ((path, _read_file(path, how)) for path in paths)
    return {path: str(image) for path, image in read if isinstance(image, ImageError)}


def _as_read(images: np.ndarray) -> np.ndarray:
    return images if images.dtype == np.uint8 else images.astype(np.float32, copy=False)


def _check_shapes(shapes: Sequence[tuple[int, ...]], size: ImageSize) -> None:
    for shape in shapes:
        if len(shape) == 3 and shape[0] == 3 != shape[-1]:
            raise UserError(
                f"An image must be [H, W, 3], not {shape}: move the channels to the end, for "
                "instance with image.transpose(1, 2, 0)."
            )
        if len(shape) != 3 or shape[-1] != 3:
            raise UserError(
                f"An image must be [H, W, 3], not {shape}; convert gray and RGBA images to RGB, "
                "for instance with PIL's image.convert('RGB')."
            )
    found = sorted({shape[:2] for shape in shapes})
    height, width = height_and_width(size)
    if found == [(height, width)]:
        return
    mixed = "mixed sizes: " if len(found) > 1 else ""
    named = ", ".join(f"{rows} x {columns}" for rows, columns in found[:_NAMED])
    named += ", ..." if len(found) > _NAMED else ""
    raise UserError(
        f"Images of {mixed}{named} px; the model takes {height} x {width}. Give paths of image "
        "files, which are cut and resized, or resize arrays: "
        f"PIL.Image.fromarray(image).resize(({width}, {height}))."
    )


def _check_type(dtype: Any) -> None:
    if dtype == np.uint8 or np.issubdtype(dtype, np.floating) or str(dtype) == "bfloat16":
        return
    raise UserError(
        f"Images of type {dtype}; give uint8 pixels of 0 to 255, or float32 that are normalized "
        "with the model's mean and std."
    )


def _check_values(images: np.ndarray | Sequence[np.ndarray], how: Reading) -> None:
    """Rejects values that cannot be normalized pixels; warns of values that are unlikely to be."""
    floats = [image for image in images if image.dtype != np.uint8]
    if not floats:
        return
    _check_finite(images)
    if how.mean is None or how.std is None:
        return
    mean, std = np.asarray(how.mean), np.asarray(how.std)
    possible = float(np.maximum(np.abs(mean), np.abs(1 - mean)).max() / std.min())
    least = min(float(image.min()) for image in floats)
    greatest = max(float(image.max()) for image in floats)
    remedy = "give uint8 pixels of 0 to 255, or (pixels / 255 - model.mean) / model.std."
    if max(-least, greatest) > _NORMALIZED_MOST * possible:
        raise UserError(
            f"Float images must be normalized: this model's lie within {possible:.3g}, and "
            f"these have values of {least:.4g} to {greatest:.4g}; {remedy}"
        )
    if 0 <= least < greatest <= 1 and mean.min() > 0:
        warnings.warn(
            f"All values of these float images lie within 0 and 1, so they do not seem to be "
            f"normalized; {remedy}",
            stacklevel=6,  # the caller of the Predictor
        )


def _check_finite(images: np.ndarray | Sequence[np.ndarray]) -> None:
    bad = [
        index
        for index, image in enumerate(images)
        if image.dtype != np.uint8 and not np.isfinite(image.astype(np.float32)).all()
    ]
    if bad:
        named = ", ".join(map(str, bad[:_NAMED])) + (", ..." if len(bad) > _NAMED else "")
        which = f"image {named} has" if len(bad) == 1 else f"{len(bad)} images ({named}) have"
        raise UserError(f"NaN or infinite pixels: {which} them. Repair or leave out these images.")


def _local(pattern: str) -> str:
    """The pattern, or, for an address, the path of a local copy of the file or folder."""
    address = "://" in pattern and not os.path.exists(pattern)
    return str(paths.fetch(pattern)) if address else pattern


def find_files(patterns: Sequence[str]) -> Found:
    """Finds image files that are named, lie in a named folder (at any depth), or match a glob.

    Each file appears once, in the order of the patterns. Skipped files are listed as well.

    Raises:
      UserError: A pattern finds nothing; the message names it.
    """
    try:
        return image_files.find([_local(pattern) for pattern in patterns])
    except image_files.NoFilesError as error:
        raise UserError(str(error)) from error
