"""Chooses sizes of layouts for a batch's token counts: everything fits, with little padding."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from msvit_jax import config as configs
from msvit_jax import flops
from msvit_jax.benchmark import forced
from msvit_jax.benchmark.options import DENSE, REDUCED, Options
from msvit_jax.errors import UserError
from msvit_jax.models.interface import ImageModel
from msvit_jax.tokens import grid, layout_sizes
from msvit_jax.train import capacity_schedule

_CAPACITIES = 8  # most capacities in a batch
_MULTIPLE = 8  # capacities and row widths are multiples of this
_BUCKET = 8  # capacities at batch 1, each with its own program, are multiples of this
_SEEN = 8192  # images whose counts the trainer's schedule observes
_WIDTHS = np.arange(1.5, 4.01, 0.25)  # row widths to try, in multiples of an image's mean length


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A layout's sizes for one batch.

    Attributes:
      attributes: Attributes of the model that set the sizes.
      computed: Number of tokens computed for the whole batch, padding included.
      active: Number of active tokens among them.
    """

    attributes: Mapping[str, Any]
    computed: int
    active: int


def size_layout(layout: str, model: ImageModel, counts: np.ndarray, options: Options) -> Sizes:
    """Chooses a layout's sizes; sizes in the options take precedence.

    "budget" and "rows" are just large enough for the counts. "trimmed" gets the trainer's sizes,
    which do not depend on the batch, so a few images may not fit.

    Args:
      layout: "dense" or the name of a layout.
      model: The dynamic model.
      counts: [B], number of active patch tokens of each image.
      options: Options of the benchmark, which may set sizes.

    Raises:
      UserError: The given sizes are not possible.
    """
    batch, active = counts.size, int(counts.sum())
    if layout == REDUCED:
        return Sizes({}, active, active)
    most = model.max_tokens
    if layout == DENSE:
        return Sizes({}, batch * most, batch * most)
    if layout == "slots":
        # To train a gate, both scales of every region are computed.
        carried = model.max_capacity if options.train and model.gate == "mlp" else most
        return Sizes({"layout": layout}, batch * carried, active)
    if layout == "rows":
        rows = _rows(model, counts, options)
        attributes = {"layout": layout, "rows": rows.rows, "row_width": rows.width}
        active += batch * model.backbone.prefix_length
        return Sizes(attributes, rows.rows * rows.width, active)
    token_capacity = options.token_capacity
    if layout == "trimmed":
        token_capacity = token_capacity or schedule(model, batch, options).capacities
    elif not token_capacity:
        multiple = _BUCKET if batch == 1 else _MULTIPLE
        token_capacity = layout_sizes.fitting_capacities(
            counts, layout_sizes.largest_part(batch, _CAPACITIES), multiple, most
        )
    if batch % len(token_capacity):
        raise UserError(
            f"A batch of {batch} cannot be cut into {len(token_capacity)} equal parts, one "
            f"for each capacity of {token_capacity}; give a number that divides it."
        )
    return Sizes(
        {"layout": layout, "token_capacity": token_capacity},
        batch * sum(token_capacity) // len(token_capacity),
        active,
    )


def schedule(model: ImageModel, batch: int, options: Options) -> capacity_schedule.CapacitySchedule:
    """The trainer's capacity schedule after it has adapted to counts of this distribution."""
    most = model.max_tokens
    regions = most // grid.REGION**2
    seen = forced.token_counts(
        _SEEN, regions, tokens=options.tokens, spread=options.spread, seed=options.seed + 1
    )
    histogram = np.bincount(seen, minlength=most + 1)
    defaults = configs.base().capacity
    made = capacity_schedule.CapacitySchedule.start(defaults, regions=regions, images=batch)
    made.observe(histogram, overflow=0)
    made.look(defaults.every_steps)
    return made


def _rows(model: ImageModel, counts: np.ndarray, options: Options) -> layout_sizes.RowSizes:
    vit = model.backbone
    least = model.max_tokens + vit.prefix_length
    if options.row_width is None:
        mean = counts.mean() + vit.prefix_length
        tried = {layout_sizes.round_up(mean * times, _MULTIPLE) for times in _WIDTHS}
        widths = {least, *(width for width in tried if width > least)}
    elif options.row_width < least:
        raise UserError(
            f"row_width={options.row_width} is too small: an image can need {least} tokens (all "
            "fine, prefix included); give that or more."
        )
    else:
        widths = {options.row_width}
    if options.rows is not None:
        if options.row_width is None:
            raise UserError("--rows goes with --row_width.")
        return layout_sizes.RowSizes(options.rows, options.row_width)

    def cost(width: int) -> float:
        return float(flops.block(width, vit.width, vit.mlp_hidden))

    return layout_sizes.cheapest_rows(counts, vit.prefix_length, widths, cost)
