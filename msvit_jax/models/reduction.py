"""Reducing tokens inside a backbone: which layers, how many tokens, and the state they carry.

A layer that reduces does so between its attention and its MLP, in every layout, mask-aware: what a
mask hides is never kept for its own sake, never a host and never counted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from numpy.typing import ArrayLike

from msvit_jax.models.attention import Mask, shelves_apart, shelves_together
from msvit_jax.tokens import merging
from msvit_jax.tokens.packing import NOBODY

REDUCERS = ("none", *merging.REDUCERS)


@dataclasses.dataclass(frozen=True)
class Stage:
    """How one layer reduces; all static.

    Attributes:
      reducer: one of `merging.REDUCERS`.
      keep: share of an image's patch tokens that stays, rounded up.
      remove: for "tome", instead: tokens to merge.
      weights: of "mergence", see `merging.reduce`.
      prefix: class, distillation and register tokens of an image.
      mean_query: importance is the attention of the mean patch query, not the class token's: for
        mean pooling, where no class token learns to look at what matters, but all patches do.
    """

    reducer: str
    keep: float = 1.0
    remove: int = 0
    weights: str = "similarity"
    prefix: int = 1
    mean_query: bool = False

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is to be done."""
        return self.keep == 1 and not self.remove

    def plan(self, most: int) -> merging.Plan:
        """The counts that it leaves of up to `most` patch tokens."""
        return merging.Plan(self.reducer, most, keep=self.keep, remove=self.remove)

    def macs(self, before: np.ndarray, after: np.ndarray, width: int, heads: int) -> np.ndarray:
        """Multiply-accumulates of deciding and merging, for sequences with their prefix.

        Args:
          before: tokens, any shape.
          after: likewise.
          width: channels of a token.
          heads: of the attention.
        """
        if self.keeps_all:
            return 0 * before
        removed = before - after
        # The class token's query, that through the keys' kernel, and its row for every head.
        scores = 2 * width**2 + before * width * heads
        merge = removed * after * width
        similarities = merge  # of each removed token to each that stays
        if self.reducer == "tome":
            return before / 2 * before / 2 * (width // heads) + merge
        parts = {"random": 0 * scores, "topk": scores, "evit": scores + merge}
        return parts.get(self.reducer, scores + similarities + merge)


@struct.dataclass
class Carried:
    """What tokens carry from layer to layer where some reduce; shapes as the tokens'.

    Attributes:
      size: [B, N] float32, how many of the first tokens each stands for.
      place: [B, N0] int32, where each of the first tokens is now; -1 if it was dropped.
      tag: [B, N] uint32, what a token keeps for as long as it is there: its luck for "random", else
        its place among the first tokens, which tells who is left.
      history: `place` after each reduction.
    """

    size: Array
    place: Array
    tag: Array
    history: tuple[Array, ...] = ()


def stages(
    *,
    reducer: str,
    layers: tuple[int, ...] | None,
    keep: float | tuple[float, ...],
    remove: int,
    weights: str,
    depth: int,
    patches: int,
    prefix: int,
    mean_query: bool,
) -> dict[int, Stage]:
    """The reducing layers, counted from 0, of a model.

    Args:
      reducer: one of `REDUCERS`.
      layers: counted from 1, as papers do; None: after each quarter of the depth (4, 7, 10 of 12),
        for "tome" with `remove` every layer.
      keep: for all layers, or for each.
      remove: tokens that "tome" merges in each layer; 0: `keep` says how many.
      weights: see `Stage`.
      depth: layers.
      patches: tokens of a training image on the grid.
      prefix: see `Stage`.
      mean_query: see `Stage`.

    Raises:
      ValueError: values that are not possible.
    """
    if reducer not in REDUCERS:
        raise ValueError(f"reducer={reducer!r} is none of {', '.join(REDUCERS)}.")
    if weights not in merging.WEIGHTS:
        raise ValueError(f"merge_weights={weights!r} is none of {', '.join(merging.WEIGHTS)}.")
    if reducer == "none":
        return {}
    if remove < 0 or (remove and reducer != "tome"):
        raise ValueError(
            f"remove={remove} is for reducer='tome' and not negative; {reducer!r} takes keep=."
        )
    if layers is None:
        quarters = sorted({1 + depth * i // 4 for i in (1, 2, 3)})
        layers = tuple(range(1, depth + 1)) if remove else tuple(quarters)
    if len(layers) > depth or len(set(layers)) < len(layers):
        raise ValueError(
            f"reduce_layers={layers}: {depth} different layers at most can reduce; name each once."
        )
    if not all(1 <= layer <= depth for layer in layers):
        raise ValueError(
            f"reduce_layers={layers}: the layers are counted from 1 to {depth}; use those."
        )
    rates = tuple(keep) if isinstance(keep, tuple | list) else (keep,) * len(layers)
    if len(rates) != len(layers):
        raise ValueError(
            f"keep={keep} has {len(rates)} rates, but {len(layers)} layers reduce "
            f"({', '.join(map(str, layers))}); give one rate for all, or one for each."
        )
    least = 0.5 if reducer == "tome" and not remove else 0.0
    for rate in rates:
        if not 0 < rate <= 1:
            raise ValueError(
                f"keep={rate} is not possible: it is the share of the tokens that a layer keeps, "
                "above 0 and up to 1."
            )
        if rate < least:
            raise ValueError(
                f"keep={rate} is not possible with reducer='tome', which merges half of the "
                "tokens at most; use 0.5 or more, or more reduce_layers."
            )
    made = {
        layer - 1: Stage(reducer, float(rate), remove, weights, prefix, mean_query)
        for layer, rate in sorted(zip(layers, rates, strict=True))
    }
    left = patches
    for layer, stage in made.items():
        if remove > left // 2:
            raise ValueError(
                f"remove={remove} is not possible in layer {layer + 1}: {left} tokens are left "
                "there, and half of them can be merged. Use less, or fewer reduce_layers."
            )
        left = int(stage.plan(left).kept[left])
    return made


def layer_tokens(made: dict[int, Stage], depth: int, tokens: ArrayLike) -> np.ndarray:
    """Patch tokens that enter each layer, and those after the last: [depth + 1, ...].

    Args:
      made: see `stages`.
      depth: layers.
      tokens: active patch tokens of images.
    """
    left = [np.asarray(tokens, np.float64)]
    for layer in range(depth):
        count = left[-1]
        if layer in made and count.size:
            kept = made[layer].plan(math.ceil(np.max(count))).kept
            count = np.interp(count, np.arange(len(kept)), kept)  # means of counts, too
        left.append(count)
    return np.stack(left)


def start(x: Array, made: dict[int, Stage]) -> Carried:
    """The state before the first layer, for tokens [B, N, D]."""
    batch, count, _ = x.shape
    place = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], (batch, count))
    return Carried(
        size=jnp.ones((batch, count), jnp.float32),
        place=place,
        tag=merging.luck_of(x) if by_luck(made) else place.astype(jnp.uint32),
    )


def by_luck(made: dict[int, Stage]) -> bool:
    """Whether luck decides; then nothing is merged."""
    return any(stage.reducer == "random" for stage in made.values())


def reduce(
    x: Array,
    seen: Array,
    key: Array,
    mask: Mask | None,
    carried: Carried,
    stage: Stage,
    scores: Callable[[Array, Array], Array],
) -> tuple[Array, Mask, Carried]:
    """Reduces tokens in any layout.

    Args:
      x: [B, N, D].
      seen: [B, N, D], what the layer's attention saw.
      key: [B, N, H, d] that it made of that.
      mask: of the layer.
      carried: so far.
      stage: how.
      scores: what a few tokens would see in that attention, before the softmax and up to what is
        the same for all: [B, M, D], [B, N, D] -> [B, H, M, N].

    Returns:
      Tokens [B, K, D], their mask and their state.
    """
    mask = mask or Mask()
    if stage.keeps_all:
        history = (*carried.history, carried.place)
        return x, mask, dataclasses.replace(carried, history=history)
    if not mask.shelves:
        return _reduce_rows(x, seen, key, mask, carried, stage, scores)
    groups, first = x.shape[0], 0
    parts, places = [], []
    apart = shelves_apart(mask, x, seen, key, carried.size, carried.tag)
    for (rows, _), (own, (part, s, k, size, tag)) in zip(mask.shelves, apart, strict=True):
        here = dataclasses.replace(start(part, {}), size=size, tag=tag)
        parts.append(_reduce_rows(part, s, k, own, here, stage, scores))
        count = parts[-1][0].shape[1]
        # Places of this shelf's rows within the group.
        row = jnp.arange(groups * rows, dtype=jnp.int32)[:, None] % rows
        place = parts[-1][2].place
        places.append(jnp.where(place < 0, -1, first + row * count + place))
        first += rows * count
    tokens, masks, states = zip(*parts, strict=True)
    together = functools.partial(shelves_together, groups=groups)
    mask = dataclasses.replace(
        mask,
        weights=together([m.weights for m in masks]),
        segments=together([m.segments for m in masks]),
        sizes=together([m.sizes for m in masks]),
        shelves=tuple(
            (rows, x.shape[1]) for (rows, _), x in zip(mask.shelves, tokens, strict=True)
        ),
    )
    place = merging.compose(carried.place, together(places))
    after = Carried(
        size=together([s.size for s in states]),
        place=place,
        tag=together([s.tag for s in states]),
        history=(*carried.history, place),
    )
    return together(tokens), mask, after


def _reduce_rows(
    x: Array,
    seen: Array,
    key: Array,
    mask: Mask,
    carried: Carried,
    stage: Stage,
    scores: Callable[[Array, Array], Array],
) -> tuple[Array, Mask, Carried]:
    member, prefix = _who(x, mask, stage.prefix)
    tokens = merging.Tokens(x, member, prefix, carried.size, luck=carried.tag)
    if stage.reducer == "tome":
        tokens = dataclasses.replace(tokens, keys=key.mean(axis=2))
    elif stage.reducer != "random":
        # The query of a mean of tokens is the mean of their queries.
        asking = merging.who_asks(seen, tokens, mean=stage.mean_query)
        importance = merging.attention_received(scores(asking, seen), member)
        tokens = dataclasses.replace(tokens, importance=importance)
    length, images = x.shape[1], member.shape[2]
    # A row ends with a run of empty places, which is no image.
    most = images if images == 1 else images - 1
    plan = stage.plan(length - stage.prefix)
    places = plan.places(length, stage.prefix, most)
    merge = merging.reduce(stage.reducer, tokens, plan, places, weights=stage.weights)
    size = merge.sizes(carried.size)
    place = merging.compose(carried.place, merge.place(length))
    after = Carried(
        size=size,
        place=place,
        tag=merging.take(carried.tag, merge.kept),
        history=(*carried.history, place),
    )
    return merge.tokens(x), _kept_mask(mask, merge, size, stage), after


def _kept_mask(mask: Mask, merge: merging.Merge, size: Array, stage: Stage) -> Mask:
    weights, segments = mask.weights, mask.segments
    return dataclasses.replace(
        mask,
        weights=None if weights is None else merging.take(weights, merge.kept, fill=1.0),
        segments=None if segments is None else merging.take(segments, merge.kept, fill=NOBODY),
        sizes=size if stage.reducer == "tome" else None,
    )


def _who(x: Array, mask: Mask, prefix: int) -> tuple[Array, Array]:
    """Whose tokens they are [B, N, M] and which of them are prefix tokens [B, N]."""
    batch, count, _ = x.shape
    place = jnp.arange(count)[None]
    active = jnp.ones((batch, count), bool)
    if mask.segments is not None:
        active = mask.segments != NOBODY
    if mask.segments is None or mask.alone:
        if mask.weights is not None:
            active &= mask.weights > 0.5
        return active[:, :, None], active & (place < prefix)
    new = jnp.pad(mask.segments[:, 1:] != mask.segments[:, :-1], ((0, 0), (1, 0)))
    run = jnp.cumsum(new, axis=1)
    first = lax.cummax(jnp.where(new, place, 0), axis=1)
    member = (run[:, :, None] == jnp.arange(mask.most)[None, None]) & active[:, :, None]
    return member, active & (place - first < prefix)
