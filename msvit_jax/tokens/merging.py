"""Merging: which tokens of a sequence stay, and into which of them the others go.

Pure functions with static shapes: every reducer returns a `Merge`, made of comparisons, cumulative
sums and gathers; merging is one sum into hosts. Token Mergence (Bian et al. 2023, arXiv 2306.04897)
has no public code and only its abstract was at hand, so "mergence" is our reconstruction; the
others are the baselines it has to beat, after their papers' descriptions.

* "mergence": the most important tokens stay, each other one is merged into the nearest of them.
* "topk": the most important stay, the others are dropped (EViT without fusion).
* "evit": as topk, the others are fused into one (Liang et al. 2022, section 3).
* "tome": bipartite soft matching by keys (Bolya et al. 2023, section 3). The only one that lays
  what stays in another order, see `_tome_order`.
* "random": tokens chosen by chance stay.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

REDUCERS = ("mergence", "topk", "evit", "tome", "random")
WEIGHTS = ("similarity", "size")
_ROUNDING = 1e-9  # 0.7 x 30 must not come out above 21


@struct.dataclass
class Tokens:
    """A sequence of tokens of one or several images, as a reducer sees it.

    Attributes:
      x: [B, N, D]. What inactive places hold, NaN even, reaches no other place.
      member: [B, N, M] bool, the image of a row that a token belongs to; none: an inactive place,
        which is never kept for its own sake, never a host and never counted.
      prefix: [B, N] bool, class, distillation and register tokens, which stay as they are. They
        come first in their image.
      size: [B, N] float32, how many of the first tokens a token stands for.
      importance: [B, N] float32, for the reducers that want it: see `attention_received`.
      keys: [B, N, C] of attention, for "tome".
      luck: [B, N] uint32, for "random".
    """

    x: Array
    member: Array
    prefix: Array
    size: Array
    importance: Array | None = None
    keys: Array | None = None
    luck: Array | None = None

    @property
    def patch(self) -> Array:
        """[B, N] bool, active tokens that may be merged."""
        return self.member.any(axis=2) & ~self.prefix

    @property
    def counts(self) -> Array:
        """[B, M] int32, active patch tokens of each image."""
        return (self.member & self.patch[:, :, None]).sum(axis=1, dtype=jnp.int32)

    def of_image(self, values: Array) -> Array:
        """Gives every token its image's value: [B, M] -> [B, N], 0 without an image."""
        return jnp.where(self.member, values[:, None], 0).sum(axis=2)


@struct.dataclass
class Merge:
    """Which of N tokens get one of K places, and what becomes of the others.

    Attributes:
      kept: [B, K] int32, the token that has a place; N: nobody.
      removed: [B, R] int32, tokens that have none; N: nobody.
      host: [B, R] int32, the place that a removed token is merged into; K: it is dropped.
      own: [B, K] float32, a kept token's share of what its place holds; None: all of it.
      share: [B, R] float32, likewise of the removed ones.
    """

    kept: Array
    removed: Array
    host: Array
    own: Array | None = None
    share: Array | None = None

    def tokens(self, x: Array) -> Array:
        """[B, N, D] -> [B, K, D]."""
        kept = take(x, self.kept)
        if self.own is None or self.share is None or not self.removed.shape[1]:
            return kept
        onto = self.own[:, :, None] * kept.astype(jnp.float32)
        moved = (self.share[:, :, None] * take(x, self.removed).astype(jnp.float32)).astype(x.dtype)
        # benchmarks/merge.py measures both on CPU; a TPU is made for products.
        merged = lax.platform_dependent(
            onto, moved, self.host, cpu=add_by_scatter, default=add_by_product
        )
        return merged.astype(x.dtype)

    def normalised(self) -> "Merge":
        """The same merge with the shares of each place summing to 1."""
        assert self.own is not None
        assert self.share is not None
        total = self.own + self._collected(self.share)
        total = jnp.where(total > 0, total, 1)
        share = self.share / take(total, self.host, fill=1)
        return dataclasses.replace(self, own=self.own / total, share=share)

    def sizes(self, size: Array) -> Array:
        """Sizes of the places, sums of their tokens': [B, N] -> [B, K]."""
        return take(size, self.kept) + self._collected(take(size, self.removed))

    def place(self, count: int) -> Array:
        """Where each of the `count` tokens went: [B, N] int32; -1 if dropped."""
        places = jnp.arange(self.kept.shape[1], dtype=jnp.int32)[None]
        host = jnp.where(self.host < self.kept.shape[1], self.host, -1)
        place = jnp.concatenate([jnp.broadcast_to(places, self.kept.shape), host], axis=1)
        token = jnp.concatenate([self.kept, self.removed], axis=1)
        return _put(place, token, count, fill=-1)

    @property
    def _to_host(self) -> Array:
        return jax.nn.one_hot(self.host, self.kept.shape[1], dtype=jnp.float32)

    def _collected(self, values: Array) -> Array:
        """Sums over the tokens that are merged into each place: [B, R] -> [B, K]."""
        return jnp.einsum("brk,br->bk", self._to_host, values, precision=lax.Precision.HIGHEST)


