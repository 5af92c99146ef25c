"""Layouts: how the tokens of a batch lie in memory while the transformer works on them.

The same model with the same parameters gives the same logits in each, up to rounding:

* "slots": every slot has its place, hidden ones are masked; saves no time. In training a gate both
  scales of every region lie side by side, as in the paper: five places for four slots.
* "budget": each image's active tokens in as many places as its budget, one budget for all or a
  ladder of them.
* "trimmed": the same places for training a gate: what active tokens leave free holds the tokens
  that some regions would have if they were decided the other way, which carry gradient to the gate
  (after MSViT's adaptive trimming; under static shapes: our reconstruction).
* "rows": the active tokens of several images in one row, attention confined to an image.
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from msvit_jax.models.attention import Mask
from msvit_jax.tokens import packing

_TILE = 128  # lanes of a TPU's registers
LAYOUTS = ("slots", "budget", "trimmed", "rows")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout and its sizes, all static.

    Attributes:
      kind: one of `LAYOUTS`.
      budget: places for an image's active patch tokens ("budget", "trimmed"), the prefix not
        counted; several make a ladder: equal parts of the batch, sorted by their counts, get them.
      rows: rows for the whole batch ("rows").
      row_width: places of a row, prefix tokens counted ("rows").
      groups: equal parts of the batch that are packed on their own.
    """

    kind: str = "slots"
    budget: tuple[int, ...] = ()
    rows: int = 0
    row_width: int = 0
    groups: int = 1

    def check(self, *, grid: int, smallest: int, prefix: int) -> None:
        """Checks sizes against a model.

        Args:
          grid: slots of an image.
          smallest: active patch tokens that every image has at least.
          prefix: class, distillation and register tokens.

        Raises:
          ValueError: they do not fit; says what would.
        """
        if self.kind not in LAYOUTS:
            raise ValueError(f"layout={self.kind!r} is none of {', '.join(LAYOUTS)}.")
        if self.groups < 1:
            raise ValueError(f"row_groups={self.groups}; at least 1 is needed.")
        if self.kind in ("budget", "trimmed"):
            self._check_budget(grid, smallest)
        if self.kind == "rows":
            self._check_rows(grid + prefix)

    def _check_budget(self, grid: int, smallest: int) -> None:
        if not self.budget:
            raise ValueError(f"layout={self.kind!r} needs budget=, active tokens per image.")
        for budget in self.budget:
            if not smallest <= budget <= grid:
                raise ValueError(
                    f"budget={budget} is not possible: an image has {smallest} to {grid} patch "
                    "tokens; use a number from there."
                )

    def _check_rows(self, largest: int) -> None:
        if self.rows < 1:
            raise ValueError("layout='rows' needs rows=, how many there are for a whole batch.")
        if self.row_width < largest:
            raise ValueError(
                f"row_width={self.row_width} is too small: one image can need {largest} places "
                "(all fine, prefix included), and would never fit; use at least that."
            )
        if self.rows % self.groups:
            raise ValueError(f"rows={self.rows} cannot be cut into row_groups={self.groups}.")


def with_dense_layout(model: nn.Module) -> nn.Module:
    """The same model where every image has its places; a model without layouts as it is."""
    return model.clone(layout="slots") if hasattr(model, "layout") else model


@struct.dataclass
class Packed:
    """Tokens of a batch in a layout.

    Attributes:
      tokens: [G, T, D], or [G * R, W, D] where that is faster.
      mask: for attention.
      packing: the way back.
    """

    tokens: Array
    mask: Mask
    packing: packing.Packing

    def restore(self, x: Array, *, count: int | None = None) -> Array:
        """What became of `tokens`, image by image: [B, N, D], or of the first `count` tokens."""
        flat = x.reshape(*self.packing.owner.shape, x.shape[-1])
        return self.packing.restore(flat, count=count)

    def named(self, position: Array) -> Array:
        """For each token of an image another one of it, named by its place among the image's.

        Args:
          position: where the other one lies in its row of `tokens`, shape as theirs; -1: nowhere.

        Returns:
          [B, N] int32; -1 for nowhere, anything for tokens that have no place.
        """
        count = self.packing.place.shape[1]
        token = (self.packing.source % count).reshape(position.shape)
        name = jnp.take_along_axis(token, jnp.maximum(position, 0), axis=1)
        return self.restore(jnp.where(position < 0, -1, name)[..., None])[..., 0]


