"""Sizes of layouts for known token counts, in plain NumPy on the CPU.

Layouts have static shapes, so their sizes are chosen before compilation, from counts measured on a
sample or fixed by a benchmark. Lengths include the prefix tokens, counts do not.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class RowSizes:
    """Sizes of the "rows" layout.

    Attributes:
      rows: Number of rows for the whole batch.
      width: Capacity of a row in tokens, prefix tokens included.
    """

    rows: int
    width: int


def largest_part(batch: int, most: int = 8) -> int:
    """Largest number of equal parts, `most` or fewer, that a batch can be cut into."""
    return max(parts for parts in range(1, most + 1) if batch % parts == 0)


def round_up(value: float, multiple: int) -> int:
    """Rounds up to a multiple."""
    return math.ceil(value / multiple) * multiple


def fitting_capacities(
    counts: ArrayLike, parts: int, multiple: int = 1, most: int | None = None
) -> tuple[int, ...]:
    """Finds the smallest capacities that hold given token counts, one per length bucket.

    The length buckets are equal parts of the batch sorted by token count.

    Args:
      counts: [B], number of active patch tokens of each image.
      parts: Number of length buckets; divides B.
      multiple: Number that capacities are rounded up to multiples of.
      most: Largest capacity, the number of tokens of an image that is all fine; None for no limit.

    Returns:
      Ascending capacities, not all different where the counts are alike.

    Raises:
      ValueError: The batch cannot be cut into that many parts.
    """
    ordered = np.sort(np.asarray(counts))
    if parts < 1 or not ordered.size or ordered.size % parts:
        raise ValueError(f"{ordered.size} images cannot be cut into {parts} equal parts.")
    largest = ordered.reshape(parts, -1)[:, -1]
    rounded = (round_up(count, multiple) for count in largest)
    return tuple(int(capacity if most is None else min(capacity, most)) for capacity in rounded)


def first_fit(lengths: ArrayLike, width: int) -> np.ndarray:
    """Assigns each image to a row: longest first, each to the first row with room.

    The order is that of `packing.rows`, which does the same under jit in a given number of rows.

    Args:
      lengths: [B], number of tokens of each image, none above `width`.
      width: Capacity of a row in tokens.

    Returns:
      [B] int, row of each image.

    Raises:
      ValueError: An image is longer than a row.
    """
    lengths = np.asarray(lengths)
    if lengths.size and lengths.max() > width:
        raise ValueError(f"An image of {lengths.max()} tokens does not fit a row of {width}.")
    filled = np.zeros(lengths.size, int)
    row = np.zeros(lengths.size, int)
    for image in np.argsort(-lengths, kind="stable"):
        row[image] = np.argmax(filled + lengths[image] <= width)
        filled[row[image]] += lengths[image]
    return row


def row_sizes(counts: ArrayLike, prefix: int, width: int) -> RowSizes:
    """Plans the fewest rows of a width that first-fit packs the images into.

    Args:
      counts: [B], number of active patch tokens of each image.
      prefix: Number of prefix tokens of each image.
      width: Capacity of a row in tokens.
    """
    return RowSizes(int(first_fit(np.asarray(counts) + prefix, width).max()) + 1, width)


def cheapest_rows(
    counts: ArrayLike, prefix: int, widths: Iterable[int], cost: Callable[[int], float]
) -> RowSizes:
    """Chooses the cheapest of the row plans for several widths; the narrowest of equals.

    Args:
      counts: [B], number of active patch tokens of each image.
      prefix: Number of prefix tokens of each image.
      widths: Widths of rows to try.
      cost: Function that gives the cost of a row by its width, e.g. multiply-accumulates.
    """
    tried = [row_sizes(counts, prefix, width) for width in sorted(widths)]
    return min(tried, key=lambda sizes: sizes.rows * cost(sizes.width))
