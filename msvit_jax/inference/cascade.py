"""Early exit that saves time: one call of a Predictor with a cascade.

Every stage is a program with a fixed batch size. Images whose exit is not certain enough wait, with
the arrays that the stage passes on kept on the devices, until they fill a batch of the next stage:

    images --> stage 0 --> certain? --> answer
                  | no
                  v
               waiting images and rows --> stage 1 --> certain? --> answer ...
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from msvit_jax.exits import exit_thresholds
from msvit_jax.inference.executables import ExecutableCache
from msvit_jax.inference.images import ImageSource
from msvit_jax.inference.pool import ImagePool
from msvit_jax.inference.predictions import check_finite
from msvit_jax.inference.schedule import PADDING
from msvit_jax.models.dvt import Exit

_ON_THE_WAY = 2  # calls in flight before the answers of the oldest are read


@dataclasses.dataclass
class _Waiting:
    """Images that wait for a stage, fewer than a batch.

    Attributes:
      numbers: Indices of the images, in the order of `rows`.
      rows: Arrays that the previous stage passed on for the images, padded to a whole batch, on
        the devices.
    """

    numbers: list[int] = dataclasses.field(default_factory=list)
    rows: Any = None


class CascadeJob:
    """The images of one call: those waiting for each stage, running ones, and the answers.

    Attributes:
      logits: [N, classes] float32, logits of the exit at which each image left.
      exit_index: [N] int32, the exit at which each image left, from 0.
      certainty: [N, stages], certainty of the exits that were computed; zero for later ones.
    """

    def __init__(
        self, executables: ExecutableCache, stages: int, thresholds: Sequence[float], count: int
    ) -> None:
        """Creates a job without images.

        Args:
          executables: Compiled functions of the model.
          stages: Number of stages of the cascade.
          thresholds: Certainty at which an image leaves, for each exit; the last may be omitted
            (see `thresholds.check`).
          count: Total number of images.
        """
        self._executables, self._stages = executables, stages
        self._thresholds = exit_thresholds.check(thresholds, stages)
        self._images = ImagePool(executables, stages)
        self._waiting = [_Waiting() for _ in range(stages)]
        self._full: collections.deque[tuple[int, list[int], Any]] = collections.deque()
        self._on_the_way: collections.deque[tuple[int, list[int], Exit]] = collections.deque()
        self.logits = np.zeros((count, *executables.answer_shape), np.float32)
        self.exit_index = np.zeros(count, np.int32)
        self.certainty = np.zeros((count, stages))

    def run(self, source: ImageSource, answered: Callable[[list[int]], Any]) -> None:
        """Answers all images.

        Args:
          source: Source of the images, in order.
          answered: Callback that gets the indices of newly answered images.
        """
        chunks: Iterator[tuple[Sequence[int], np.ndarray]] | None = source.chunks(
            self._executables.batch
        )
        while True:
            if self._full:
                self._start(*self._full.popleft())
            elif chunks is not None:
                chunk = next(chunks, None)
                if chunk is None:
                    chunks = None
                else:
                    numbers, images = chunk
                    self._images.add(numbers, self._executables.upload(images))
                    self._start(0, list(numbers), None)
            elif self._on_the_way:
                answered(self._finish())
            else:
                stage = next((s for s, w in enumerate(self._waiting) if w.numbers), None)
                if stage is None:
                    return
                waiting, self._waiting[stage] = self._waiting[stage], _Waiting()
                self._start(stage, waiting.numbers, waiting.rows)
            if len(self._on_the_way) > _ON_THE_WAY:
                answered(self._finish())

    def _start(self, stage: int, numbers: list[int], handed: Any) -> None:
        """Starts a batch on the devices; its answers are read later."""
        padding = [PADDING] * (self._executables.batch - len(numbers))
        batch = self._images.batch_of([*numbers, *padding])
        done = self._executables.run_stage(stage, batch, handed)
        self._on_the_way.append((stage, numbers, done))

    def _finish(self) -> list[int]:
        """Reads the answers of the oldest batch; returns the indices of the images that leave."""
        stage, numbers, done = self._on_the_way.popleft()
        logits = np.asarray(jax.device_get(done.logits))[: len(numbers)]
        check_finite(logits)
        certain = exit_thresholds.certainty(logits[:, None])[:, 0]
        self.logits[numbers], self.certainty[numbers, stage] = logits, certain
        stays = certain < self._thresholds[stage]  # never at the last exit
        leaving = [number for number, stay in zip(numbers, stays, strict=True) if not stay]
        self.exit_index[leaving] = stage
        self._images.drop(leaving)
        if stays.any():
            self._carry(stage + 1, numbers, np.flatnonzero(stays), done.handed)
        return leaving

    def _carry(self, stage: int, numbers: list[int], staying: np.ndarray, handed: Any) -> None:
        """Adds images to those waiting for a stage; a full batch of them will run next."""
        waiting, size = self._waiting[stage], self._executables.batch
        together = waiting.numbers + [numbers[row] for row in staying]
        # Waiting rows, then the new batch's rows; split into one full batch and the remainder.
        index = np.zeros(2 * size, np.int32)
        index[: len(together)] = [*range(len(waiting.numbers)), *(size + staying)]
        old = handed if waiting.rows is None else waiting.rows
        first, rest = self._executables.carry(stage, old, handed, index)
        if len(together) < size:
            self._waiting[stage] = _Waiting(together, first)
        else:
            self._full.append((stage, together[:size], first))
            self._waiting[stage] = _Waiting(together[size:], rest if len(together) > size else None)
