"""Token Mergence: the most important tokens stay, each other one is merged into the nearest.

Bian et al. 2023 (arXiv 2306.04897) published no code and only the abstract was available: this is
our reconstruction.
"""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from msvit_jax.errors import check_choice
from msvit_jax.reducers import base
from msvit_jax.reducers.topk import keep_highest

WEIGHTS = ("similarity", "size")


class Mergence(base.Reducer):
    """Merges every unimportant token into the important one with the most similar features.

    Attributes:
      merge_weights: Kind of the weights of tokens that are merged: "similarity" (softmax of the
        cosine similarities to the token that stays, whose own is 1; after TPS, Wei et al. 2023) or
        "size" (number of patches that each stands for).
    """

    merge_weights: str = "similarity"

    needs_importance: ClassVar[bool] = True

    def check_options(self) -> None:
        """Raises ValueError for unknown merge weights."""
        check_choice("merge_weights", self.merge_weights, WEIGHTS)

    def macs(self, before: np.ndarray, after: np.ndarray, width: int, heads: int) -> np.ndarray:
        """Counts importance, similarities and merging; see `Reducer.macs`."""
        # The similarity of each removed token to each that stays, and merging, cost the same.
        return base.importance_macs(before, width, heads) + 2 * (before - after) * after * width

    def __call__(
        self,
        tokens: base.Tokens,
        table: base.KeepTable,
        capacity: tuple[int, int],
        *,
        train: bool = False,
    ) -> base.Merge:
        """Merges unimportant tokens into important ones; see `Reducer.__call__`."""
        assert tokens.importance is not None
        merge = keep_highest(tokens, tokens.importance, table, capacity)
        kept, removed = merge.kept, merge.removed
        target, similarity = base.nearest(tokens.x, tokens, removed, kept)
        if self.merge_weights == "size":
            kept_weight = base.take(tokens.size, kept)
            removed_weight = base.take(tokens.size, removed)
        else:
            kept_weight = jnp.full(kept.shape, jnp.e, jnp.float32)
            removed_weight = jnp.exp(similarity)
        return base.Merge(kept, removed, target, kept_weight, removed_weight).normalized()
