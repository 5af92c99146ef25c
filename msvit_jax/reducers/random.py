"""Random tokens stay, the others are dropped: the control of every comparison."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from msvit_jax.reducers import base
from msvit_jax.reducers.topk import keep_highest


class Random(base.Reducer):
    """Keeps tokens by random bits that are a function of the image alone, whatever its batch."""

    needs_random_score: ClassVar[bool] = True

    def macs(self, before: np.ndarray, after: np.ndarray, width: int, heads: int) -> np.ndarray:
        """Counts nothing; see `Reducer.macs`."""
        return 0 * before

    def __call__(
        self,
        tokens: base.Tokens,
        table: base.KeepTable,
        capacity: tuple[int, int],
        *,
        train: bool = False,
    ) -> base.Merge:
        """Keeps the tokens of the highest random score; see `Reducer.__call__`."""
        assert tokens.random_score is not None
        score = (tokens.random_score >> 8).astype(jnp.float32)
        return keep_highest(tokens, score, table, capacity)
