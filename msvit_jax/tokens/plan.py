"""Sizes of layouts for token counts that are known: plain NumPy, on the host.

Layouts have static shapes, so their sizes are chosen before compilation, from counts that a model
has shown on a sample or that a benchmark forces. Lengths include the prefix tokens, counts do not.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Sizes of the "rows" layout.

    Attributes:
      rows: for the whole batch.
      width: tokens of a row, prefix tokens included.
    """

    rows: int
    width: int


def largest_part(batch: int, most: int = 8) -> int:
    """The largest number of equal parts, `most` or fewer, that a batch can be cut into."""
    return max(parts for parts in range(1, most + 1) if batch % parts == 0)


def round_up(value: float, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return math.ceil(value / multiple) * multiple


def fitting_capacities(
    counts: ArrayLike, parts: int, multiple: int = 1, most: int | None = None
) -> tuple[int, ...]:
    """The smallest budgets that hold these counts: one for each of equal parts of the sorted batch.

    Args:
      counts: [B] active patch tokens of the images.
      parts: number of budgets; divides B.
      multiple: budgets are rounded up to multiples of this,
      most: but never beyond this, the tokens of an image that is all fine.

    Returns:
      Ascending budgets, not all different where the counts are alike.

    Raises:
      ValueError: the batch cannot be cut into so many parts.
    """
    ordered = np.sort(np.asarray(counts))
    if parts < 1 or not ordered.size or ordered.size % parts:
        raise ValueError(f"{ordered.size} images cannot be cut into {parts} equal parts.")
    largest = ordered.reshape(parts, -1)[:, -1]
    rounded = (round_up(count, multiple) for count in largest)
    return tuple(int(budget if most is None else min(budget, most)) for budget in rounded)


def first_fit(lengths: ArrayLike, width: int) -> np.ndarray:
    """The row that each image goes to: longest first, each into the first row with room.

    The order is that of `packing.rows`, which does the same under jit in a given number of rows.

    Args:
      lengths: [B] tokens of the images, none above `width`.
      width: tokens of a row.

    Returns:
      [B] int.

    Raises:
      ValueError: an image is longer than a row.
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


def row_plan(counts: ArrayLike, prefix: int, width: int) -> RowPlan:
    """The fewest rows of this width that first-fit packs the images into.

    Args:
      counts: [B] active patch tokens of the images.
      prefix: tokens that each image has besides.
      width: tokens of a row.
    """
    return RowPlan(int(first_fit(np.asarray(counts) + prefix, width).max()) + 1, width)


def cheapest_rows(
    counts: ArrayLike, prefix: int, widths: Iterable[int], cost: Callable[[int], float]
) -> RowPlan:
    """The cheapest of the row plans for several widths; the narrowest of equals.

    Args:
      counts: [B] active patch tokens of the images.
      prefix: tokens that each image has besides.
      widths: to try.
      cost: of a row of a width, e.g. multiply-accumulates.
    """
    plans = [row_plan(counts, prefix, width) for width in sorted(widths)]
    return min(plans, key=lambda plan: plan.rows * cost(plan.width))
