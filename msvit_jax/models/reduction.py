"""Reducing tokens inside a backbone: which layers, how many tokens, and the state they carry.

A layer that reduces does so between its attention and its MLP, in every layout, mask-aware: what a
mask hides is never kept for its own sake, never a host and never counted.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from numpy.typing import ArrayLike

from msvit_jax.models.attention import Mask
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
      mean_question: importance is the attention of the mean patch query, not the class token's.
    """

    reducer: str
    keep: float = 1.0
    remove: int = 0
    weights: str = "similarity"
    prefix: int = 1
    mean_question: bool = False

    def plan(self, most: int) -> merging.Plan:
        """The counts that it leaves of up to `most` patch tokens."""
        return merging.Plan(self.reducer, most, keep=self.keep, remove=self.remove)

    def macs(self, before: np.ndarray, after: np.ndarray, width: int, key_width: int) -> np.ndarray:
        """Multiply-accumulates of deciding and merging, for sequences with their prefix.

        Args:
          before: tokens, any shape.
          after: likewise.
          width: channels of a token.
          key_width: channels of a key.
        """
        removed = before - after
        scores = before * width  # the class token's row
        merge = removed * after * width
        if self.reducer in ("topk", "random"):
            return scores if self.reducer == "topk" else 0 * scores
        if self.reducer == "evit":
            return scores + merge
        if self.reducer == "tome":
            return before / 2 * before / 2 * key_width + merge
        return scores + removed * after * width + merge


@struct.dataclass
class Carried:
    """What tokens carry from layer to layer where some reduce; shapes as the tokens'.

    Attributes:
      size: [B, N] float32, how many of the first tokens each stands for.
      place: [B, N0] int32, where each of the first tokens is now; -1 if it was dropped.
      luck: [B, N] uint32, for "random"; else None.
      history: `place` after each reduction.
    """

    size: Array
    place: Array
    luck: Array | None = None
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
    mean_question: bool,
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
      mean_question: see `Stage`.

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
        raise ValueError(f"reduce_layers={layers}: {depth} different layers at most can reduce.")
    if not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"reduce_layers={layers}: the layers are counted from 1 to {depth}.")
    rates = keep if isinstance(keep, tuple) else (keep,) * len(layers)
    if len(rates) != len(layers):
        raise ValueError(f"keep has {len(rates)} rates, but {len(layers)} layers reduce.")
    for rate in rates:
        if not 0 < rate <= 1:
            raise ValueError(f"keep={rate} is not a share above 0 and up to 1.")
    made = {
        layer - 1: Stage(reducer, float(rate), remove, weights, prefix, mean_question)
        for layer, rate in sorted(zip(layers, rates, strict=True))
    }
    left = patches
    for layer, stage in made.items():
        if remove > left // 2:
            raise ValueError(
                f"remove={remove} is not possible in layer {layer + 1}: {left} tokens are left "
                f"there, and half of them can be merged. Use less, or fewer reduce_layers."
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
            kept = made[layer].plan(int(np.ceil(count.max()))).kept
            count = np.interp(count, np.arange(len(kept)), kept)  # means of counts, too
        left.append(count)
    return np.stack(left)


def start(x: Array, made: dict[int, Stage]) -> Carried:
    """The state before the first layer, for tokens [B, N, D]."""
    batch, count, _ = x.shape
    place = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], (batch, count))
    random = any(stage.reducer == "random" for stage in made.values())
    return Carried(
        size=jnp.ones((batch, count), jnp.float32),
        place=place,
        luck=merging.luck_of(x) if random else None,
    )


