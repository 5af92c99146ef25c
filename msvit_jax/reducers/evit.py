"""EViT: the most important tokens stay, all others are fused (Liang et al. 2022, section 3)."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from msvit_jax.reducers import base


class EViT(base.Reducer):
    """Keeps the most important tokens, and one that is the others' sum weighted by importance.

    As in EViT's own code the weights are not normalized, and the fused token is an ordinary one
    afterward.
    """

    needs_importance: ClassVar[bool] = True

    def keep_table(self, most: int) -> base.KeepTable:
        """Counts the fused token, too; see `Reducer.keep_table`."""
        important = base.kept_by_share(self.keep, most)
        fused = important < np.arange(most + 1)
        return base.KeepTable(important + fused.astype(np.int32))

    def macs(self, before: np.ndarray, after: np.ndarray, width: int, heads: int) -> np.ndarray:
        """Counts importance and fusion; see `Reducer.macs`."""
        return base.importance_macs(before, width, heads) + (before - after) * after * width

    def __call__(
        self,
        tokens: base.Tokens,
        table: base.KeepTable,
        capacity: tuple[int, int],
        *,
        train: bool = False,
    ) -> base.Merge:
        """Keeps the most important tokens and fuses the others; see `Reducer.__call__`."""
        assert tokens.importance is not None
        score = tokens.importance
        rank = base.ranks(score, tokens.member & tokens.patch[:, :, None])
        stay = table.of_tokens(tokens)
        important = base.KeepTable(base.kept_by_share(self.keep, len(table.kept) - 1))
        kept, removed, position = base.assign_positions(
            tokens, tokens.patch & (rank >= stay), capacity
        )
        # The fused token takes the position of the most important token that is not kept.
        fuses = tokens.patch & (rank == important.of_tokens(tokens)) & (rank < stay)
        at = tokens.member & fuses[:, :, None]
        fused_position = tokens.of_image(jnp.where(at, position[:, :, None], 0).sum(axis=1))
        target = base.take(fused_position, removed, fill=capacity[0])
        kept_weight = base.take(jnp.where(fuses, score, 1.0), kept)
        return base.Merge(kept, removed, target, kept_weight, base.take(score, removed))
