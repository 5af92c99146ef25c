"""The static shapes that a Predictor compiles for a model, and the policy that uses them."""

import math
from collections.abc import Sequence

import numpy as np

from msvit_jax.errors import UserError, check_choice
from msvit_jax.inference.schedule import Buckets, Cheapest, Policy, Rows, Shape
from msvit_jax.models.interface import ImageModel
from msvit_jax.tokens import grid

LAYOUTS = ("auto", "slots", "budget", "rows")
_BUCKETS = 10  # approximate number of capacities, from all coarse to all fine
_LANES = 128  # columns that accelerators compute at a time


def make_policy(
    model: ImageModel,
    *,
    layout: str,
    batch: int,
    groups: int,
    buckets: Sequence[int] | None,
    row_width: int | None,
    most_shapes: int,
) -> Policy:
    """Chooses static shapes and the policy that assigns images to them.

    Args:
      model: A model of the registry; one without a gate has a single shape.
      layout: One of `LAYOUTS`.
      batch: Number of images of a call.
      groups: Number of devices; each packs its part of a batch separately.
      buckets: Capacities in patch tokens per image; None: about ten. The whole grid is always one
        of them.
      row_width: Tokens per row; None: the smallest multiple of 128 that holds any image.
      most_shapes: Upper bound on the number of shapes.

    Raises:
      UserError: Options do not fit the model or each other.
    """
    check_choice("layout", layout, LAYOUTS)
    if not model.has_gate or layout == "slots":
        kind, whole = ("slots" if model.has_gate else "dense"), model.max_tokens
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
    model: ImageModel, batch: int, groups: int, buckets: Sequence[int] | None
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
    """Capacities in even steps, multiples of 16 tokens (4 on small grids) with the prefix.

    Args:
      least: Number of patch tokens of an image with only coarse regions.
      most: Number of patch tokens of an image with only fine regions; the last capacity.
      prefix: Tokens per image in addition to its patch tokens.
    """
    unit = _unit(most)
    step = unit * math.ceil((most - least) / _BUCKETS / unit)
    first = step * math.ceil((least + prefix) / step) - prefix
    # A capacity just below the last one would cost a program and save little for few images.
    return [*range(first, most - step // 2, step), most]


def fitted_buckets(model: ImageModel, tokens: np.ndarray, count: int) -> list[int]:
    """The capacities that hold a sample's images with the fewest multiply-accumulates.

    They are multiples as in `default_buckets`. Every image counts with the smallest capacity that
    holds it; dynamic programming over the capacities finds the best.

    Args:
      model: A model with a gate.
      tokens: [N] int, number of active patch tokens of each image.
      count: Largest number of capacities.
    """
    most, prefix = model.max_tokens, model.backbone.prefix_length
    unit = _unit(most)
    held = np.minimum(-(-(tokens + prefix) // unit) * unit - prefix, most)
    sizes, images = np.unique(held, return_counts=True)
    cost, below = model.macs(sizes), np.concatenate([[0], np.cumsum(images)])
    # cheapest[-1][j]: least cost of the images of the j smallest sizes, in one bucket more each
    # time, of which the last has size j - 1 and holds the images from `first` on.
    cheapest, first = [np.array([0.0] + [np.inf] * len(sizes))], []
    for _ in range(min(count, len(sizes))):
        totals = cheapest[-1][:, None] + (below - below[:, None]) * np.concatenate([[0], cost])
        totals[np.tril_indices_from(totals)] = np.inf
        first.append(totals.argmin(axis=0))
        cheapest.append(totals.min(axis=0))
    number, end = int(np.argmin([each[-1] for each in cheapest[1:]])) + 1, len(sizes)
    fitted = []
    for starts in reversed(first[:number]):
        fitted.append(int(sizes[end - 1]))
        end = starts[end]
    return fitted[::-1]


def _unit(most: int) -> int:
    """Number whose multiples capacities are, with the prefix, on a grid of `most` patches."""
    return 16 if most >= 128 else 4


def _row_shapes(
    model: ImageModel, batch: int, groups: int, row_width: int | None, count: int
) -> list[Shape]:
    """At most `count` shapes, from one row per device up to enough rows for any batch."""
    vit, most = model.backbone, _token_range(model)[1]
    largest = most + vit.prefix_length
    width = _LANES * math.ceil(largest / _LANES) if row_width is None else row_width
    if width < largest:
        raise UserError(
            f"row_width={width} is too small: an image of this model needs up to {largest} tokens "
            f"(all of its {most} patches fine, prefix included); use at least that."
        )
    # First-fit places every image in `full` rows: a row without room holds this many images.
    in_a_row = width // largest
    full = math.ceil(batch / groups / in_a_row)
    steps = np.ceil(np.geomspace(full, 1, count) - 1e-9).astype(int)  # the first is always `full`
    # For layers that reduce tokens, a row is counted as one image.
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


def _token_range(model: ImageModel) -> tuple[int, int]:
    """Active patch tokens of an image with only coarse, and with only fine regions."""
    return model.num_regions, grid.REGION**2 * model.num_regions