def images_per_group(batch: int, layout: Layout) -> int:
    """How many images of a batch are packed together.

    Raises:
      ValueError: the batch cannot be cut into the layout's groups, or those into its budgets.
    """
    if batch % layout.groups:
        raise ValueError(f"A batch of {batch} cannot be cut into row_groups={layout.groups}.")
    images = batch // layout.groups
    if layout.budget and images % len(layout.budget):
        raise ValueError(
            f"{images} images (per device) cannot be cut into {len(layout.budget)} equal parts, "
            f"one for each of the budgets {layout.budget}; use a multiple of that number."
        )
    return images


def make_runs(lengths: Array, layout: Layout) -> packing.Runs:
    """Gives every image its run of places.

    Args:
      lengths: [B] int32, active tokens of each image, prefix included.
      layout: any but slots; budgets without the prefix are made longer by it.

    Raises:
      ValueError: the batch cannot be cut into the layout's parts.
    """
    images = images_per_group(lengths.shape[0], layout)
    lengths = lengths.reshape(layout.groups, images)
    if layout.kind == "rows":
        return packing.rows(lengths, layout.rows // layout.groups, layout.row_width)
    return packing.assign_buckets(lengths, layout.budget)


def pack(
    tokens: Array,
    active: Array,
    layout: Layout,
    runs: packing.Runs,
    *,
    shortest: int,
    weights: Array | None = None,
    extra: Array | None = None,
) -> Packed:
    """Packs a batch.

    Args:
      tokens: [B, N, D], prefix tokens included.
      active: [B, N] bool.
      layout: see `make_runs`.
      runs: from there.
      shortest: tokens that every image has at least, prefix included.
      weights: [B, N] straight-through weights of the tokens, where they take gradient.
      extra: [B, N] bool, inactive tokens that are carried for their gradient.
    """
    images = images_per_group(active.shape[0], layout)
    length_buckets: tuple[tuple[int, int], ...]
    if layout.kind == "rows":
        length_buckets = ((layout.rows // layout.groups, layout.row_width),)
    else:
        part = images // len(layout.budget)
        length_buckets = tuple((part, width) for width in sorted(layout.budget, reverse=True))
    packed = packing.pack(active, runs, extra)
    first = jnp.arange(layout.groups, dtype=jnp.int32)[:, None] * images
    if weights is not None:
        # A row of nobody's sees its first place: without any weight it would divide by zero.
        alone = (packed.owner == packing.NOBODY) & (runs.offset == 0)
        weights = jnp.where(alone, 1.0, packed.gather(weights))
    mask = Mask(
        weights=weights,
        segments=jnp.where(packed.owner == packing.NOBODY, packing.NOBODY, packed.owner + first),
        length_buckets=length_buckets,
        alone=layout.kind != "rows",
        most=layout.row_width // shortest + 1,  # and the empty places behind them
        images=images * layout.groups,
    )
    return _in_tiles(Packed(packed.gather(tokens), mask, packed))


def _in_tiles(packed: Packed) -> Packed:
    """Rows apart where they are whole tiles of a TPU; else end to end, which pads less."""
    mask = packed.mask
    length = mask.length_buckets[0][1]
    if len(mask.length_buckets) > 1 or length % _TILE:
        return packed
    apart = lambda x: x.reshape(-1, length, *x.shape[2:])  # noqa: E731
    own = dataclasses.replace(
        mask,
        weights=None if mask.weights is None else apart(mask.weights),
        segments=None if mask.segments is None else apart(mask.segments),
        length_buckets=(),
    )
    return Packed(apart(packed.tokens), own, packed.packing)
