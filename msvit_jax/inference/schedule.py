"""Decides which images run together in which static shape: bookkeeping on the CPU, without pixels.

Images wait with the number of tokens that they need. A policy chooses the next call: a compiled
shape and an image for each position of its batch. Images that did not fit are put back and wait
again.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from msvit_jax.tokens.layout_sizes import first_fit

PADDING = -1

Waiting = Mapping[int, int]  # number of an image -> its active patch tokens, in order of arrival


@dataclasses.dataclass(frozen=True)
class Shape:
    """A static shape that a batch can be run in.

    Attributes:
      layout: Layout of the model: "slots", "budget", "rows", or "dense" for a model without a gate.
      batch: Number of images.
      tokens: Capacity in active patch tokens per image; the whole grid in "rows" and "slots".
      macs: Multiply-accumulates of a call, padding included.
      rows: Number of rows; only for "rows".
      row_width: Tokens per row; only for "rows".
      groups: Number of parts of the batch that are packed separately, one on each device.
      prefix: Tokens per image in addition to its active patch tokens; only for "rows".
    """

    layout: str
    batch: int
    tokens: int
    macs: float
    rows: int = 0
    row_width: int = 0
    groups: int = 1
    prefix: int = 0

    @property
    def name(self) -> str:
        """Display name."""
        size = {"budget": f" {self.tokens}", "rows": f" {self.rows} x {self.row_width}"}
        return self.layout + size.get(self.layout, "")


@dataclasses.dataclass(frozen=True)
class Call:
    """A shape and, for each position of its batch, the number of an image or `PADDING`."""

    shape: Shape
    images_at: tuple[int, ...]

    @property
    def images(self) -> list[int]:
        """Numbers of the images, without padding."""
        return [image for image in self.images_at if image != PADDING]


class Policy(Protocol):
    """Decides which images run next, and in which shape."""

    @property
    def shapes(self) -> Sequence[Shape]:
        """All shapes that the policy uses; any batch of images fits into the last one."""
        ...

    def call(self, waiting: Waiting, *, last: bool) -> Call | None:
        """Returns the next call.

        Args:
          waiting: Waiting images, at least one.
          last: Whether no more images will come. If False, the result may be None: wait for more.
        """
        ...


class Buckets:
    """Runs images of similar token counts together, with one capacity per call.

    A call is made as soon as one bucket holds a full batch, so few images wait at a time. Images
    left at the end are run in descending order of bucket, which needs the fewest and cheapest
    calls.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        """Takes shapes in ascending order of `tokens`."""
        self.shapes = shapes
        self._sizes = [shape.tokens for shape in shapes]

    def call(self, waiting: Waiting, *, last: bool) -> Call | None:
        """Returns the next call; see `Policy`."""
        buckets: list[list[int]] = [[] for _ in self.shapes]
        for image, tokens in waiting.items():
            buckets[bisect.bisect_left(self._sizes, tokens)].append(image)
        for shape, images in zip(self.shapes, buckets, strict=True):
            if len(images) >= shape.batch:
                return _call(shape, images)
        if not last:
            return None
        largest = max(bucket for bucket, images in enumerate(buckets) if images)
        down = [image for images in reversed(buckets) for image in images]
        return _call(self.shapes[largest], down)


def _call(shape: Shape, images: Sequence[int]) -> Call:
    """A call of the first images, at most a batch of them, and padding."""
    taken = images[: shape.batch]
    return Call(shape, (*taken, *[PADDING] * (shape.batch - len(taken))))


class Rows:
    """Runs images in order of arrival, in the compiled shape with the fewest rows that fit them."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        """Takes shapes in ascending order of `rows` that agree in everything else."""
        self.shapes = shapes

    def call(self, waiting: Waiting, *, last: bool) -> Call | None:
        """Returns the next call; see `Policy`."""
        batch = self.shapes[-1].batch
        if len(waiting) < batch and not last:
            return None
        images = list(waiting)[:batch]
        largest = self.shapes[-1]
        lengths = np.asarray([waiting[image] for image in images]) + largest.prefix
        order = deal(lengths, largest.groups, batch // largest.groups)
        held = [first_fit(lengths[group], largest.row_width) for group in order if group]
        rows = largest.groups * (1 + max(int(row.max()) for row in held))
        shape = next(shape for shape in self.shapes if shape.rows >= rows)
        return Call(shape, tuple(self._dealt(images, order)))

    def _dealt(self, images: Sequence[int], order: Sequence[Sequence[int]]) -> Iterator[int]:
        """Yields the images of each group, then its padding, for which rows may lack room."""
        for group in order:
            yield from (images[position] for position in group)
            yield from [PADDING] * (self.shapes[-1].batch // len(order) - len(group))


class Cheapest:
    """Uses buckets for full batches, and the cheaper of buckets and rows for what is left.

    A few remaining images would leave most of a bucket's batch empty, but need few rows.
    """

    def __init__(self, buckets: Buckets, rows: Rows) -> None:
        """Combines two policies."""
        self._buckets, self._rows = buckets, rows
        self.shapes = (*rows.shapes, *buckets.shapes)

    def call(self, waiting: Waiting, *, last: bool) -> Call | None:
        """Returns the next call; see `Policy`."""
        call = self._buckets.call(waiting, last=False)
        if call is not None or not last:
            return call
        plans = [list(plan(policy, waiting)) for policy in (self._buckets, self._rows)]
        return min(plans, key=lambda calls: sum(call.shape.macs for call in calls))[0]


def plan(policy: Policy, waiting: Waiting) -> Iterator[Call]:
    """Yields all calls that a policy would make for the waiting images."""
    left = dict(waiting)
    while left:
        call = policy.call(left, last=True)
        assert call is not None
        for image in call.images:
            del left[image]
        yield call


def deal(lengths: np.ndarray, groups: int, room: int) -> list[list[int]]:
    """Distributes images to groups, the longest first, each to the least loaded one with room.

    Args:
      lengths: [n], number of tokens of each image.
      groups: Number of groups.
      room: Upper bound on the number of images in a group.

    Returns:
      The indices into `lengths` of each group's images.
    """
    order: list[list[int]] = [[] for _ in range(groups)]
    load = np.zeros(groups, int)
    for image in np.argsort(-lengths, kind="stable").tolist():
        group = min((g for g in range(groups) if len(order[g]) < room), key=load.__getitem__)
        load[group] += lengths[image]
        order[group].append(image)
    return order


class Queue:
    """Images that wait to be run."""

    def __init__(self, policy: Policy) -> None:
        """Creates an empty queue."""
        self._policy = policy
        self._waiting: dict[int, int] = {}
        self._again: list[int] = []

    def add(self, image: int, tokens: int) -> None:
        """Adds an image with its number of tokens."""
        self._waiting[image] = tokens

    def put_back(self, image: int) -> None:
        """Adds an image that did not fit its shape; it will run in the last, which fits any."""
        self._again.append(image)

    def next(self, *, last: bool) -> Call | None:
        """Removes the images of the next call from the queue.

        Args:
          last: Whether no more images will come.

        Returns:
          The next call; None if none wait or the policy waits for more images.
        """
        if self._waiting:
            call = self._policy.call(self._waiting, last=last)
        elif self._again and last:
            call = _call(self._policy.shapes[-1], self._again)
            del self._again[: call.shape.batch]
        else:
            call = None
        if call is not None:
            for image in call.images:
                self._waiting.pop(image, None)
        return call
