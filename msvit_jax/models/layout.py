"""Layouts: the arrangement of a batch's tokens in memory while the transformer works on them.

The same model with the same parameters gives the same logits in each, up to rounding:

* "slots": every slot has its position and hidden ones are masked; saves no time. In training a
  gate, both scales of every region lie side by side, as in the paper: five positions for four
  slots.
* "budget": each image's active tokens in a sequence as long as its capacity, one capacity for all
  images or one for each length bucket.
* "trimmed": the same sequences for training a gate: positions that active tokens leave free hold
  the tokens that some regions would have if they were decided the other way, which carry gradient
  to the gate (after MSViT's adaptive trimming; under static shapes: our reconstruction).
* "rows": the active tokens of several images in one row, attention confined to an image.
"""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jax import Array

from msvit_jax.errors import check_choice
from msvit_jax.models.attention import Mask
from msvit_jax.tokens import packing

_TILE = 128  # lanes of a TPU's vector registers
LAYOUTS = ("slots", "budget", "trimmed", "rows")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout and its sizes, all static.

    Attributes:
      kind: Name of the layout, one of `LAYOUTS`.
      token_capacity: Capacities for an image's active patch tokens ("budget", "trimmed"), prefix
        not counted, one for each length bucket: equal parts of the batch, sorted by token count,
        get them.
      rows: Number of rows for the whole batch ("rows").
      row_width: Capacity of a row in tokens, prefix counted ("rows").
      groups: Number of equal parts of the batch that are packed on their own.
    """

    kind: str = "slots"
    token_capacity: tuple[int, ...] = ()
    rows: int = 0
    row_width: int = 0
    groups: int = 1

    def check(self, *, num_slots: int, smallest: int, prefix: int) -> None:
        """Checks sizes against a model.

        Args:
          num_slots: Largest number of patch tokens that an image can have.
          smallest: Least number of active patch tokens that an image can have.
          prefix: Number of class, distillation and register tokens.

        Raises:
          ValueError: The sizes do not fit; the message says which would.
        """
        check_choice("layout", self.kind, LAYOUTS)
        if self.groups < 1:
            raise ValueError(f"row_groups={self.groups}; at least 1 is needed.")
        if self.kind in ("budget", "trimmed"):
            self._check_capacity(num_slots, smallest)
        if self.kind == "rows":
            self._check_rows(num_slots + prefix)

    def _check_capacity(self, num_slots: int, smallest: int) -> None:
        if not self.token_capacity:
            raise ValueError(
                f"layout={self.kind!r} needs token_capacity=, active tokens per image."
            )
        for capacity in self.token_capacity:
            if not smallest <= capacity <= num_slots:
                raise ValueError(
                    f"token_capacity={capacity} is not possible: an image has {smallest} to "
                    f"{num_slots} patch tokens; use a number from there."
                )

    def _check_rows(self, largest: int) -> None:
        if self.rows < 1:
            raise ValueError("layout='rows' needs rows=, the number of rows for a whole batch.")
        if self.row_width < largest:
            raise ValueError(
                f"row_width={self.row_width} is too small: one image can need {largest} tokens "
                "(all fine, prefix included), and would never fit; use at least that."
            )
        if self.rows % self.groups:
            raise ValueError(f"rows={self.rows} cannot be cut into row_groups={self.groups}.")


@struct.dataclass
class Packed:
    """Tokens of a batch in a layout.

    Attributes:
      tokens: [G, T, D] tokens, or [G * R, W, D] where that is faster.
      mask: Attention mask of the packed tokens.
      packing: Indices that lead back to each image's own tokens.
    """

    tokens: Array
    mask: Mask
    packing: packing.Packing

    def restore(self, x: Array, *, count: int | None = None) -> Array:
        """Unpacks results of `tokens`, image by image: [B, N, D], or the first `count` tokens."""
        flat = x.reshape(*self.packing.owner.shape, x.shape[-1])
        return self.packing.restore(flat, count=count)

    def named(self, position: Array) -> Array:
        """Maps packed positions back to each image's own token indices.

        Args:
          position: Position in its row of `tokens` that each packed token points to, in the shape
            of `tokens` without channels; -1 for none.

        Returns:
          [B, N] int32, for each token of an image the index, among the image's tokens, of the one
          it points to; -1 for none, undefined for tokens without a position.
        """
        count = self.packing.position.shape[1]
        token = (self.packing.source % count).reshape(position.shape)
        name = jnp.take_along_axis(token, jnp.maximum(position, 0), axis=1)
        return self.restore(jnp.where(position < 0, -1, name)[..., None])[..., 0]


def images_per_group(batch: int, layout: Layout) -> int:
    """Number of images of a batch that are packed together.

    Raises:
      ValueError: The batch cannot be cut into the layout's groups, or a group into its length
        buckets.
    """
    if batch % layout.groups:
        raise ValueError(f"A batch of {batch} cannot be cut into row_groups={layout.groups}.")
    images = batch // layout.groups
    if layout.token_capacity and images % len(layout.token_capacity):
        raise ValueError(
            f"{images} images (per device) cannot be cut into {len(layout.token_capacity)} equal "
            f"parts, one for each of {layout.token_capacity} tokens; use a multiple of that."
        )
    return images


def make_runs(lengths: Array, layout: Layout) -> packing.Runs:
    """Gives every image its run of positions.

    Args:
      lengths: [B] int32, number of active tokens of each image, prefix included.
      layout: Any layout but slots, its capacities with the prefix included.

    Raises:
      ValueError: The batch cannot be cut into the layout's parts.
    """
    images = images_per_group(lengths.shape[0], layout)
    lengths = lengths.reshape(layout.groups, images)
    if layout.kind == "rows":
        return packing.rows(lengths, layout.rows // layout.groups, layout.row_width)
    return packing.assign_buckets(lengths, layout.token_capacity)


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
    """Packs the tokens of a batch.

    Args:
      tokens: [B, N, D] tokens, prefix included.
      active: [B, N] bool, whether each token is active.
      layout: Layout that the runs were made for.
      runs: Runs of positions from `make_runs`.
      shortest: Least number of tokens that an image has, prefix included.
      weights: [B, N], straight-through weights of the tokens; None if they take no gradient.
      extra: [B, N] bool, whether each inactive token is carried for its gradient.
    """
    images = images_per_group(active.shape[0], layout)
    length_buckets: tuple[tuple[int, int], ...]
    if layout.kind == "rows":
        length_buckets = ((layout.rows // layout.groups, layout.row_width),)
    else:
        part = images // len(layout.token_capacity)
        length_buckets = tuple(
            (part, width) for width in sorted(layout.token_capacity, reverse=True)
        )
    packed = packing.pack(active, runs, extra)
    first = jnp.arange(layout.groups, dtype=jnp.int32)[:, None] * images
    if weights is not None:
        # The first position of an empty run gets weight 1; without any it would divide by zero.
        alone = (packed.owner == packing.NOBODY) & (runs.offset == 0)
        weights = jnp.where(alone, 1.0, packed.gather(weights))
    mask = Mask(
        weights=weights,
        segments=jnp.where(packed.owner == packing.NOBODY, packing.NOBODY, packed.owner + first),
        length_buckets=length_buckets,
        single_segment=layout.kind != "rows",
        max_segments=layout.row_width // shortest + 1,  # plus the run of empty positions
        images=images * layout.groups,
    )
    return _in_tiles(Packed(packed.gather(tokens), mask, packed))


def _in_tiles(packed: Packed) -> Packed:
    """Separates rows that are whole tiles of a TPU; others stay end to end, which pads less."""
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
