"""One call of a Predictor: runs images in compiled shapes and collects answers in their order."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from msvit_jax import data
from msvit_jax.inference.executables import Answers, Decisions, ExecutableCache
from msvit_jax.inference.images import ImageSource
from msvit_jax.inference.pool import ImagePool
from msvit_jax.inference.predictions import check_finite
from msvit_jax.inference.schedule import PADDING, Call, Policy, Queue
from msvit_jax.models.output import Features
from msvit_jax.tokens import grid

_ON_THE_WAY = 2  # calls in flight before the answers of the oldest are read


@dataclasses.dataclass(frozen=True)
class Decided:
    """Some images, the batch on the devices that begins with them, and the gate's decisions."""

    numbers: Sequence[int]
    batch: Array
    decisions: Decisions | None


def decide_batches(
    executables: ExecutableCache, source: ImageSource, threshold: float | None
) -> Iterator[Decided]:
    """Reads images batch by batch and runs the gate, if any, one batch ahead of its use.

    Args:
      executables: Compiled functions of the model.
      source: Source of the images.
      threshold: Threshold of the gate; None for a model without one.
    """

    def start(chunk: tuple[Sequence[int], np.ndarray]) -> Decided:
        numbers, images = chunk
        batch = executables.upload(images)
        if not executables.gated:
            return Decided(numbers, batch, None)
        return Decided(
            numbers, batch, executables.run_gate(executables.normalized(batch), threshold)
        )

    return data.device_batches(source.chunks(executables.batch), start, depth=1)


class Job:
    """The images of one call: waiting ones, running ones, and the answers."""

    def __init__(self, executables: ExecutableCache, policy: Policy, count: int) -> None:
        """Creates a job without images.

        Args:
          executables: Compiled functions of the model.
          policy: Policy that decides which images run together.
          count: Total number of images.
        """
        self._executables, self._queue = executables, Queue(policy)
        self._grid = policy.shapes[-1].tokens
        self._images = ImagePool(executables, len(policy.shapes))
        self._on_the_way: collections.deque[tuple[Call, Answers]] = collections.deque()
        self._again: set[int] = set()
        self._count = count
        self.logits = np.zeros((count, *executables.answer_shape), np.float32)
        self.tokens = np.zeros(count, np.int32)
        self.coarse: np.ndarray | None = None
        self.probability: np.ndarray | None = None
        self.merge_maps: np.ndarray | None = None
        self.features: Features | None = None

    def run(self, decided: Iterator[Decided], answered: Callable[[list[int]], Any]) -> None:
        """Answers all images.

        Args:
          decided: Batches of images, in order.
          answered: Callback that gets the indices of newly answered images.
        """
        more = True
        while True:
            call = self._queue.next(last=not more)
            if call is not None:
                self._start(call)
                if len(self._on_the_way) > _ON_THE_WAY:
                    answered(self._finish())
            elif more:
                batch = next(decided, None)
                if batch is None:
                    more = False
                else:
                    self._take_in(batch)
            elif self._on_the_way:
                answered(self._finish())
            else:
                return

    def _take_in(self, batch: Decided) -> None:
        """Queues images by their number of tokens."""
        tokens = np.full(len(batch.numbers), self._grid)
        if batch.decisions is not None:
            tokens = self._keep(batch.numbers, jax.device_get(batch.decisions))
        self._images.add(batch.numbers, batch.batch)
        for number, count in zip(batch.numbers, tokens, strict=True):
            self._queue.add(number, int(count))

    def _keep(self, numbers: Sequence[int], decisions: Decisions) -> np.ndarray:
        """Stores decisions; returns the number of tokens of each image."""
        own = list(numbers)
        coarse = np.asarray(decisions.coarse)[: len(numbers)]
        if self.coarse is None or self.probability is None:
            self.coarse = np.ones((self._count, coarse.shape[1]), np.float32)
            self.probability = np.ones_like(self.coarse)
        self.coarse[own] = coarse
        self.probability[own] = np.asarray(decisions.probability)[: len(numbers)]
        return grid.count_tokens(coarse)

    def _start(self, call: Call) -> None:
        """Starts a call on the devices; its answers are read later."""
        positions = [position for position, image in enumerate(call.images_at) if image != PADDING]
        images = self._images.batch_of(call.images_at)
        coarse = None
        if self.coarse is not None:
            coarse = np.ones((len(call.images_at), self.coarse.shape[1]), np.float32)
            coarse[positions] = self.coarse[call.images]
        self._on_the_way.append((call, self._executables.answer(call.shape, images, coarse)))

    def _finish(self) -> list[int]:
        """Reads the answers of the oldest call; returns the indices of the answered images."""
        call, answers = self._on_the_way.popleft()
        logits, tokens, within_capacity, merge_maps, features = jax.device_get(
            (
                answers.logits,
                answers.tokens,
                answers.within_capacity,
                answers.merge_maps,
                answers.features,
            )
        )
        if self.merge_maps is None and merge_maps is not None:
            self.merge_maps = np.zeros((self._count, *merge_maps.shape[1:]), merge_maps.dtype)
        if self.features is None:
            self.features = jax.tree.map(
                lambda x: np.zeros((self._count, *x.shape[1:]), x.dtype), features
            )
        images = np.asarray(call.images_at)
        real = images != PADDING
        done, late = real & within_capacity, images[real & ~within_capacity]
        answered = images[done]
        check_finite(logits[done], jax.tree.map(lambda x: x[done], features))
        self.logits[answered], self.tokens[answered] = logits[done], tokens[done]
        if self.merge_maps is not None:
            self.merge_maps[answered] = merge_maps[done]
        for kept, x in zip(*map(jax.tree.leaves, (self.features, features)), strict=True):
            kept[answered] = x[done]
        numbers = answered.tolist()
        self._images.drop(numbers)
        for number in late.tolist():
            self._put_back(number, call)
        return numbers

    def _put_back(self, image: int, call: Call) -> None:
        if image in self._again:
            raise RuntimeError(
                f"Image {image} was run in {call.shape.name}, where any image fits, and did not."
            )
        self._again.add(image)
        self._queue.put_back(image)
