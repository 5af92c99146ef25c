"""Images of one call on the devices: each is uploaded once, however often programs look at it."""

from collections.abc import Sequence

import numpy as np
from jax import Array

from msvit_jax.inference.executables import ExecutableCache
from msvit_jax.inference.schedule import PADDING


class ImagePool:
    """Keeps uploaded images until they are answered, and makes batches of them on the devices.

    A batch that is used as it was uploaded is not copied. Otherwise its images move into one array
    with a slot for each, from which any batch can be gathered.
    """

    def __init__(self, executables: ExecutableCache, shapes: int) -> None:
        """Makes an empty pool.

        Args:
          executables: Compiled functions of the model.
          shapes: Number of static shapes, in each of which less than a batch of images waits.
        """
        self._executables = executables
        # Besides those that wait: a batch that comes in, and those whose answers are on the way.
        self._capacity = (shapes + 4) * executables.batch
        self._free = list(reversed(range(self._capacity)))
        self._slot_of: dict[int, int] = {}
        # Batches without slots yet; None for images that are gone and whose pixels are still there.
        self._uploaded: list[tuple[list[int | None], Array]] = []
        self._slots: Array | None = None

    def __len__(self) -> int:
        """Number of images that are kept."""
        waiting = [n for numbers, _ in self._uploaded for n in numbers if n is not None]
        return len(self._slot_of) + len(waiting)

    def add(self, numbers: Sequence[int], batch: Array) -> None:
        """Takes in images.

        Args:
          numbers: Indices of the images.
          batch: Batch on the devices that begins with these images, from `ExecutableCache.upload`.
        """
        self._uploaded.append((list(numbers), batch))

    def batch_of(self, images_at: Sequence[int]) -> Array:
        """Returns a batch: [B, S, S, 3] float32, normalized, on the devices.

        Args:
          images_at: Index of an image for each position; `PADDING` for zeros.
        """
        for numbers, batch in self._uploaded:
            padding = (PADDING,) * (len(images_at) - len(numbers))
            if tuple(images_at) == (*numbers, *padding):
                return self._executables.normalized(batch)
        self._store()
        places = {**self._slot_of, PADDING: self._capacity}
        slots = [places[number] for number in images_at]
        return self._executables.take(self._slots, np.asarray(slots, np.int32))

    def drop(self, numbers: Sequence[int]) -> None:
        """Forgets images that have their answers."""
        gone = set(numbers)
        self._free += [self._slot_of.pop(number) for number in gone & self._slot_of.keys()]
        left = [
            ([None if number in gone else number for number in numbers], batch)
            for numbers, batch in self._uploaded
        ]
        self._uploaded = [(numbers, batch) for numbers, batch in left if set(numbers) != {None}]

    def _store(self) -> None:
        for numbers, batch in self._uploaded:
            slots = np.full(self._executables.batch, self._capacity, np.int32)  # padding has none
            for row, number in enumerate(numbers):
                if number is not None:
                    slots[row] = self._slot_of[number] = self._free.pop()
            if self._slots is None:
                self._slots = self._executables.empty_slots(self._capacity, batch)
            self._slots = self._executables.store(self._slots, batch, slots)
        self._uploaded = []
