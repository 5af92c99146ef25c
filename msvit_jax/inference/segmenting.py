"""Whole images through a segmenter: cut into windows, answered, put together again."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from msvit_jax import paths
from msvit_jax.data import image_files
from msvit_jax.data.image_files import ImageError, shown
from msvit_jax.errors import UserError, check_choice
from msvit_jax.inference.images import Reading
from msvit_jax.segmentation import IGNORED, Stitcher, Windows, palette


@dataclasses.dataclass(frozen=True)
class Segmented:
    """The answer for one image.

    Attributes:
      labels: [H, W] uint8, class of each pixel; empty for a file that was skipped.
      tokens: [windows] int32, number of active patch tokens of each window.
      coarse: [windows, rows, columns] bool, True for regions with one coarse token; None for a
        model without a gate.
      coarse_probability: [windows, rows, columns] float32, the gate's probability that a region
        stays coarse; None for a model without a gate.
      merge_maps: [windows, stages, rows, columns] int16, see `Predictions.merge_maps`; None for
        models that do not reduce tokens.
      probabilities: [H, W, classes] float32, if they were asked for.
      failed: Reason why the file was skipped; None otherwise.
    """

    labels: np.ndarray
    tokens: np.ndarray
    coarse: np.ndarray | None = None
    coarse_probability: np.ndarray | None = None
    merge_maps: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    failed: str | None = None


@dataclasses.dataclass
class _Waiting:
    """An image whose windows have not all been answered, or a file that was skipped."""

    stitcher: Stitcher | None
    failed: str | None = None
    answers: list[Any] = dataclasses.field(default_factory=list)


def open_any(images: Any, how: Reading) -> Iterator[np.ndarray | ImageError]:
    """Checks images of any size and reads them one at a time.

    Args:
      images: As in `Predictor.segment`.
      how: Error handling and rotation of files.

    Raises:
      UserError: There are no images, one is no uint8 [H, W, 3], or a file cannot be read and
        `on_error` is 'stop'.
    """
    check_choice("on_error", how.on_error, ("stop", "skip"))
    if isinstance(images, str | pathlib.Path):
        images = [images]
    if isinstance(images, np.ndarray) and images.ndim == 3:
        raise UserError("Give a list of images, or images[None] for a single one.")
    listed = list(images)
    if not listed:
        raise UserError("There are no images to segment: the list is empty.")
    files = [isinstance(image, str | pathlib.Path) for image in listed]
    if any(files) and not all(files):
        raise UserError("The list holds both paths and arrays; give one or the other.")
    if not all(files):
        listed = [_checked(image) for image in listed]
    return (_read(image, how) for image in listed)


def _checked(image: Any) -> np.ndarray:
    array = np.asarray(image)
    if array.ndim == 3 and not array.size:
        raise UserError(f"An image to segment has no pixels: its shape is {array.shape}.")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(
            f"An image to segment is uint8 [H, W, 3], not {array.dtype} {array.shape}; convert "
            "gray and RGBA images to RGB, and give pixels of 0 to 255."
        )
    return array


def _read(image: Any, how: Reading) -> np.ndarray | ImageError:
    if isinstance(image, np.ndarray):
        return image
    try:
        return image_files.decode(image_files.read_bytes(image), how.exif_orientation)
    except ImageError as error:
        if how.on_error == "stop":
            raise UserError(f"The image '{shown(image)}' cannot be read: {error}.") from error
        return error


def segment(
    run: Callable[[np.ndarray], Any],
    images: Iterator[np.ndarray | ImageError],
    windows: Windows,
    *,
    patch_size: int,
    batch: int,
    probabilities: bool,
) -> Iterator[Segmented]:
    """Answers images in their order.

    Args:
      run: Function that answers windows, uint8 [n, S, S, 3], with `Predictions`.
      images: Images of any size, or why they cannot be read.
      windows: How images are looked at.
      patch_size: Side of the model's patches in px.
      batch: Number of windows that run at a time.
      probabilities: Whether answers hold probabilities.

    Yields:
      Answers, in the order of the images.
    """
    waiting: collections.deque[_Waiting] = collections.deque()
    cut: list[np.ndarray] = []
    owners: list[_Waiting] = []

    def answer(count: int) -> Iterator[Segmented]:
        if count:
            found = run(np.stack(cut[:count]))
            for number, owner in enumerate(owners[:count]):
                assert owner.stitcher is not None
                owner.stitcher.add(found.logits[number])
                owner.answers.append((found, number))
            del cut[:count], owners[:count]
        while waiting and (waiting[0].stitcher is None or not waiting[0].stitcher.missing):
            yield _answer(waiting.popleft(), probabilities)

    for image in images:
        if isinstance(image, ImageError):
            waiting.append(_Waiting(None, str(image)))
            continue
        entry = _Waiting(Stitcher(windows, image.shape[:2], patch_size))
        waiting.append(entry)
        for window in windows.cut(image):
            cut.append(window)
            owners.append(entry)
            if len(cut) == batch:
                yield from answer(batch)
    yield from answer(len(cut))


def _answer(entry: _Waiting, probabilities: bool) -> Segmented:
    if entry.stitcher is None:
        return Segmented(np.zeros((0, 0), np.uint8), np.zeros(0, np.int32), failed=entry.failed)

    def stacked(name: str) -> np.ndarray | None:
        rows = [getattr(found, name) for found, _ in entry.answers]
        if rows[0] is None:
            return None
        return np.stack([row[number] for row, (_, number) in zip(rows, entry.answers, strict=True)])

    tokens = stacked("tokens")
    assert tokens is not None
    return Segmented(
        entry.stitcher.labels,
        tokens,
        stacked("coarse"),
        stacked("coarse_probability"),
        stacked("merge_maps"),
        entry.stitcher.probabilities if probabilities else None,
    )


def write_labels(labels: np.ndarray, path: str | pathlib.Path, classes: int) -> None:
    """Writes a label map as a PNG whose numbers are the classes; a palette colors them.

    Args:
      labels: [H, W] uint8.
      path: Path of the file; its folder must exist.
      classes: Number of classes, for the palette.
    """
    image = Image.fromarray(labels, "P")
    colors = np.zeros((IGNORED + 1, 3), np.uint8)
    colors[:classes] = palette(classes)
    image.putpalette(colors.tobytes())
    with paths.parse(path).open("wb") as file, paths.named(path):
        image.save(file, "PNG")


def png_names(files: Sequence[pathlib.Path]) -> list[str]:
    """Returns a name for each file's label map: its own, numbered where several have the same."""
    stems = [shown(file.stem) for file in files]
    counts = collections.Counter(stems)
    return [
        f"{stem}.png" if counts[stem] == 1 else f"{number:05d}_{stem}.png"
        for number, stem in enumerate(stems)
    ]