def reduce(
    x: Array, query: Array, key: Array, mask: Mask | None, carried: Carried, stage: Stage
) -> tuple[Array, Mask | None, Carried]:
    """Reduces tokens in any layout.

    Args:
      x: [B, N, D].
      query: [B, N, H, d] of the layer's attention.
      key: likewise.
      mask: of the layer.
      carried: so far.
      stage: how.

    Returns:
      Tokens [B, K, D], their mask and their state.
    """
    if mask is None or not mask.shelves:
        return _reduce_rows(x, query, key, mask, carried, stage)
    ends = np.cumsum([rows * length for rows, length in mask.shelves])[:-1]
    groups = x.shape[0]
    parts, shelves, first, moved = [], [], 0, []
    arrays = (x, query, key, mask.weights, mask.segments, mask.sizes, carried.size, carried.luck)
    split = [
        [None] * len(mask.shelves) if a is None else jnp.split(a, ends, axis=1) for a in arrays
    ]
    for (rows, length), *part in zip(mask.shelves, *split, strict=True):
        px, pq, pk, weights, segments, sizes, size, luck = (
            None if a is None else a.reshape(-1, length, *a.shape[2:]) for a in part
        )
        own = dataclasses.replace(mask, weights=weights, segments=segments, sizes=sizes, shelves=())
        here = start(px, {}).replace(size=size, luck=luck)
        done = _reduce_rows(px, pq, pk, own, here, stage)
        count = done[0].shape[1]
        # Places of this shelf's rows within the group.
        row = jnp.arange(groups * rows, dtype=jnp.int32)[:, None] % rows
        place = done[2].place
        place = jnp.where(place < 0, -1, first + row * count + place)
        moved.append(place.reshape(groups, -1))
        first += rows * count
        shelves.append((rows, count))
        parts.append(done)
    together = (
        lambda *a: (  # noqa: E731
            None
            if a[0] is None
            else jnp.concatenate([b.reshape(groups, -1, *b.shape[2:]) for b in a], 1)
        )
    )
    masks = [part[1] for part in parts]
    states = [part[2] for part in parts]
    mask = dataclasses.replace(
        mask,
        weights=together(*(m.weights for m in masks)),
        segments=together(*(m.segments for m in masks)),
        sizes=together(*(m.sizes for m in masks)),
        shelves=tuple(shelves),
    )
    place = merging.compose(carried.place, jnp.concatenate(moved, axis=1))
    after = Carried(
        size=together(*(s.size for s in states)),
        place=place,
        luck=together(*(s.luck for s in states)),
        history=(*carried.history, place),
    )
    return together(*(part[0] for part in parts)), mask, after


def _reduce_rows(
    x: Array, query: Array, key: Array, mask: Mask | None, carried: Carried, stage: Stage
) -> tuple[Array, Mask | None, Carried]:
    member, prefix = _who(x, mask, stage.prefix)
    tokens = merging.Tokens(x, member, prefix, carried.size, luck=carried.luck)
    if stage.reducer == "tome":
        tokens = tokens.replace(keys=key.mean(axis=2))
    elif stage.reducer != "random":
        asked = merging.questions(query, tokens, mean=stage.mean_question)
        tokens = tokens.replace(importance=merging.attention_received(asked, key, member))
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
        luck=None if carried.luck is None else merging.take(carried.luck, merge.kept),
        history=(*carried.history, place),
    )
    return merge.tokens(x), _kept_mask(mask, merge, size, stage), after


def _kept_mask(mask: Mask | None, merge: merging.Merge, size: Array, stage: Stage) -> Mask | None:
    proportional = stage.reducer == "tome"
    if mask is None:
        return Mask(sizes=size) if proportional else None
    weights, segments = mask.weights, mask.segments
    return dataclasses.replace(
        mask,
        weights=None if weights is None else merging.take(weights, merge.kept, fill=1.0),
        segments=None if segments is None else merging.take(segments, merge.kept, fill=NOBODY),
        sizes=size if proportional else None,
    )


def _who(x: Array, mask: Mask | None, prefix: int) -> tuple[Array, Array]:
    """Whose tokens they are [B, N, M] and which of them are prefix tokens [B, N]."""
    batch, count, _ = x.shape
    place = jnp.arange(count)[None]
    active = jnp.ones((batch, count), bool)
    if mask is not None and mask.segments is not None:
        active = mask.segments != NOBODY
    if mask is None or mask.segments is None or mask.alone:
        if mask is not None and mask.weights is not None:
            active &= mask.weights > 0.5
        return active[:, :, None], active & (place < prefix)
    new = jnp.pad(mask.segments[:, 1:] != mask.segments[:, :-1], ((0, 0), (1, 0)))
    run = jnp.cumsum(new, axis=1)
    first = lax.cummax(jnp.where(new, place, 0), axis=1)
    member = (run[:, :, None] == jnp.arange(mask.most)) & active[:, :, None]
    return member, active & (place - first < prefix)