def add_by_product(onto: Array, moved: Array, host: Array) -> Array:
    """Adds moved tokens to their hosts' places by a product with a one-hot matrix.

    Args:
      onto: [B, K, D] float32.
      moved: [B, R, D].
      host: [B, R] int32; K: to none.
    """
    to_host = jax.nn.one_hot(host, onto.shape[1], dtype=moved.dtype)
    exact = lax.Precision.HIGHEST if moved.dtype == jnp.float32 else None
    return onto + jnp.einsum(
        "brk,brd->bkd", to_host, moved, precision=exact, preferred_element_type=jnp.float32
    )


def add_by_scatter(onto: Array, moved: Array, host: Array) -> Array:
    """The same as `add_by_product`, by a scatter-add row by row."""
    add = lambda o, m, h: o.at[h].add(m, mode="drop")  # noqa: E731
    return jax.vmap(add)(onto, moved.astype(jnp.float32), host)


def take(values: Array, index: Array, fill: float = 0) -> Array:
    """Rows of values [B, N, ...] by index [B, K]; `fill` where the index is N."""
    spread = index.reshape(*index.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, spread, axis=1, mode="fill", fill_value=fill)


def unmerge(x: Array, place: Array) -> Array:
    """Puts the merged token into every place that was merged into it.

    Args:
      x: [B, K, D].
      place: [B, N] int32, see `Merge.place`; may be composed of several merges.

    Returns:
      [B, N, D], zeros where a token was dropped.
    """
    return take(x, jnp.where(place < 0, x.shape[1], place))


def compose(first: Array, then: Array) -> Array:
    """The place after two merges: [B, N] into K places, then [B, K] -> [B, N]; -1 if dropped."""
    return take(then, jnp.where(first < 0, then.shape[1], first), fill=-1)


