"""Outputs of the models."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msvit_jax.tokens import grid


@struct.dataclass
class GateOutput:
    """Output of a gate for each region; regions are row-major.

    Attributes:
      logits: [B, R] float32, noise-free; the sigmoid is the probability of staying coarse.
      coarse: [B, R] float32 decisions, 1 = one coarse token, 0 = four fine ones; straight-through
        in training, so that gradient reaches the logits.
    """

    logits: Array
    coarse: Array


@struct.dataclass
class Features:
    """Output of a model without a head (`num_classes=0`).

    Attributes:
      patches: [B, h, w, D], tokens of the patches after the last norm. Patches that share a token,
        because it is coarse or they were merged, all hold it; zeros where one was dropped. With
        `ViT.unmerge="residual"` merged and dropped ones have features of their own.
      class_token: [B, D], class token after the last norm; None if the model has none.
    """

    patches: Array
    class_token: Array | None = None


@struct.dataclass
class Output:
    """Output of every model of the library.

    Attributes:
      logits: [B, classes] float32, or for segmentation [B, h, w, classes] on the patch grid; NaN
        for an image that does not fit.
      tokens: [B] int32, number of active patch tokens of each image (class and register tokens not
        counted).
      gate: Decisions of a mixed-scale model; None for other models.
      distilled_logits: [B, classes] float32, logits of the distillation head, in training only.
      within_capacity: [B] bool, whether an image's tokens fit in a layout with less capacity than
        the grid; None without such a layout, where all fit.
      merge_positions: Tuple with, for each reduction, [B, N] int32: position in the shortened
        sequence, prefix included, of the token that each patch of the grid (each slot of a
        mixed-scale model) is part of; -1 if it was dropped. None in packed layouts, if no layer
        reduces tokens, and while training a gate carries tokens of both scales.
      merge_targets: Tuple with, for each reduction, in every layout, [B, N] int32: index of the
        patch (slot) whose token each patch (slot) was merged into, its own if it was not merged; -1
        if it was dropped, for slots without a token, and for images that do not fit. None if no
        layer reduces tokens, and while training a gate carries tokens of both scales.
      exit_logits: [B, stages, classes] float32, logits of every exit of a cascade, whose `logits`
        are the last exit's; None for other models.
      features: Features from a model without a head, whose `logits` are [B, 0]; None for others.
        NaN for an image that does not fit.
    """

    logits: Array
    tokens: Array
    gate: GateOutput | None = None
    distilled_logits: Array | None = None
    within_capacity: Array | None = None
    merge_positions: tuple[Array, ...] | None = None
    merge_targets: tuple[Array, ...] | None = None
    exit_logits: Array | None = None
    features: Features | None = None

    @property
    def answered(self) -> Array:
        """[B] bool, whether an image has an answer; in a layout with room for all, all do."""
        if self.within_capacity is None:
            return jnp.ones(self.tokens.shape, bool)
        return self.within_capacity

    def merge_maps(self, size: tuple[int, int]) -> Array | None:
        """Maps each cell of the image, after each reduction, to the cell that holds its token.

        Args:
          size: (rows, columns) of the patch grid.

        Returns:
          [B, reductions, rows, columns] int32: index of the cell, counted row by row, whose token
          this cell is part of, its own if it was not merged; -1 if it was dropped. A coarse token
          is held by the first of its cells. None if the model reduces nothing.
        """
        if self.merge_targets is None:
            return None
        if self.gate is None:
            return jnp.stack(self.merge_targets, axis=1).reshape(-1, len(self.merge_targets), *size)
        maps = [
            grid.targets_to_map(merge_targets, self.gate.coarse, size)
            for merge_targets in self.merge_targets
        ]
        return jnp.stack(maps, axis=1)

    def holders(self, size: tuple[int, int]) -> Array | None:
        """Maps each cell of the image to the cell that holds its token after the last layer.

        Args:
          size: (rows, columns) of the patch grid.

        Returns:
          [B, rows, columns] int32 as in `merge_maps`; None if every cell has a token of its own.
        """
        if (maps := self.merge_maps(size)) is not None:
            return maps[:, -1]
        if self.gate is None:
            return None
        coarse = self.gate.coarse
        slots = jnp.arange(size[0] * size[1], dtype=jnp.int32)[None]
        own = jnp.broadcast_to(slots, (coarse.shape[0], slots.shape[1]))
        return grid.targets_to_map(own, coarse, size)


def also_empty(call: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a model's `__call__` answer an empty batch with an empty `Output`.

    Reshapes with an inferred size fail on arrays without elements, so another batch, as small as
    the model's layout allows, is computed and nothing of it kept.
    """

    @functools.wraps(call)
    def answered(self: Any, images: Array, **options: Any) -> Any:
        if images.ndim != 4 or images.shape[0] != 0:
            return call(self, images, **options)
        capacity = self.token_capacity
        parts = len(capacity) if isinstance(capacity, tuple) else 1
        count = parts * self.row_groups
        some = {
            name: jnp.zeros((count, *x.shape[1:]), x.dtype) if getattr(x, "ndim", 0) else x
            for name, x in {"images": images, **options}.items()
        }
        return jax.tree.map(lambda x: x[:0], call(self, **some))

    return answered
