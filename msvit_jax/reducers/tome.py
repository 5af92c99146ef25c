"""ToMe: bipartite soft matching of tokens by attention's keys (Bolya et al. 2023, section 3).

It is the only reducer here that reorders the tokens that stay, see `_order`.
"""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from msvit_jax.reducers import base


class ToMe(base.Reducer):
    """Merges tokens at even positions of an image into those at odd ones, the most similar first.

    Attributes:
      proportional_attention: Whether attention counts each token by its size in later layers.
    """

    proportional_attention: bool = True

    needs_keys: ClassVar[bool] = True
    takes_remove: ClassVar[bool] = True

    @property
    def least_keep(self) -> float:
        """Least share of the patch tokens that can be left: every other one can be merged."""
        return 0.5

    @property
    def counts_sizes(self) -> bool:
        """Whether attention in later layers counts each token by its size."""
        return self.proportional_attention

    def keep_table(self, most: int) -> base.KeepTable:
        """Keeps at least half of the tokens; see `Reducer.keep_table`."""
        n = np.arange(most + 1)
        if self.remove:
            kept = n - np.minimum(self.remove, n // 2)
        else:
            kept = np.maximum(base.kept_by_share(self.keep, most), n - n // 2)
        return base.KeepTable(kept.astype(np.int32))

    def macs(self, before: np.ndarray, after: np.ndarray, width: int, heads: int) -> np.ndarray:
        """Counts matching and merging; see `Reducer.macs`."""
        return before / 2 * before / 2 * (width // heads) + (before - after) * after * width

    def features(self, tokens: base.Tokens) -> Array:
        """Returns what similarity is measured by: [B, N, C], attention's keys."""
        assert tokens.keys is not None
        return tokens.keys

    def __call__(
        self,
        tokens: base.Tokens,
        table: base.KeepTable,
        capacity: tuple[int, int],
        *,
        train: bool = False,
    ) -> base.Merge:
        """Merges the most similar pairs of tokens; see `Reducer.__call__`."""
        count = tokens.x.shape[1]
        position = base.position_in_image(tokens, tokens.member.any(axis=2))
        source, target = (tokens.patch & (position % 2 == parity) for parity in (0, 1))
        # At most half of the tokens, rounded up, plus one for each further image in a row.
        half = min(count, -(-count // 2) + tokens.member.shape[2] - 1)
        sources, targets = (base.list_chosen(chosen, half) for chosen in (source, target))
        best, similarity = base.nearest(self.features(tokens), tokens, sources, targets)
        similarity = base.put(similarity, sources, count)
        rank = base.ranks(similarity, tokens.member & source[:, :, None])
        goes = tokens.of_image(tokens.counts) - table.of_tokens(tokens)
        leaves = source & (rank < goes)
        # An image that loses nothing stays as it is.
        order = jnp.where(goes > 0, _order(tokens, source, leaves, rank - goes), position)
        kept, removed, position = base.assign_positions(tokens, leaves, capacity, order)
        target_token = base.put(base.take(targets, best), sources, count)
        into = base.take(base.take(position, target_token), removed, fill=capacity[0])
        return base.merge_by_size(tokens, kept, removed, into)


def decreasing(remove: int, layers: int) -> tuple[int, ...]:
    """ToMe's decreasing schedule: from twice `remove` tokens merged to none, the same in total.

    Args:
      remove: Mean number of tokens merged in a layer.
      layers: Number of layers that merge.

    Returns:
      Number of tokens merged in each layer, for the model's attribute `remove`.
    """
    if layers == 1:
        return (remove,)
    return tuple(int(2 * remove * (layers - 1 - layer) / (layers - 1)) for layer in range(layers))


def _order(tokens: base.Tokens, source: Array, leaves: Array, similar: Array) -> Array:
    """Computes positions of the tokens that stay within their image, in ToMe's own order.

    The order is the prefix, then sources that were not merged, then targets. The next layer takes
    every other token of this order, so another order would make other pairs there.

    Args:
      tokens: Sequence of tokens.
      source: [B, N] bool, patch tokens at even positions.
      leaves: [B, N] bool, sources that are merged.
      similar: [B, N] int32, rank by similarity of the sources that are not merged, which is their
        order in images without a prefix. ToMe sorts them back only to get the class token to the
        front.

    Returns:
      [B, N] int32 positions; undefined for tokens that do not stay.
    """
    front = tokens.prefix | (source & ~leaves)
    back = tokens.patch & ~source
    has_prefix, front_count = (
        tokens.of_image((tokens.member & chosen[:, :, None]).sum(axis=1, dtype=jnp.int32))
        for chosen in (tokens.prefix, front)
    )
    ahead = jnp.where(has_prefix > 0, base.position_in_image(tokens, front), similar)
    return jnp.where(back, front_count + base.position_in_image(tokens, back), ahead)