def attention_received(scores: Array, member: Array) -> Array:
    """The attention that each token gets from one query of its image, mean over heads.

    Only one row of each image's attention matrix is wanted, so the model's own attention can be
    of any implementation.

    Args:
      scores: [B, H, M, N] float32, before the softmax, of the token of each image that `who_asks`.
      member: [B, N, M] bool.

    Returns:
      [B, N] float32, sums to 1 over the tokens of an image; 0 for inactive places.
    """
    seen = member.transpose(0, 2, 1)[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    largest = jnp.where(seen.any(axis=3, keepdims=True), scores.max(axis=3, keepdims=True), 0)
    shares = jnp.exp(scores - lax.stop_gradient(largest))
    total = shares.sum(axis=3, keepdims=True)
    return (shares / jnp.where(total > 0, total, 1)).sum(axis=2).mean(axis=1)


def who_asks(seen: Array, tokens: Tokens, *, mean: bool) -> Array:
    """The token of each image whose query says what is important: [B, N, D] -> [B, M, D].

    Args:
      seen: what attention makes its queries of.
      tokens: that they belong to; the first of each image is its class token, unless
      mean: take the mean of the image's patch tokens, each counted by its size.
    """
    if mean:
        weight = jnp.where(tokens.member & tokens.patch[:, :, None], tokens.size[:, :, None], 0)
        weight = weight / jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
    elif tokens.member.shape[2] == 1:
        return seen[:, :1]
    else:
        weight = tokens.member & (jnp.cumsum(tokens.member, axis=1) == 1)
    empty = ~tokens.member.any(axis=2)[:, :, None]
    seen = jnp.where(empty, 0, seen)
    exact = lax.Precision.HIGHEST if seen.dtype == jnp.float32 else None
    return jnp.einsum("bnm,bnd->bmd", weight.astype(seen.dtype), seen, precision=exact)


def luck_of(x: Array) -> Array:
    """Random bits for each token, a function of its own value: [B, N, D] -> [B, N] uint32."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return _scrambled(bits.sum(axis=2, dtype=jnp.uint32))


def _scrambled(bits: Array) -> Array:
    """A bijection of 32 bits whose every output bit depends on all of the input's."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


class Plan:
    """How many tokens a stage leaves, for every number that an image may have.

    Attributes:
      crucial: [n + 1] int32, of n patch tokens so many stay by their own importance.
      kept: [n + 1] int32, patch tokens after the stage.
    """

    def __init__(self, reducer: str, most: int, *, keep: float = 1.0, remove: int = 0) -> None:
        """Counts.

        Args:
          reducer: one of `REDUCERS`.
          most: patch tokens that an image, or a row of images, can have.
          keep: share of the patch tokens that stays, rounded up.
          remove: instead, for "tome": tokens to merge, at most half of them.
        """
        n = np.arange(most + 1)
        if remove:
            crucial = n - np.minimum(remove, n // 2)
        else:
            crucial = np.maximum(np.ceil(keep * n - _ROUNDING), n > 0)
            if reducer == "tome":  # each token that stays can take in any number, half can go
                crucial = np.maximum(crucial, n - n // 2)
        fused = (crucial < n) if reducer == "evit" else 0
        self.crucial = crucial.astype(np.int32)
        self.kept = (crucial + fused).astype(np.int32)

    def places(self, length: int, prefix: int, images: int) -> tuple[int, int]:
        """Places that hold every kept token of a row, and every removed one.

        Args:
          length: places of the row before.
          prefix: tokens of each image that stay.
          images: in the row, at most; 1: exact, else an upper bound.
        """
        n = np.arange(len(self.kept))
        if images == 1:
            kept = prefix + int(self.kept[length - prefix])
            return kept, length - kept
        slope = self.kept[-1] / n[-1]
        over = float((self.kept - slope * n).max()) + prefix * (1 - slope)
        under = float((slope * n - self.kept).max())
        kept = math.floor(slope * length + images * over + _ROUNDING)
        removed = math.floor((1 - slope) * length + images * under + _ROUNDING)
        return min(length, kept), min(length, removed)


def reduce(
    reducer: str,
    tokens: Tokens,
    plan: Plan,
    places: tuple[int, int],
    *,
    weights: str = "similarity",
) -> Merge:
    """Decides what becomes of every token.

    Args:
      reducer: one of `REDUCERS`.
      tokens: the sequence.
      plan: how many tokens stay.
      places: for kept and removed tokens, see `Plan.places`; what kept tokens leave free is given
        to inactive places, in their order.
      weights: how "mergence" mixes the tokens of a place: "similarity" (softmax of cosine
        similarities to the host, which itself counts with 1; after TPS, Wei et al. 2023) or "size".
    """
    crucial, stay = (
        tokens.of_image(jnp.asarray(table)[tokens.counts]) for table in (plan.crucial, plan.kept)
    )
    if reducer == "tome":
        return _tome(tokens, stay, places)
    score = tokens.importance
    if reducer == "random":
        assert tokens.luck is not None
        score = (tokens.luck >> 8).astype(jnp.float32)
    assert score is not None
    rank = _ranks(score, tokens.member & tokens.patch[:, :, None])
    if reducer == "evit":
        return _fused(tokens, score, rank, crucial, stay, places)
    kept, removed, _ = _placed(tokens, tokens.patch & (rank >= crucial), places)
    if reducer in ("topk", "random"):
        return Merge(kept, removed, jnp.full(removed.shape, places[0], jnp.int32))
    host, similarity = _nearest(tokens.x, tokens, removed, kept)
    if weights == "size":
        own, share = take(tokens.size, kept), take(tokens.size, removed)
    else:
        own, share = jnp.full(kept.shape, jnp.e, jnp.float32), jnp.exp(similarity)
    return Merge(kept, removed, host, own, share).normalised()


def _fused(
    tokens: Tokens, score: Array, rank: Array, crucial: Array, stay: Array, places: tuple[int, int]
) -> Merge:
    """EViT: the most important of the others holds the sum of all of them, not normalised."""
    kept, removed, place = _placed(tokens, tokens.patch & (rank >= stay), places)
    fuses = tokens.patch & (rank == crucial) & (rank < stay)
    # The place of the image's fused token, for each of its tokens.
    where = jnp.where(tokens.member & fuses[:, :, None], place[:, :, None], 0).sum(axis=1)
    host = take(tokens.of_image(where), removed, fill=places[0])
    own = take(jnp.where(fuses, score, 1.0), kept)
    return Merge(kept, removed, host, own, take(score, removed))


def _tome(tokens: Tokens, stay: Array, places: tuple[int, int]) -> Merge:
    """Tokens at even positions of an image go into those at odd ones, the most similar first."""
    assert tokens.keys is not None
    position = _position(tokens, tokens.member.any(axis=2))
    source, target = (tokens.patch & (position % 2 == parity) for parity in (0, 1))
    half = -(-tokens.x.shape[1] // 2)
    # Each image of a row may begin with either parity.
    spare = min(tokens.x.shape[1], half + tokens.member.shape[2] - 1)
    sources, targets = (_listed(chosen, spare) for chosen in (source, target))
    best, similarity = _nearest(tokens.keys, tokens, sources, targets)
    count = tokens.x.shape[1]
    rank = _ranks(_put(similarity, sources, count), tokens.member & source[:, :, None])
    goes = tokens.of_image(tokens.counts) - stay
    leaves = source & (rank < goes)
    # An image that loses nothing stays as it is.
    order = jnp.where(goes > 0, _tome_order(tokens, source, leaves, rank - goes), position)
    kept, removed, place = _placed(tokens, leaves, places, order)
    host_token = _put(take(targets, best), sources, count)
    host = take(take(place, host_token), removed, fill=places[0])
    own, share = take(tokens.size, kept), take(tokens.size, removed)
    return Merge(kept, removed, host, own, share).normalised()


def _tome_order(tokens: Tokens, source: Array, leaves: Array, similar: Array) -> Array:
    """Position of each token that stays, among those of its image, as ToMe's own code has it.

    First the prefix, then sources that were not merged, then targets. The next layer takes every
    other token of this order, so another order would make other groups there.

    Args:
      tokens: the sequence.
      source: [B, N] bool, patch tokens at even positions.
      leaves: [B, N] bool, which of them are merged.
      similar: [B, N] int32, position by similarity of the sources that are not merged: their order
        in images without a prefix. ToMe sorts them back only to get the class token to the front.

    Returns:
      [B, N] int32; anything for tokens that do not stay.
    """
    front = tokens.prefix | (source & ~leaves)
    back = tokens.patch & ~source
    has_prefix, front_count = (
        tokens.of_image((tokens.member & chosen[:, :, None]).sum(axis=1, dtype=jnp.int32))
        for chosen in (tokens.prefix, front)
    )
    ahead = jnp.where(has_prefix > 0, _position(tokens, front), similar)
    return jnp.where(back, front_count + _position(tokens, back), ahead)


def _ranks(score: Array, member: Array) -> Array:
    """How many of an image's tokens come before each, higher scores first, ties by place.

    By comparing all pairs: for a few hundred tokens cheaper than sorting, above all on TPUs.

    Args:
      score: [B, N].
      member: [B, N, M] bool, of the tokens that are ranked.
    """
    ours, theirs = score[:, :, None], score[:, None, :]
    index = jnp.arange(score.shape[1])
    earlier = (index[None, :] < index[:, None])[None]
    before = (theirs > ours) | ((theirs == ours) & earlier)
    if member.shape[2] == 1:
        same = member[:, None, :, 0]
    else:
        image = jnp.where(member.any(axis=2), member.argmax(axis=2), -1)
        same = (image[:, :, None] == image[:, None, :]) & (image >= 0)[:, None, :]
    return (before & same).sum(axis=2, dtype=jnp.int32)


def _placed(
    tokens: Tokens, removed: Array, places: tuple[int, int], order: Array | None = None
) -> tuple[Array, Array, Array]:
    """Gives places to all but the removed: indices of both, and each token's place.

    Args:
      tokens: the sequence.
      removed: [B, N] bool.
      places: for kept and removed tokens.
      order: [B, N] int32, position of each kept token among those of its image; None: as they are.
    """
    active = tokens.member.any(axis=2)
    kept = active & ~removed
    position = jnp.cumsum(kept, axis=1) - 1
    if order is not None:  # images stay where they are
        position = position - _position(tokens, kept) + order
    # A reduced sequence must have somebody in each place; inactive tokens stay inactive.
    behind = kept.sum(axis=1, keepdims=True) + jnp.cumsum(~active, axis=1) - 1
    place = jnp.where(kept, position, jnp.where(active, places[0], behind))
    gone = jnp.where(removed, jnp.cumsum(removed, axis=1) - 1, places[1])
    return _inverted(place, places[0]), _inverted(gone, places[1]), place.astype(jnp.int32)


def _position(tokens: Tokens, chosen: Array) -> Array:
    """Positions of the chosen tokens among the chosen of their image: [B, N] bool -> int32."""
    earlier = jnp.cumsum(tokens.member & chosen[:, :, None], axis=1, dtype=jnp.int32)
    return jnp.where(tokens.member, earlier, 0).sum(axis=2) - 1


def _listed(chosen: Array, most: int) -> Array:
    """Indices of the chosen tokens in their order: [B, N] bool -> [B, most] int32; N: none."""
    return _inverted(jnp.where(chosen, jnp.cumsum(chosen, axis=1) - 1, most), most)


def _inverted(place: Array, places: int) -> Array:
    """The token in each place: [B, N] -> [B, places] int32; N where there is none."""
    count = place.shape[1]
    here = place[:, None, :] == jnp.arange(places)[None, :, None]
    token = jnp.where(here, jnp.arange(count), 0).sum(axis=2)
    return jnp.where(here.any(axis=2), token, count).astype(jnp.int32)


def _put(values: Array, index: Array, count: int, fill: float = 0) -> Array:
    """Undoes `take`: values [B, K] of tokens index [B, K] -> [B, N], `fill` for the others."""
    # By comparing, as in `_ranks`; a scatter is what converters to other formats lack, too.
    here = index[:, None, :] == jnp.arange(count, dtype=index.dtype)[None, :, None]
    put = jnp.where(here, values[:, None, :], 0).sum(axis=2, dtype=values.dtype)
    return jnp.where(here.any(axis=2), put, jnp.asarray(fill, values.dtype))


def _nearest(features: Array, tokens: Tokens, ours: Array, theirs: Array) -> tuple[Array, Array]:
    """The most similar patch token of the same image.

    Args:
      features: [B, N, C].
      tokens: that they belong to.
      ours: [B, R] indices.
      theirs: [B, K] indices.

    Returns:
      [B, R] int32 index into `theirs`, K without one, and the cosine similarity.
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
    image = jnp.where(tokens.patch, tokens.member.argmax(axis=2), -1)
    own, other = take(image, ours, fill=-2), take(image, theirs, fill=-1)
    similarity = jnp.where(own[:, :, None] == other[:, None, :], similarity, -jnp.inf)
    best = similarity.max(axis=2)
    found = best > -jnp.inf
    host = jnp.where(found, similarity.argmax(axis=2), theirs.shape[1])
    return host.astype(jnp.int32), jnp.where(found, best, 0.0)
