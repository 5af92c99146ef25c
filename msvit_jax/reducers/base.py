"""The parts that all reducers share: their inputs, their decisions, and how these are applied.

Pure functions with static shapes: every reducer returns a `Merge`, made of comparisons, cumulative
sums and gathers; merging is one sum into the tokens that stay.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array, lax

_ROUNDING = 1e-9  # keeps float error, as in 0.7 * 30, from rounding up to 22


@struct.dataclass
class Tokens:
    """A sequence of tokens of one or several images, as a reducer sees it.

    Attributes:
      x: [B, N, D] tokens. What inactive tokens hold, NaN even, reaches no other token.
      member: [B, N, M] bool, whether each token belongs to each image of its row. A token of no
        image is inactive: it is never kept for its own sake, never merged into and never counted.
      prefix: [B, N] bool, class, distillation and register tokens, which stay as they are and come
        first in their image.
      size: [B, N] float32, number of input tokens that each token stands for.
      importance: [B, N] float32, attention that each token receives, from `attention_received`;
        None unless the reducer asks for it.
      keys: [B, N, C], attention's keys, mean over heads; None unless the reducer asks for them.
      random_score: [B, N] uint32, random bits; None unless the reducer is random.
      grid: (rows, columns) of the patch tokens, which come last and in reading order; None where
        they are no whole grid, as mixed-scale and reduced ones.
    """

    x: Array
    member: Array
    prefix: Array
    size: Array
    importance: Array | None = None
    keys: Array | None = None
    random_score: Array | None = None
    grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)

    @property
    def patch(self) -> Array:
        """Whether each token is active and may be merged: [B, N] bool."""
        return self.member.any(axis=2) & ~self.prefix

    @property
    def counts(self) -> Array:
        """Number of active patch tokens of each image: [B, M] int32."""
        return (self.member & self.patch[:, :, None]).sum(axis=1, dtype=jnp.int32)

    def of_image(self, values: Array) -> Array:
        """Gives every token its image's value: [B, M] -> [B, N], 0 without an image."""
        return jnp.where(self.member, values[:, None], 0).sum(axis=2)


