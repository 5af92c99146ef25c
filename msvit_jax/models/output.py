"""What a model returns."""

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
    """What a gate said of each region; regions are row-major.

    Attributes:
      logits: [B, R] float32, noise-free; the sigmoid is the probability of staying coarse.
      coarse: [B, R] float32 decisions, 1 = one coarse token, 0 = four fine ones; in training
        straight-through, so that gradient reaches the logits.
    """

    logits: Array
    coarse: Array


@struct.dataclass
class Features:
    """What a model without a head (`num_classes=0`) says of images.

    Attributes:
      patches: [B, h, w, D] tokens of the patches after the last norm. Patches that share a token,
        because it is coarse or they were merged, all have it; zeros where one was dropped.
      class_token: [B, D], the class token after the last norm; None of a model without one.
    """

    patches: Array
    class_token: Array | None = None


@struct.dataclass
class Output:
    """What every model of the library returns.

    Attributes:
      logits: [B, classes] float32; NaN for an image that does not fit.
      tokens: [B] int32, active patch tokens of each image (class and register tokens not counted).
      gate: decisions of a mixed-scale model.
      distilled_logits: [B, classes] float32 of the distillation head, in training only.
      fits: [B] bool, whether an image's tokens found room in a layout with less places than the
        grid; None in the slots layout, where all do.
      merged: after each reduction of a model that reduces tokens, [B, N] int32: the place in the
        shortened sequence, prefix included, of the token that each patch of the grid (each slot of
        a mixed-scale model) now is part of; -1 if it was dropped. None in packed layouts.
      hosts: likewise, in every layout, the patch (slot) that holds that place, itself for those
        that nobody took in; -1 also for slots without a token, and images that do not fit.
      exits: [B, stages, classes] float32, logits of every exit of a cascade; `logits` are the last.
      features: Tokens of a model without a head, whose `logits` are [B, 0]; None of others. NaN for
        an image that does not fit.
    """

    logits: Array
    tokens: Array
    gate: GateOutput | None = None
    distilled_logits: Array | None = None
    fits: Array | None = None
    merged: tuple[Array, ...] | None = None
    hosts: tuple[Array, ...] | None = None
    exits: Array | None = None
    features: Features | None = None

    def merge_maps(self, size: tuple[int, int]) -> Array | None:
        """Which cells of the image are one token after each reduction, whatever the layout.

        Args:
          size: (rows, columns) of the grid of patches.

        Returns:
          [B, stages, rows, columns] int32: the cell, counted row by row, that holds the token which
          a cell is part of, itself for those that nobody took in; -1 if it was dropped. A coarse
          token is held by the first of its cells. None of a model that reduces nothing.
        """
        if self.hosts is None:
            return None
        if self.gate is None:
            return jnp.stack(self.hosts, axis=1).reshape(-1, len(self.hosts), *size)
        maps = [grid.hosts_to_map(hosts, self.gate.coarse, size) for hosts in self.hosts]
        return jnp.stack(maps, axis=1)


def also_empty(call: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a model's `__call__` answer a batch of no images with an `Output` of none.

    Shapes that leave a size to be found out have none to find where there are no elements, so
    another batch is computed, as small as the model's layout lets it be, and nothing of it kept.
    """

    @functools.wraps(call)
    def answered(self: Any, images: Array, **options: Any) -> Any:
        if images.ndim != 4 or images.shape[0] != 0:
            return call(self, images, **options)
        budget = getattr(self, "budget", None)
        parts = len(budget) if isinstance(budget, tuple) else 1
        count = parts * getattr(self, "row_groups", 1)
        some = {
            name: jnp.zeros((count, *x.shape[1:]), x.dtype) if getattr(x, "ndim", 0) else x
            for name, x in {"images": images, **options}.items()
        }
        return jax.tree.map(lambda x: x[:0], call(self, **some))

    return answered
