"""Top-k: the most important tokens stay, the others are dropped (EViT without fusion)."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from msvit_jax.reducers import base


class TopK(base.Reducer):
    """Keeps the tokens that the class token attends to most."""

    needs_importance: ClassVar[bool] = True

    def macs(self, before: np.ndarray, after: np.ndarray, width: int, heads: int) -> np.ndarray:
        """Counts the importance's computation; see `Reducer.macs`."""
        return base.importance_macs(before, width, heads)

    def __call__(
        self,
        tokens: base.Tokens,
        table: base.KeepTable,
        capacity: tuple[int, int],
        *,
        train: bool = False,
    ) -> base.Merge:
        """Keeps the most important tokens; see `Reducer.__call__`."""
        assert tokens.importance is not None
        return keep_highest(tokens, tokens.importance, table, capacity)


def keep_highest(
    tokens: base.Tokens, score: Array, table: base.KeepTable, capacity: tuple[int, int]
) -> base.Merge:
    """Keeps each image's tokens of the highest score [B, N]; the others are dropped."""
    rank = base.ranks(score, tokens.member & tokens.patch[:, :, None])
    removed = tokens.patch & (rank >= table.of_tokens(tokens))
    kept, removed, _ = base.assign_positions(tokens, removed, capacity)
    return base.Merge(kept, removed, jnp.full(removed.shape, capacity[0], jnp.int32))
