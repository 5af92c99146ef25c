"""Images of any size through a model of one: overlapping windows, several scales, mirrored.

An image is looked at in one or several *views*, each of some size, mirrored or not, and each view
in windows of the model's size. A view's logits are the mean over the windows that cover a pixel,
resized to the image; views are averaged as probabilities, as in Segmenter's code.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from msvit_jax.errors import UserError
from msvit_jax.image_size import WANTED, ImageSize, fits, height_and_width, shown
from msvit_jax.segmentation.upsampling import upsample


@dataclasses.dataclass(frozen=True)
class View:
    """One way of looking at an image.

    Attributes:
      size: (height, width) in px that the image is resized to.
      mirrored: Whether it is mirrored left to right.
      corners: (top, left) of each window in px.
    """

    size: tuple[int, int]
    mirrored: bool
    corners: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Windows:
    """How images are looked at.

    Attributes:
      size: Side of a window in px, or its (height, width); the model's image size.
      stride: Largest step between windows in px, or steps (down, across); None for windows that
        only overlap at the end.
      short_side: Short side in px that images are resized to; None for their own size. An image
        smaller than a window is enlarged until the window fits into it.
      scales: Factors of that size, one for each view.
      flip: Whether each view is also looked at mirrored.
    """

    size: ImageSize
    stride: ImageSize | None = None
    short_side: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("stride", self.stride or self.size)):
            if not fits(value):
                raise UserError(f"Windows of {name}={value!r} px: {WANTED} expected.")
        if any(step > side for step, side in zip(self.steps, self.shape, strict=True)):
            raise UserError(
                f"Windows of {shown(self.size)} in steps of {shown(self.steps)} leave pixels out; "
                "use steps that are at most as large."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of a window in px."""
        return height_and_width(self.size)

    @property
    def steps(self) -> tuple[int, int]:
        """Largest steps between windows in px, (down, across)."""
        return height_and_width(self.stride or self.size)

    @classmethod
    def from_config(cls, config: Any) -> "Windows":
        """Returns how a run's evaluation looks at images, from the `data` section of its config."""
        return cls(
            size=config.image_size,
            stride=config.window_stride,
            short_side=config.short_side,
            scales=tuple(config.eval_scales),
            flip=config.eval_flip,
        )

    def views(self, size: tuple[int, int]) -> list[View]:
        """Lists the views of an image of (height, width) px."""
        found = []
        for scale in self.scales:
            scaled = self._scaled(size, scale)
            corners = tuple(itertools.product(self._starts(scaled, 0), self._starts(scaled, 1)))
            found += [
                View(scaled, mirrored, corners) for mirrored in (False, True)[: 1 + self.flip]
            ]
        return found

    def _scaled(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        factor = scale * (1.0 if self.short_side is None else self.short_side / min(size))
        pairs = list(zip(self.shape, size, strict=True))
        factor = max(factor, *(window / side for window, side in pairs))
        height, width = (max(window, round(side * factor)) for window, side in pairs)
        return height, width

    def _starts(self, size: tuple[int, int], axis: int) -> list[int]:
        last = size[axis] - self.shape[axis]
        return [*range(0, last, self.steps[axis]), last]

    def count(self, size: tuple[int, int]) -> int:
        """Counts the windows of an image of (height, width) px."""
        return sum(len(view.corners) for view in self.views(size))

    def cut(self, pixels: np.ndarray, *, nearest: bool = False) -> Iterator[np.ndarray]:
        """Cuts an image into its windows, view by view.

        Args:
          pixels: [H, W, 3] or [H, W] uint8.
          nearest: Whether pixels are repeated or left out where a view has another size, as class
            numbers have to be, instead of interpolated.

        Yields:
          [h, w, 3] or [h, w] uint8, of a window's size.
        """
        height, width = self.shape
        how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
        for view in self.views(pixels.shape[:2]):
            seen = pixels
            if view.size != pixels.shape[:2]:
                seen = np.asarray(Image.fromarray(pixels).resize(view.size[::-1], how))
            seen = seen[:, ::-1] if view.mirrored else seen
            for top, left in view.corners:
                yield seen[top : top + height, left : left + width]


class Stitcher:
    """Puts the logits of an image's windows together."""

    def __init__(self, windows: Windows, size: tuple[int, int], patch_size: int) -> None:
        """Starts without windows.

        Args:
          windows: How the image was cut.
          size: (height, width) of the image in px.
          patch_size: Side of the model's patches in px.
        """
        self._windows, self._size, self._patch = windows, size, patch_size
        ordered = [(view, corner) for view in windows.views(size) for corner in view.corners]
        self._left = list(reversed(ordered))
        self._views = len(windows.views(size))
        self._sum: np.ndarray | None = None
        self._count: np.ndarray | None = None
        self._scores: np.ndarray | None = None

    @property
    def missing(self) -> int:
        """Number of windows that have not been added."""
        return len(self._left)

    def add(self, logits: np.ndarray) -> None:
        """Adds the next window, in the order of `Windows.cut`: [h, w, C] on the patch grid."""
        view, (top, left) = self._left.pop()
        (height, width), classes = self._windows.shape, logits.shape[-1]
        if self._sum is None or self._count is None:
            self._sum = np.zeros((*view.size, classes), np.float32)
            self._count = np.zeros((*view.size, 1), np.float32)
        grid = (logits.shape[0] * self._patch, logits.shape[1] * self._patch)
        here = (slice(top, top + height), slice(left, left + width))
        self._sum[here] += upsample(logits, grid)[:height, :width]
        self._count[here] += 1
        if not self._left or self._left[-1][0] is not view:
            self._finish(view)

    def _finish(self, view: View) -> None:
        assert self._sum is not None
        assert self._count is not None
        logits = self._sum if (self._count == 1).all() else self._sum / self._count
        logits = upsample(logits, self._size)
        logits = logits[:, ::-1] if view.mirrored else logits
        scores = logits if self._views == 1 else softmax(logits) / self._views
        self._scores = scores if self._scores is None else self._scores + scores
        self._sum = self._count = None

    @property
    def labels(self) -> np.ndarray:
        """[H, W] uint8, the most probable class of each pixel, once no window is missing."""
        return self._whole().argmax(axis=-1).astype(np.uint8)

    @property
    def probabilities(self) -> np.ndarray:
        """[H, W, C] float32, probabilities of the classes, once no window is missing."""
        scores = self._whole()
        return softmax(scores) if self._views == 1 else scores

    def _whole(self) -> np.ndarray:
        if self._scores is None or self._left:
            raise ValueError(f"{len(self._left)} windows of the image are missing.")
        return self._scores


def softmax(logits: np.ndarray) -> np.ndarray:
    """Computes the softmax over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