@struct.dataclass
class Merge:
    """The tokens kept in K positions, out of N, and the positions that the others are merged into.

    Attributes:
      kept: [B, K] int32, index of the token in each position; N where there is none.
      removed: [B, R] int32, indices of the tokens that are not kept; N where there is none.
      target: [B, R] int32, position that each removed token is merged into; K if it is dropped.
      kept_weight: [B, K] float32, weight of each kept token in the sum of its position; None if
        nothing is merged.
      removed_weight: [B, R] float32, weight of each removed token in the sum of its position.
    """

    kept: Array
    removed: Array
    target: Array
    kept_weight: Array | None = None
    removed_weight: Array | None = None

    def tokens(self, x: Array) -> Array:
        """Merges the tokens: [B, N, D] -> [B, K, D]."""
        kept = take(x, self.kept)
        if self.kept_weight is None or self.removed_weight is None or not self.removed.shape[1]:
            return kept
        onto = self.kept_weight[:, :, None] * kept.astype(jnp.float32)
        moved = (
            self.removed_weight[:, :, None] * take(x, self.removed).astype(jnp.float32)
        ).astype(x.dtype)
        # On CPU a scatter is faster (studies/merge_speed.py); a TPU is made for products.
        merged = lax.platform_dependent(
            onto, moved, self.target, cpu=add_by_scatter, default=add_by_product
        )
        return merged.astype(x.dtype)

    def normalized(self) -> "Merge":
        """Returns the same merge with the weights of each position summing to 1."""
        assert self.kept_weight is not None
        assert self.removed_weight is not None
        total = self.kept_weight + self._collected(self.removed_weight)
        total = jnp.where(total > 0, total, 1)
        weight = self.removed_weight / take(total, self.target, fill=1)
        return dataclasses.replace(
            self, kept_weight=self.kept_weight / total, removed_weight=weight
        )

    def sizes(self, size: Array) -> Array:
        """Sums the sizes of the tokens in each position: [B, N] -> [B, K]."""
        return take(size, self.kept) + self._collected(take(size, self.removed))

    def positions(self, count: int) -> Array:
        """Position of each of the `count` tokens after the merge: [B, N] int32; -1 if dropped."""
        own = jnp.arange(self.kept.shape[1], dtype=jnp.int32)[None]
        target = jnp.where(self.target < self.kept.shape[1], self.target, -1)
        position = jnp.concatenate([jnp.broadcast_to(own, self.kept.shape), target], axis=1)
        token = jnp.concatenate([self.kept, self.removed], axis=1)
        return put(position, token, count, fill=-1)

    @property
    def _to_target(self) -> Array:
        return jax.nn.one_hot(self.target, self.kept.shape[1], dtype=jnp.float32)

    def _collected(self, values: Array) -> Array:
        """Sums values of the tokens that are merged into each position: [B, R] -> [B, K]."""
        return jnp.einsum("brk,br->bk", self._to_target, values, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class KeepTable:
    """Number of patch tokens a layer keeps, for every number that an image may have.

    Attributes:
      kept: [n + 1] int32, number of patch tokens after the layer, indexed by the number before it.
    """

    kept: np.ndarray

    def of_tokens(self, tokens: "Tokens") -> Array:
        """Number of patch tokens that each token's image keeps: [B, N] int32."""
        return tokens.of_image(jnp.asarray(self.kept)[tokens.counts])

    def capacity(self, length: int, prefix: int, images: int) -> tuple[int, int]:
        """Computes the positions needed for every kept token of a row, and for every removed one.

        Args:
          length: Number of tokens of the row before.
          prefix: Number of prefix tokens of each image, which stay.
          images: Largest number of images in the row; the result is exact for 1, else a bound.
        """
        n = np.arange(len(self.kept))
        if images == 1:
            kept = prefix + int(self.kept[length - prefix])
            return kept, length - kept
        # An image keeps at most `over` tokens more than slope * its length, prefix included, and at
        # most `under` patch tokens less; sums over the images of a row give the bounds.
        slope = self.kept[-1] / n[-1]
        over = float((self.kept - slope * n).max()) + prefix * (1 - slope)
        under = float((slope * n - self.kept).max())
        kept = math.floor(slope * length + images * over + _ROUNDING)
        removed = math.floor((1 - slope) * length + images * under + _ROUNDING)
        return min(length, kept), min(length, removed)


class Reducer(nn.Module):
    """The rule by which a layer decides which tokens stay; one subclass and file for each.

    A Flax module, so that a learned one may have parameters of its own and draw random numbers.
    Class attributes ask for the inputs that it needs besides the tokens.

    Attributes:
      keep: Share of an image's patch tokens that stays, rounded up; above 0 and up to 1.
      remove: Number of tokens to remove instead, for reducers that take one; 0 leaves it to `keep`.
      index: Number of layers before this one that also have the reducer; 0 in the first.
      needs_importance: Whether the reducer needs `Tokens.importance`.
      needs_keys: Whether the reducer needs `Tokens.keys`.
      needs_random_score: Whether the reducer needs `Tokens.random_score`.
      takes_remove: Whether the reducer takes `remove`.
    """

    keep: float = 1.0
    remove: int = 0
    index: int = 0

    needs_importance: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False
    needs_random_score: ClassVar[bool] = False
    takes_remove: ClassVar[bool] = False

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...]:
        """Returns the layers that reduce if none are named, counted from 1: after each quarter."""
        return tuple(sorted({1 + depth * i // 4 for i in (1, 2, 3)}))

    def check_options(self) -> None:
        """Raises ValueError for invalid options; `keep` and `remove` are checked elsewhere."""

    @property
    def keeps_all(self) -> bool:
        """Whether all tokens stay, so that there is nothing to do."""
        return self.keep == 1 and not self.remove

    @property
    def counts_sizes(self) -> bool:
        """Whether attention in later layers counts each token by its size."""
        return False

    @property
    def least_keep(self) -> float:
        """Least share of the patch tokens that the reducer can leave."""
        return 0.0

    @property
    def needs_grid(self) -> bool:
        """Whether the reducer needs `Tokens.grid`, which mixed-scale models do not have."""
        return False

    def keep_table(self, most: int) -> KeepTable:
        """Returns the number of patch tokens kept, for images of up to `most` of them."""
        return KeepTable(kept_by_share(self.keep, most))

    def macs(self, before: np.ndarray, after: np.ndarray, width: int, heads: int) -> np.ndarray:
        """Counts multiply-accumulates of deciding and merging.

        Args:
          before: Number of tokens of an image, prefix included, any shape.
          after: Number of tokens that are left, same shape.
          width: Number of channels of a token.
          heads: Number of heads of the attention.
        """
        raise NotImplementedError

    def __call__(
        self, tokens: Tokens, table: KeepTable, capacity: tuple[int, int], *, train: bool = False
    ) -> Merge:
        """Decides what becomes of every token.

        Args:
          tokens: Sequence of tokens.
          table: Table of the number of patch tokens that each image keeps.
          capacity: Numbers of positions for kept and for removed tokens, from `KeepTable.capacity`.
            Positions that kept tokens leave free are given to inactive tokens, in their order.
          train: Whether the model is training.
        """
        raise NotImplementedError


def kept_by_share(share: float, most: int) -> np.ndarray:
    """Computes ceil(share * n), at least 1, of n = 0 to `most` tokens: [most + 1] int32."""
    n = np.arange(most + 1)
    return np.maximum(np.ceil(share * n - _ROUNDING), n > 0).astype(np.int32)


def importance_macs(before: np.ndarray, width: int, heads: int) -> np.ndarray:
    """Counts multiply-accumulates of `attention_received`.

    Counts a query, its product with the keys' kernel, and the product with every token for each
    head.
    """
    return 2 * width**2 + before * width * heads


def add_by_product(onto: Array, moved: Array, target: Array) -> Array:
    """Adds moved tokens to their targets by a product with a one-hot matrix.

    Args:
      onto: [B, K, D] float32, tokens that are added to.
      moved: [B, R, D], tokens to add.
      target: [B, R] int32, index into K for each moved token; K adds it to none.
    """
    to_target = jax.nn.one_hot(target, onto.shape[1], dtype=moved.dtype)
    exact = lax.Precision.HIGHEST if moved.dtype == jnp.float32 else None
    return onto + jnp.einsum(
        "brk,brd->bkd", to_target, moved, precision=exact, preferred_element_type=jnp.float32
    )


def add_by_scatter(onto: Array, moved: Array, target: Array) -> Array:
    """Does the same as `add_by_product`, by a scatter-add row by row."""
    add = lambda o, m, t: o.at[t].add(m, mode="drop")  # noqa: E731
    return jax.vmap(add)(onto, moved.astype(jnp.float32), target)


def take(values: Array, index: Array, fill: float = 0) -> Array:
    """Gathers rows of values [B, N, ...] by index [B, K]; `fill` where the index is N."""
    pick = lambda v, i: v.at[i].get(mode="clip", wrap_negative_indices=False)  # noqa: E731
    taken = jax.vmap(pick)(values, index)
    there = lax.expand_dims(index < values.shape[1], range(2, values.ndim))
    return jnp.where(there, taken, jnp.asarray(fill, values.dtype))


def merge_by_size(tokens: Tokens, kept: Array, removed: Array, target: Array) -> Merge:
    """Merges into means in which each token counts by its size; arguments as `Merge` has them."""
    kept_weight, removed_weight = (take(tokens.size, index) for index in (kept, removed))
    return Merge(kept, removed, target, kept_weight, removed_weight).normalized()


def unmerge(x: Array, position: Array) -> Array:
    """Gives every original token the merged token that it became part of.

    Args:
      x: [B, K, D] tokens after merging.
      position: [B, N] int32, position of each original token among the K, from `Merge.positions` or
        from several composed merges; -1 if it was dropped.

    Returns:
      [B, N, D] tokens, zeros where a token was dropped.
    """
    return take(x, jnp.where(position < 0, x.shape[1], position))


def compose(first: Array, then: Array) -> Array:
    """Composes the positions of two merges: [B, N] into K, then [B, K] -> [B, N]; -1 if dropped."""
    return take(then, jnp.where(first < 0, then.shape[1], first), fill=-1)


def attention_received(scores: Array, member: Array) -> Array:
    """Computes each token's attention from one query of its image, averaged over heads.

    Only one row of each image's attention matrix is needed, so the model's own attention can use
    any implementation.

    Args:
      scores: [B, H, M, N] float32, scores before the softmax of each image's `importance_query`.
      member: [B, N, M] bool, whether each token belongs to each image of its row.

    Returns:
      [B, N] float32, sums to 1 over the tokens of an image; 0 for inactive tokens.
    """
    seen = member.transpose(0, 2, 1)[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    largest = jnp.where(seen.any(axis=3, keepdims=True), scores.max(axis=3, keepdims=True), 0)
    shares = jnp.exp(scores - lax.stop_gradient(largest))
    total = shares.sum(axis=3, keepdims=True)
    return (shares / jnp.where(total > 0, total, 1)).sum(axis=2).mean(axis=1)


def importance_query(attn_input: Array, tokens: Tokens, *, mean: bool) -> Array:
    """Computes the attention input of each image's importance query: [B, N, D] -> [B, M, D].

    Args:
      attn_input: [B, N, D], input from which attention makes its queries.
      tokens: Sequence of tokens; the first one of each image is its class token.
      mean: Whether the query is the mean of the image's patch tokens, each counted by its size,
        instead of its class token.
    """
    if mean:
        weight = jnp.where(tokens.member & tokens.patch[:, :, None], tokens.size[:, :, None], 0)
        weight = weight / jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
    elif tokens.member.shape[2] == 1:
        return attn_input[:, :1]
    else:
        weight = tokens.member & (jnp.cumsum(tokens.member, axis=1) == 1)
    empty = ~tokens.member.any(axis=2)[:, :, None]
    attn_input = jnp.where(empty, 0, attn_input)
    exact = lax.Precision.HIGHEST if attn_input.dtype == jnp.float32 else None
    return jnp.einsum("bnm,bnd->bmd", weight.astype(attn_input.dtype), attn_input, precision=exact)


def random_score(x: Array) -> Array:
    """Computes random bits of each token from its own value: [B, N, D] -> [B, N] uint32."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return _scrambled(bits.sum(axis=2, dtype=jnp.uint32))


def _scrambled(bits: Array) -> Array:
    """Applies a bijection of 32 bits whose every output bit depends on all input bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def ranks(score: Array, member: Array) -> Array:
    """Counts the tokens of the same image that come before each, higher scores first.

    Compares all pairs: for a few hundred tokens this is cheaper than sorting, above all on TPUs.
    Ties keep the order of the tokens.

    Args:
      score: [B, N] scores.
      member: [B, N, M] bool, images of the tokens that are ranked; other tokens are not counted.
    """
    # before[b, i, j]: token j precedes token i, by a higher score or, for a tie, a lower index.
    ours, theirs = score[:, :, None], score[:, None, :]
    index = jnp.arange(score.shape[1])
    earlier = (index[None, :] < index[:, None])[None]
    before = (theirs > ours) | ((theirs == ours) & earlier)
    # same[b, i, j]: j is ranked in i's image; with a single image it depends on j alone.
    if member.shape[2] == 1:
        same = member[:, None, :, 0]
    else:
        image = jnp.where(member.any(axis=2), member.argmax(axis=2), -1)
        same = (image[:, :, None] == image[:, None, :]) & (image >= 0)[:, None, :]
    return (before & same).sum(axis=2, dtype=jnp.int32)


def assign_positions(
    tokens: Tokens, removed: Array, capacity: tuple[int, int], order: Array | None = None
) -> tuple[Array, Array, Array]:
    """Assigns positions to all tokens but the removed ones.

    Args:
      tokens: Sequence of tokens.
      removed: [B, N] bool, tokens that do not stay.
      capacity: Numbers of positions for kept and for removed tokens.
      order: [B, N] int32, position of each kept token among the kept of its image; None leaves them
        in their order.

    Returns:
      Indices of the kept [B, K] and the removed tokens [B, R], N where there is none, and each
      token's position [B, N] int32.
    """
    active = tokens.member.any(axis=2)
    kept, removed = active & ~removed, active & removed
    # Counts up to each token, in one sum; the others so far are inactive.
    kept_count, removed_count = jnp.cumsum(jnp.stack([kept, removed]), axis=2, dtype=jnp.int32)
    inactive_count = jnp.arange(1, active.shape[1] + 1)[None] - kept_count - removed_count
    # Kept tokens move up to close the gaps.
    position = kept_count - 1
    if order is not None:  # reorders within an image; images stay where they are
        position = position - position_in_image(tokens, kept) + order
    # Every position must hold a token: inactive ones, which stay inactive, follow the kept ones.
    behind = kept_count[:, -1:] - 1 + inactive_count
    # Removed tokens get an index beyond the capacity, which stands for no position.
    position = jnp.where(kept, position, jnp.where(active, capacity[0], behind))
    gone = jnp.where(removed, removed_count - 1, capacity[1])
    return _inverted(position, capacity[0]), _inverted(gone, capacity[1]), position


def position_in_image(tokens: Tokens, chosen: Array) -> Array:
    """Positions of chosen tokens among the chosen of their image: [B, N] bool -> int32."""
    if tokens.member.shape[2] == 1:
        return jnp.cumsum(chosen & tokens.member[:, :, 0], axis=1, dtype=jnp.int32) - 1
    earlier = jnp.cumsum(tokens.member & chosen[:, :, None], axis=1, dtype=jnp.int32)
    return jnp.where(tokens.member, earlier, 0).sum(axis=2) - 1


def list_chosen(chosen: Array, most: int) -> Array:
    """Lists the indices of chosen tokens in order: [B, N] bool -> [B, most] int32; N for none."""
    return _inverted(jnp.where(chosen, jnp.cumsum(chosen, axis=1) - 1, most), most)


def _inverted(position: Array, capacity: int) -> Array:
    """Finds the token in each position: [B, N] -> [B, capacity] int32; N where there is none."""
    count = position.shape[1]
    here = position[:, None, :] == jnp.arange(capacity, dtype=jnp.int32)[None, :, None]
    # At most one token is in a position, so the sum of index - count picks it, or 0 for none.
    back = jnp.arange(count, dtype=jnp.int32) - count
    return jnp.where(here, back, 0).sum(axis=2, dtype=jnp.int32) + count


def put(values: Array, index: Array, count: int, fill: int = 0) -> Array:
    """Undoes `take`: values [B, K] of tokens index [B, K] -> [B, N], `fill` for the others.

    Args:
      values: [B, K] values.
      index: [B, K] int32, index of each value's token, each token once; N for none.
      count: Number N of tokens.
      fill: Value of the other tokens: 0, or any integer for values that are integers.
    """
    # Compares all pairs, as in `ranks`; converters to other formats lack a scatter, too.
    here = index[:, None, :] == jnp.arange(count, dtype=index.dtype)[None, :, None]
    above = (values - fill)[:, None, :]
    return jnp.where(here, above, 0).sum(axis=2, dtype=values.dtype) + fill


def nearest(features: Array, tokens: Tokens, ours: Array, theirs: Array) -> tuple[Array, Array]:
    """Finds the most similar patch token of the same image.

    Args:
      features: [B, N, C], features of the tokens.
      tokens: Sequence of tokens.
      ours: [B, R] int32, indices of the tokens to find one for; N for none.
      theirs: [B, K] int32, indices of the tokens to choose from; N for none.

    Returns:
      Index into `theirs` [B, R] int32, K where there is none, and cosine similarity [B, R], 0 where
      there is none.
    """
    wide = features.astype(jnp.float32)
    length = jnp.sum(jnp.square(wide), axis=2, keepdims=True)
    unit = (wide * lax.rsqrt(jnp.maximum(length, 1e-12))).astype(features.dtype)
    exact = lax.Precision.HIGHEST if features.dtype == jnp.float32 else None
    similarity = jnp.einsum(
        "brd,bkd->brk",
        take(unit, ours),
        take(unit, theirs),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    image = tokens.member.argmax(axis=2) if tokens.member.shape[2] > 1 else 0
    image = jnp.where(tokens.patch, image, -1)
    own, other = take(image, ours, fill=-2), take(image, theirs, fill=-1)
    similarity = jnp.where(own[:, :, None] == other[:, None, :], similarity, -jnp.inf)
    best = similarity.max(axis=2)
    found = best > -jnp.inf
    target = jnp.where(found, similarity.argmax(axis=2), theirs.shape[1])
    return target.astype(jnp.int32), jnp.where(found, best, 0.0)
