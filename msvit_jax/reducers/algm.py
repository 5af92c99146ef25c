"""ALGM: squares of neighbors first, pairs from the whole image later (Norouzi et al. 2024).

Stated in the paper (arXiv 2406.09936): in the first layer, between attention and MLP, the tokens
of a 2 x 2 square become their mean if they are alike by cosine similarity; halfway through the
network ToMe's bipartite matching merges alike tokens of the whole image. Published for layers 1 and
5 of 12.

Ours: the paper merges what is more alike than a threshold, a number of tokens that depends on the
image. Shapes are static here, so a fixed share goes, the most alike first. Squares that are merged
keep their place in reading order, where the authors' code moves them to the front.
"""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from msvit_jax.reducers import base
from msvit_jax.reducers.tome import ToMe

_SIDE = 2  # of a square in tokens
_MERGED = _SIDE**2 - 1  # tokens that a merged square loses
_TINY = 1e-12  # keeps the direction of a token of zeros finite


class ALGM(ToMe):
    """Merges whole squares in the first layer that reduces, and pairs by ToMe's rule in the others.

    A layer with `keep=1` does nothing, so that `keep=(1.0, 0.7)` is the global merging alone.

    Attributes:
      proportional_attention: Whether attention counts each token by its size in later layers; the
        authors' code does not.
    """

    proportional_attention: bool = False

    needs_keys: ClassVar[bool] = False
    takes_remove: ClassVar[bool] = False

    @property
    def merges_squares(self) -> bool:
        """Whether this is the layer that merges squares."""
        return self.index == 0

    @property
    def needs_grid(self) -> bool:
        """Whether the reducer needs `Tokens.grid`."""
        return self.merges_squares and not self.keeps_all

    @property
    def least_keep(self) -> float:
        """Least share of the patch tokens that can be left: one of a square, or one of a pair."""
        return 1 / _SIDE**2 if self.merges_squares else super().least_keep

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...]:
        """Returns the first layer, and the published share of the depth: 5 of 12."""
        return tuple(sorted({1, min(depth, max(2, 5 * depth // 12))}))

    def keep_table(self, most: int) -> base.KeepTable:
        """Keeps `keep` of the tokens at least, as squares merge whole; see `Reducer.keep_table`."""
        if not self.merges_squares:
            return super().keep_table(most)
        n = np.arange(most + 1)
        squares = (n - base.kept_by_share(self.keep, most)) // _MERGED
        return base.KeepTable((n - _MERGED * squares).astype(np.int32))

    def macs(self, before: np.ndarray, after: np.ndarray, width: int, heads: int) -> np.ndarray:
        """Counts matching and merging; see `Reducer.macs`."""
        pairs = before / 2 * before / 2 * width
        matching = before * width if self.merges_squares else pairs
        return matching + (before - after) * after * width

    def features(self, tokens: base.Tokens) -> Array:
        """Returns what similarity is measured by: the tokens, not attention's keys as in ToMe."""
        return tokens.x

    def __call__(
        self,
        tokens: base.Tokens,
        table: base.KeepTable,
        capacity: tuple[int, int],
        *,
        train: bool = False,
    ) -> base.Merge:
        """Merges the most alike squares or pairs; see `Reducer.__call__`."""
        if not self.needs_grid:
            return super().__call__(tokens, table, capacity, train=train)
        if tokens.grid is None:
            raise ValueError(
                "reducer='algm' merges squares of a whole grid of tokens, which there is not."
            )
        patches = tokens.grid[0] * tokens.grid[1]
        goes = (patches - int(table.kept[patches])) // _MERGED
        alike = squares_alike(tokens.x[:, -patches:], tokens.grid)
        batch, rows, columns = alike.shape
        if goes > rows * columns:
            raise ValueError(
                f"keep={self.keep} is not possible on a grid of {tokens.grid[0]} x "
                f"{tokens.grid[1]} tokens, which has {rows * columns} whole squares; keep more."
            )
        flat = alike.reshape(batch, rows * columns)
        rank = base.ranks(flat, jnp.ones((*flat.shape, 1), bool)).reshape(alike.shape)
        host, corner = _first_of_square(tokens.grid, tokens.x.shape[1])
        leaves = (
            _of_tokens(rank < goes, tokens.grid, tokens.x.shape[1]) & ~jnp.asarray(corner)[None]
        )
        kept, removed, position = base.assign_positions(tokens, leaves, capacity)
        into = base.take(position[:, host], removed, fill=capacity[0])
        return base.merge_by_size(tokens, kept, removed, into)


def squares_alike(x: Array, grid: tuple[int, int]) -> Array:
    """Averages the cosine similarities of the pairs in each whole square of a grid.

    Args:
      x: [B, h * w, D] patch tokens in reading order.
      grid: (h, w) of the patches; a last odd row or column is in no square.

    Returns:
      [B, h // 2, w // 2] float32.
    """
    (rows, columns), width = (side // _SIDE for side in grid), x.shape[-1]
    wide = x.astype(jnp.float32).reshape(-1, *grid, width)[:, : rows * _SIDE, : columns * _SIDE]
    unit = wide * lax.rsqrt(jnp.maximum(jnp.square(wide).sum(axis=-1, keepdims=True), _TINY))
    total = unit.reshape(-1, rows, _SIDE, columns, _SIDE, width).sum(axis=(2, 4))
    # The square of a sum of four directions is four ones and every pair twice.
    return (jnp.square(total).sum(axis=-1) - _SIDE**2) / (_SIDE**2 * _MERGED)


def _of_tokens(squares: Array, grid: tuple[int, int], count: int) -> Array:
    """Gives each token its square's value: [B, h // 2, w // 2] bool -> [B, count], else False."""
    each = jnp.repeat(jnp.repeat(squares, _SIDE, axis=1), _SIDE, axis=2)
    beyond = [(0, side - own) for side, own in zip(grid, each.shape[1:], strict=True)]
    patches = jnp.pad(each, ((0, 0), *beyond)).reshape(-1, grid[0] * grid[1])
    return jnp.pad(patches, ((0, 0), (count - grid[0] * grid[1], 0)))


def _first_of_square(grid: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of each token's square's first token, and whether it is that: [count]."""
    prefix = count - grid[0] * grid[1]
    row, column = (index // _SIDE * _SIDE for index in np.indices(grid))
    host = np.concatenate([np.arange(prefix), prefix + (row * grid[1] + column).reshape(-1)])
    return host, host == np.arange(count)
