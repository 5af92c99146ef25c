"""Which images run together in which static shape: bookkeeping on the host, no arrays of pixels.

Images wait with the number of tokens that they need. A policy names the next call: a compiled shape
and an image for each place of its batch. A call leads to answers, or some of its images are put
back (what did not fit) and wait again.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from msvit_jax.tokens.plan import first_fit

PADDING = -1

Waiting = Mapping[int, int]  # number of an image -> its active patch tokens, in order of arrival


@dataclasses.dataclass(frozen=True)
class Shape:
    """A static shape that a batch can be run in.

    Attributes:
      layout: of the model.
      batch: images.
      tokens: places for active patch tokens of each image; in "rows", as in "slots", an image may
        need the whole grid.
      macs: multiply-accumulates of a call, with what it computes in vain.
      rows: "rows": number of rows.
      row_width: "rows": tokens of a row.
      groups: "rows": parts of the batch that are packed on their own, one on each device.
      prefix: "rows": tokens that an image has beside its active patch tokens.
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
        """For people."""
        size = {"budget": f" {self.tokens}", "rows": f" {self.rows} x {self.row_width}"}
        return self.layout + size.get(self.layout, "")


@dataclasses.dataclass(frozen=True)
class Call:
    """A shape and, for each place of its batch, the number of an image or `PADDING`."""

    shape: Shape
    places: tuple[int, ...]

    @property
    def images(self) -> list[int]:
        """Numbers of the images, without padding."""
        return [image for image in self.places if image != PADDING]


class Policy(Protocol):
    """Decides what runs next."""

    @property
    def shapes(self) -> Sequence[Shape]:
        """All that it uses; any batch of images fits into the last one."""
        ...

    def call(self, waiting: Waiting, *, last: bool) -> Call | None:
        """Returns the next call.

        Args:
          waiting: at least one image.
          last: no more images will come. Without it the answer may be to wait for more (None).
        """
        ...


class Buckets:
    """One budget for a call: images run with those that need about as many tokens.

    A call is made as soon as one bucket fills a batch, so few images wait at a time. What is left
    at the end is run from the largest downwards: the fewest calls, and the cheapest.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        """Takes shapes that grow in `tokens`."""
        self.shapes = shapes
        self._sizes = [shape.tokens for shape in shapes]

    def call(self, waiting: Waiting, *, last: bool) -> Call | None:
        """See `Policy`."""
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
    """The first images, as many as the batch takes, and padding."""
    taken = images[: shape.batch]
    return Call(shape, (*taken, *[PADDING] * (shape.batch - len(taken))))


class Rows:
    """A batch of images as they come, in the compiled shape with the fewest rows that hold them."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        """Takes shapes that grow in `rows` and are alike in all else."""
        self.shapes = shapes

    def call(self, waiting: Waiting, *, last: bool) -> Call | None:
        """See `Policy`."""
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
        return Call(shape, tuple(self._places(images, order)))

    def _places(self, images: Sequence[int], order: Sequence[Sequence[int]]) -> Iterator[int]:
        """Group by group the images, then padding, which may remain without room in the rows."""
        for group in order:
            yield from (images[position] for position in group)
            yield from [PADDING] * (self.shapes[-1].batch // len(order) - len(group))


class Cheapest:
    """Buckets while images keep coming; what is left at the end in the cheaper of both ways.

    A few images left over would fill a budget's batch with padding; they need few rows.
    """

    def __init__(self, buckets: Buckets, rows: Rows) -> None:
        """Takes the two policies."""
        self._buckets, self._rows = buckets, rows
        self.shapes = (*rows.shapes, *buckets.shapes)

    def call(self, waiting: Waiting, *, last: bool) -> Call | None:
        """See `Policy`."""
        call = self._buckets.call(waiting, last=False)
        if call is not None or not last:
            return call
        plans = [list(plan(policy, waiting)) for policy in (self._buckets, self._rows)]
        return min(plans, key=lambda calls: sum(call.shape.macs for call in calls))[0]


def plan(policy: Policy, waiting: Waiting) -> Iterator[Call]:
    """All calls that a policy would make for the images that wait."""
    left = dict(waiting)
    while left:
        call = policy.call(left, last=True)
        assert call is not None
        for image in call.images:
            del left[image]
        yield call


def deal(lengths: np.ndarray, groups: int, room: int) -> list[list[int]]:
    """Deals images to groups, the longest first, each to the least loaded one with room.

    Args:
      lengths: [n] tokens of the images.
      groups: number of groups.
      room: images that a group takes at most.

    Returns:
      For each group the positions of its images in `lengths`.
    """
    order: list[list[int]] = [[] for _ in range(groups)]
    load = np.zeros(groups, int)
    for image in np.argsort(-lengths, kind="stable").tolist():
        group = min((g for g in range(groups) if len(order[g]) < room), key=load.__getitem__)
        load[group] += lengths[image]
        order[group].append(image)
    return order


class Queue:
    """Images that wait for their answers."""

    def __init__(self, policy: Policy) -> None:
        """Starts empty."""
        self._policy = policy
        self._waiting: dict[int, int] = {}
        self._again: list[int] = []

    def add(self, image: int, tokens: int) -> None:
        """Lets an image wait."""
        self._waiting[image] = tokens

    def put_back(self, image: int) -> None:
        """Lets an image wait that did not fit where it should have: it will run where all do."""
        self._again.append(image)

    def next(self, *, last: bool) -> Call | None:
        """Takes the images of the next call out.

        Args:
          last: no more images will come.

        Returns:
          None where it is better to wait for more, or none wait.
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
