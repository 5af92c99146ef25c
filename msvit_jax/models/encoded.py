"""Tokens that the blocks of a transformer return, and where the patches went among them."""

import jax.numpy as jnp
from flax import struct
from jax import Array

from msvit_jax.models.reduction import ReductionState
from msvit_jax.reducers import base as reducing


@struct.dataclass
class Encoded:
    """Tokens after the blocks and, where that was asked for, the last norm.

    Attributes:
      tokens: [B, N, D] tokens, fewer than went in if layers reduced them.
      state: Reduction state of the tokens; None if no layer reduces them.
      targets: Tuple with, for each reduction, [B, N] int32: index of the input token that each
        input token was merged into, its own if it was not merged; -1 if it was dropped.
      unmerged: [B, N0, D], input tokens un-merged to features of their own, likewise; None where
        un-merging copies.
    """

    tokens: Array
    state: ReductionState | None = None
    targets: tuple[Array, ...] = ()
    unmerged: Array | None = None

    def unmerge(self) -> Array:
        """Gives each input token what became of it, as `ViT.unmerge` says: [B, N0, D]."""
        if self.unmerged is not None:
            return self.unmerged
        if self.state is None:
            return self.tokens
        return reducing.unmerge(self.tokens, self.state.position)

    @property
    def alive(self) -> Array | None:
        """Whether each input token was not dropped: [B, N] bool; None if none can be."""
        return None if self.state is None else self.state.position >= 0


def patch_positions(encoded: Encoded, prefix: int) -> tuple[Array, ...] | None:
    """Returns `Output.merge_positions` for images that each have a row of their own."""
    if encoded.state is None:
        return None
    return tuple(position[:, prefix:] for position in encoded.state.history)


def patch_targets(merge_targets: tuple[Array, ...], prefix: int) -> tuple[Array, ...] | None:
    """Makes `Output.merge_targets` of targets in sequences with their prefix: each [B, P + N]."""
    return tuple(jnp.maximum(target[:, prefix:] - prefix, -1) for target in merge_targets) or None
