"""Sizes of layouts for the token counts of a batch: everything fits, with little room left over."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from msvit_jax import flops
from msvit_jax.benchmark.options import DENSE, Options
from msvit_jax.errors import UserError
from msvit_jax.tokens import grid, plan

_BUDGETS = 8  # different ones in a batch, at most
_MULTIPLE = 8  # budgets and widths of rows are multiples of this,
_BUCKET = 16  # and of this where each is a program of its own, at batch 1
_WIDTHS = np.arange(1.5, 4.01, 0.25)  # of rows that are tried, in mean lengths of an image


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A layout's sizes for one batch.

    Attributes:
      attributes: of the model.
      places: tokens that are computed, for the whole batch.
      active: of those, how many are active.
    """

    attributes: Mapping[str, Any]
    places: int
    active: int


def size_layout(layout: str, model: nn.Module, counts: np.ndarray, options: Options) -> Sizes:
    """Chooses a layout's sizes from the counts; sizes that the options give come first.

    Args:
      layout: "dense" or a layout.
      model: the mixed-scale model.
      counts: [B] active patch tokens.
      options: may give sizes.

    Raises:
      UserError: the given sizes are not possible.
    """
    batch, active = counts.size, int(counts.sum())
    most = _most(model)
    if layout == DENSE:
        return Sizes({}, batch * most, batch * most)
    if layout == "slots":
        return Sizes({"layout": layout}, batch * most, active)
    if layout == "rows":
        rows = _rows(model, counts, options)
        attributes = {"layout": layout, "rows": rows.rows, "row_width": rows.width}
        active += batch * model.backbone.prefix_length
        return Sizes(attributes, rows.rows * rows.width, active)
    multiple = _BUCKET if batch == 1 else _MULTIPLE
    parts = plan.largest_part(batch, _BUDGETS)
    budget = options.budget or plan.ladder(counts, parts, multiple, most)
    if batch % len(budget):
        raise UserError(
            f"A batch of {batch} cannot be cut into {len(budget)} equal parts, one for each of "
            f"the budgets {budget}; give a number of budgets that divides the batch."
        )
    return Sizes({"layout": layout, "budget": budget}, batch * sum(budget) // len(budget), active)


def _most(model: nn.Module) -> int:
    """Patch tokens of an image that is all fine."""
    return grid.REGION**2 * model.gate_grid[0] * model.gate_grid[1]


def _rows(model: nn.Module, counts: np.ndarray, options: Options) -> plan.RowPlan:
    vit = model.backbone
    least = _most(model) + vit.prefix_length
    if options.row_width is None:
        mean = counts.mean() + vit.prefix_length
        tried = {plan.round_up(mean * times, _MULTIPLE) for times in _WIDTHS}
        widths = {least, *(width for width in tried if width > least)}
    elif options.row_width < least:
        raise UserError(
            f"row_width={options.row_width} is too small: an image can need {least} places (all "
            "fine, prefix included); give that or more."
        )
    else:
        widths = {options.row_width}
    if options.rows is not None:
        if options.row_width is None:
            raise UserError("--rows goes with --row_width.")
        return plan.RowPlan(options.rows, options.row_width)

    def cost(width: int) -> float:
        return float(flops.block(width, vit.width, vit.mlp_hidden))

    return plan.cheapest_rows(counts, vit.prefix_length, widths, cost)
