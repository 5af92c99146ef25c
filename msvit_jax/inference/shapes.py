"""The static shapes that a Predictor compiles for a model, and the policy that uses them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from msvit_jax.errors import UserError
from msvit_jax.inference.schedule import Buckets, Cheapest, Policy, Rows, Shape
from msvit_jax.tokens import grid
from msvit_jax.train.step import max_tokens

LAYOUTS = ("auto", "slots", "budget", "rows")
_BUCKETS = 10  # about so many, from all coarse to all fine
_LANES = 128  # accelerators compute so many columns at a time


def has_gate(model: Any) -> bool:
    """Whether the model's images have different numbers of tokens."""
    return getattr(model, "gate_grid", None) is not None


def make_policy(
    model: Any,
    *,
    layout: str,
    batch: int,
    groups: int,
    buckets: Sequence[int] | None,
    row_width: int | None,
    most_shapes: int,
) -> Policy:
    """Chooses shapes, and which images go into which.

    Args:
      model: of the registry; one without a gate has a single shape.
      layout: one of `LAYOUTS`.
      batch: images of a call.
      groups: devices; a batch is packed on each of them for itself.
      buckets: budgets in tokens; None: about ten. The whole grid is always one of them.
      row_width: tokens of a row; None: the smallest multiple of 128 that holds any image.
      most_shapes: how many there may be.

    Raises:
      UserError: options that do not fit the model or each other.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r} is none of {', '.join(LAYOUTS)}.")
    if not has_gate(model) or layout == "slots":
        kind, whole = ("slots" if has_gate(model) else "dense"), max_tokens(model)
        return Buckets([Shape(kind, batch, whole, batch * float(model.macs(whole)))])
    by_budget: list[Shape] = []
    if layout != "rows":
        by_budget = _budget_shapes(model, batch, groups, buckets)
    room = most_shapes - len(by_budget)
    missing = (layout != "budget") - room
    if missing > 0:
        raise UserError(
            f"max_programs is too small by {missing} for layout={layout!r} with "
            f"{len(by_budget)} buckets; raise it or give fewer buckets."
        )
    if layout == "budget":
        return Buckets(by_budget)
    rows = Rows(_row_shapes(model, batch, groups, row_width, room))
    return Cheapest(Buckets(by_budget), rows) if by_budget else rows


def _budget_shapes(
    model: Any, batch: int, groups: int, buckets: Sequence[int] | None
) -> list[Shape]:
    least, most = _token_range(model)
    sizes = default_buckets(least, most, model.backbone.prefix_length)
    if buckets is not None:
        for size in buckets:
            if not least <= size <= most:
                raise UserError(
                    f"A bucket of {size} tokens is not possible: an image of this model has "
                    f"{least} to {most} patch tokens."
                )
        sizes = sorted({*buckets, most})
    return [
        Shape("budget", batch, size, batch * float(model.macs(size)), groups=groups)
        for size in sizes
    ]


def default_buckets(least: int, most: int, prefix: int = 0) -> list[int]:
    """Budgets in even steps; a whole sequence is a multiple of 16 tokens, on small grids of 4.

    Args:
      least: patch tokens of an image that is coarse all over.
      most: of one that is fine all over; the last budget.
      prefix: tokens that an image has beside them.
    """
    unit = 16 if most >= 128 else 4
    step = unit * math.ceil((most - least) / _BUCKETS / unit)
    first = step * math.ceil((least + prefix) / step) - prefix
    # A budget just below the last one would be a program for few images and little gain.
    return [*range(first, most - step // 2, step), most]


def _row_shapes(
    model: Any, batch: int, groups: int, row_width: int | None, count: int
) -> list[Shape]:
    """At most `count` shapes, from a row for each device up to the rows that hold any batch."""
    vit, most = model.backbone, _token_range(model)[1]
    largest = most + vit.prefix_length
    width = _LANES * math.ceil(largest / _LANES) if row_width is None else row_width
    if width < largest:
        raise UserError(
            f"row_width={width} is too small: an image of this model needs up to {largest} tokens "
            f"(all of its {most} patches fine, prefix included); use at least that."
        )
    # First-fit leaves no image out of so many rows: each that has no room holds this many images.
    in_a_row = width // largest
    full = math.ceil(batch / groups / in_a_row)
    steps = np.ceil(np.geomspace(full, 1, count) - 1e-9).astype(int)  # the first is always `full`
    # Layers that reduce tokens are counted as if a row were one image.
    ends = float(vit.embed_macs + vit.head_macs)
    one_row, prefix_alone = (
        float(vit.macs(length - vit.prefix_length)) - ends for length in (width, vit.prefix_length)
    )
    fixed = batch * (float(model.macs(0)) - prefix_alone)  # embeddings and heads
    return [
        Shape(
            layout="rows",
            batch=batch,
            tokens=most,
            macs=fixed + groups * rows * one_row,
            rows=groups * rows,
            row_width=width,
            groups=groups,
            prefix=vit.prefix_length,
        )
        for rows in np.unique(steps).tolist()
    ]


def _token_range(model: Any) -> tuple[int, int]:
    """Active patch tokens of an image that is coarse, and of one that is fine, all over."""
    rows, columns = model.gate_grid
    return rows * columns, grid.REGION**2 * rows * columns
