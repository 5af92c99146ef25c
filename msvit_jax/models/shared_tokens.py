"""Cells of a dense map that share a token, as one token each, and back."""

import jax.numpy as jnp
from flax import struct
from jax import Array

from msvit_jax.reducers import base


@struct.dataclass
class SharedTokens:
    """The different tokens of a dense map.

    Attributes:
      x: [B, K, D] tokens; zeros in empty positions.
      sizes: [B, K] float32, number of cells that hold each token; 0 in empty positions.
      position: [B, h, w] int32, position of each cell's token.
    """

    x: Array
    sizes: Array
    position: Array

    def to_map(self, x: Array) -> Array:
        """Gives each cell what was computed for its token: [B, K, C] -> [B, h, w, C]."""
        batch, *size = self.position.shape
        cells = base.unmerge(x, self.position.reshape(batch, size[0] * size[1]))
        return cells.reshape(batch, *size, x.shape[-1])


def share(patches: Array, holders: Array, capacity: int) -> SharedTokens:
    """Takes each token of a dense map once.

    Args:
      patches: [B, h, w, D]; cells with the same holder hold the same token.
      holders: [B, h, w] int32, for each cell the cell that holds its token, from `Output.holders`;
        -1 where a token was dropped: these cells, all zeros, share one.
      capacity: Number K of positions; an image with more tokens loses some.
    """
    batch, *size, width = patches.shape
    count = size[0] * size[1]
    cells, holder = patches.reshape(batch, count, width), holders.reshape(batch, count)
    holder = jnp.where(holder < 0, jnp.argmax(holder < 0, axis=1)[:, None], holder)
    holds = holder == jnp.arange(count, dtype=jnp.int32)[None]
    own = jnp.cumsum(holds, axis=1, dtype=jnp.int32) - 1
    position = base.take(own, holder)
    here = position[:, :, None] == jnp.arange(capacity, dtype=jnp.int32)[None, None]
    return SharedTokens(
        base.take(cells, base.list_chosen(holds, capacity)),
        here.sum(axis=1).astype(jnp.float32),
        jnp.where(position < capacity, position, -1).reshape(batch, *size),
    )
