"""Whatever holds images, checked once and then read a batch at a time."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax import Array

from msvit_jax.data import decode
from msvit_jax.errors import UserError

File: TypeAlias = str | pathlib.Path
Images: TypeAlias = np.ndarray | Array | Sequence[np.ndarray | Array] | File | Sequence[File]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_NAMED = 8  # indices or sizes that a message names


@dataclasses.dataclass(frozen=True)
class Source:
    """Images of one size and type.

    Attributes:
      count: how many.
      read: reads some of them by a slice: uint8 or float32 [n, S, S, 3].
    """

    count: int
    read: Callable[[slice], np.ndarray]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the images one by one."""
        for index in range(self.count):
            yield self.read(slice(index, index + 1))[0]

    def chunks(self, size: int) -> Iterator[tuple[range, np.ndarray]]:
        """Yields the numbers of the next images and the images, `size` at a time."""
        for start in range(0, self.count, size):
            numbers = range(start, min(start + size, self.count))
            yield numbers, self.read(slice(start, start + size))


def open_images(images: Images, *, size: int, crop: float) -> Source:
    """Checks images and makes them readable.

    Args:
      images: an array [N, H, W, 3] or a sequence of [H, W, 3]: uint8 of 0 to 255, or floats that
        are normalised already; or paths of files, or a single one.
      size: side S of the model's images; arrays must have it, files are cut and resized to it.
      crop: share of a file's short side that its central square has.

    Raises:
      UserError: none at all, a wrong shape, size or type, NaN pixels, or a file that is missing.
    """
    if isinstance(images, File):
        images = [images]
    if not hasattr(images, "ndim"):
        images = list(images)
    if len(images) == 0:
        raise UserError("There are no images to predict: the list is empty.")
    if hasattr(images, "ndim"):
        return _from_array(np.asarray(images), size)
    if all(isinstance(image, File) for image in images):
        return _from_files([pathlib.Path(str(path)) for path in images], size, crop)
    if any(isinstance(image, File) for image in images):
        raise UserError("The list holds both paths and arrays; give either the one or the other.")
    return _from_list([np.asarray(image) for image in images], size)


def _from_array(images: np.ndarray, size: int) -> Source:
    if images.ndim != 4:
        hint = " For a single image write images[None]." if images.ndim == 3 else ""
        raise UserError(f"Images must be [N, H, W, 3], not {images.shape}.{hint}")
    _check_shapes([images.shape[1:]], size)
    _check_type(images.dtype)
    _check_finite(images)
    return Source(len(images), lambda part: _as_read(images[part]))


def _from_list(images: list[np.ndarray], size: int) -> Source:
    for dtype in {image.dtype for image in images}:
        _check_type(dtype)
    if len({image.dtype == np.uint8 for image in images}) > 1:
        raise UserError("The list mixes uint8 images with normalised float ones; give one kind.")
    _check_shapes([image.shape for image in images], size)
    _check_finite(images)
    return Source(len(images), lambda part: _as_read(np.stack(images[part])))


def _from_files(paths: list[pathlib.Path], size: int, crop: float) -> Source:
    # Known before the first image is run, not after an hour.
    for path in paths:
        if not path.is_file():
            raise UserError(f"There is no image file {str(path)!r}.")

    def read(part: slice) -> np.ndarray:
        return np.stack([decode.read_file(path, size, crop) for path in paths[part]])

    return Source(len(paths), read)


def _as_read(images: np.ndarray) -> np.ndarray:
    return images if images.dtype == np.uint8 else images.astype(np.float32, copy=False)


def _check_shapes(shapes: Sequence[tuple[int, ...]], size: int) -> None:
    for shape in shapes:
        if len(shape) != 3 or shape[-1] != 3:
            raise UserError(
                f"An image must be [H, W, 3], not {shape}; convert grey and RGBA images to RGB, "
                "for instance with PIL's image.convert('RGB')."
            )
    found = sorted({shape[:2] for shape in shapes})
    if found == [(size, size)]:
        return
    mixed = "mixed sizes: " if len(found) > 1 else ""
    named = ", ".join(f"{height} x {width}" for height, width in found[:_NAMED])
    named += ", ..." if len(found) > _NAMED else ""
    raise UserError(
        f"Images of {mixed}{named} px; the model takes {size} x {size}. Give paths of image files, "
        f"which are cut and resized, or resize arrays: PIL.Image.fromarray(image).resize(({size}, "
        f"{size}))."
    )


def _check_type(dtype: Any) -> None:
    if dtype == np.uint8 or np.issubdtype(dtype, np.floating) or str(dtype) == "bfloat16":
        return
    raise UserError(
        f"Images of type {dtype}; give uint8 pixels of 0 to 255, or float32 that are normalised "
        "with the model's mean and std."
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
        raise UserError(f"NaN or infinite pixels: {which} them. Mend or leave out these images.")


def find_files(patterns: Sequence[str]) -> list[pathlib.Path]:
    """Image files that are named, lie in a named folder (at any depth), or match a glob, sorted.

    Each appears once, in the order of the patterns.

    Raises:
      UserError: a pattern that finds nothing; names it.
    """
    found: dict[pathlib.Path, None] = {}
    for pattern in patterns:
        files = _matching(pattern)
        if not files:
            raise UserError(
                f"{pattern!r} is no file, no folder with images ({', '.join(SUFFIXES)}), and no "
                "glob that matches one."
            )
        found.update(dict.fromkeys(files))
    return list(found)


def _matching(pattern: str) -> list[pathlib.Path]:
    path = pathlib.Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        return sorted(file for file in inside if file.is_file())
    root = pathlib.Path(path.anchor)
    try:
        return sorted(p for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file())
    except ValueError:  # not a pattern that pathlib knows
        return []
