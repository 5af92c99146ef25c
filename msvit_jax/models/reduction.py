"""Token reduction inside a backbone: in which layers, how many, and the state of the tokens.

A layer that reduces does so between its attention and its MLP, in every layout and aware of masks:
what a mask hides is never kept for its own sake, never merged into and never counted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from numpy.typing import ArrayLike

from msvit_jax import reducers
from msvit_jax.errors import check_choice, nearest
from msvit_jax.models.attention import Mask, join_buckets, split_buckets
from msvit_jax.reducers import base
from msvit_jax.tokens.packing import NOBODY, changes

UNMERGE = ("copy", "residual")  # values of `ViT.unmerge`


@dataclasses.dataclass(frozen=True)
class ReductionSpec:
    """The way one layer reduces tokens; all attributes are static.

    Attributes:
      reducer: Name in `reducers.REDUCERS`.
      options: Names and values of the reducer's attributes.
      prefix: Number of class, distillation and register tokens of an image.
      mean_query: Whether importance is the attention of the mean patch query instead of the class
        token's; for mean pooling, where no class token learns to attend to what matters.
    """

    reducer: str
    options: tuple[tuple[str, Any], ...] = ()
    prefix: int = 1
    mean_query: bool = False

    def make(self) -> base.Reducer:
        """Makes the reducer, to be a submodule of the layer or used without parameters."""
        return reducers.REDUCERS[self.reducer](**dict(self.options), parent=None)


@struct.dataclass
class ReductionState:
    """State that tokens carry from layer to layer where some reduce; shapes as the tokens'.

    Attributes:
      size: [B, N] float32, number of input tokens that each token stands for.
      position: [B, N0] int32, current position of each input token; -1 if it was dropped.
      token_id: [B, N] int32, index of each token among the input tokens.
      random_score: [B, N] uint32, random bits of each token; None unless a reducer is random.
      history: Values of `position` after each reduction.
      residual: [B, N0, D] float32, what un-merging adds to the token that each input token is part
        of now, so that each keeps its own features: those from before each merge, less those of the
        merged token. None where un-merging copies.
      grid: (rows, columns) of the patch tokens as long as they are a whole grid, see `base.Tokens`.
    """

    size: Array
    position: Array
    token_id: Array
    random_score: Array | None = None
    history: tuple[Array, ...] = ()
    residual: Array | None = None
    grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)

    @property
    def targets(self) -> Array:
        """Index of the input token that each is part of now: [B, N0] int32; -1 if dropped."""
        found = base.take(self.token_id, jnp.maximum(self.position, 0))
        return jnp.where(self.position < 0, -1, found)

    def unmerge(self, x: Array) -> Array:
        """Gives each input token what became of it: [B, N, D] -> [B, N0, D]."""
        copies = base.unmerge(x, self.position)
        if self.residual is None:
            return copies
        return (copies.astype(jnp.float32) + self.residual).astype(x.dtype)


def reduction_specs(
    *,
    reducer: str,
    layers: Sequence[int] | None,
    keep: float | Sequence[float],
    remove: int | Sequence[int],
    options: Mapping[str, Any],
    depth: int,
    patches: int,
    prefix: int,
    mean_query: bool,
) -> dict[int, ReductionSpec]:
    """Specifies the reducing layers of a model, counted from 0.

    Args:
      reducer: Name of the reducer, one of `reducers.NAMES`.
      layers: Layers that reduce, counted from 1 as in papers; None takes the reducer's own (after
        each quarter of the depth, 4, 7, 10 of 12, for most), and all layers with `remove`.
      keep: Share of the tokens that stays, for all layers or for each.
      remove: Number of tokens merged instead, for all layers or for each; 0 leaves it to `keep`.
      options: Other attributes of the reducer, by name.
      depth: Number of layers.
      patches: Number of patch tokens of a training image.
      prefix: Number of class, distillation and register tokens of an image.
      mean_query: Whether importance is the attention of the mean patch query, see `ReductionSpec`.

    Raises:
      ValueError: The values are not possible.
    """
    check_choice("reducer", reducer, reducers.NAMES)
    if reducer == "none":
        return {}
    kind = reducers.REDUCERS[reducer]
    _check_options(kind, reducer, options)
    removing = any(_listed(remove))
    if min(_listed(remove)) < 0 or (removing and not kind.takes_remove):
        takers = " or ".join(repr(n) for n, k in reducers.REDUCERS.items() if k.takes_remove)
        raise ValueError(
            f"remove={remove} is for reducer={takers} and not negative; {reducer!r} takes keep=."
        )
    if layers is None:
        layers = tuple(range(1, depth + 1)) if removing else kind.default_layers(depth)
    _check_layers(layers, depth)
    rates = _for_each("keep", 1.0 if removing else keep, layers)
    numbers = _for_each("remove", remove, layers)
    made: dict[int, ReductionSpec] = {}
    for layer, rate, number in sorted(zip(layers, rates, numbers, strict=True)):
        own = {"keep": float(rate), "remove": int(number), "index": len(made)}
        spec = ReductionSpec(reducer, (*own.items(), *sorted(options.items())), prefix, mean_query)
        _check_rate(rate, reducer, spec.make().least_keep)
        made[layer - 1] = spec
    _check_numbers(made, patches)
    return made


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _for_each(name: str, value: Any, layers: Sequence[int]) -> tuple[Any, ...]:
    """Returns one value for each layer."""
    values = _listed(value)
    if not isinstance(value, tuple | list):
        values = values * len(layers)
    if len(values) != len(layers):
        unit = "rates" if name == "keep" else "numbers"
        raise ValueError(
            f"{name}={value} has {len(values)} {unit}, but {len(layers)} layers reduce "
            f"({', '.join(map(str, layers))}); give one for all, or one for each."
        )
    return values


def _check_options(kind: type[base.Reducer], reducer: str, options: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    for name in options:
        if name not in known:
            raise ValueError(f"reducer={reducer!r} has no option {name!r}.{nearest(name, known)}")
    kind(**options, parent=None).check_options()


def _check_layers(layers: Sequence[int], depth: int) -> None:
    if len(layers) > depth or len(set(layers)) < len(layers):
        raise ValueError(
            f"reduce_layers={layers}: {depth} different layers at most can reduce; name each once."
        )
    if not all(1 <= layer <= depth for layer in layers):
        raise ValueError(
            f"reduce_layers={layers}: the layers are counted from 1 to {depth}; use those."
        )


def _check_rate(rate: float, reducer: str, least: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(
            f"keep={rate} is not possible: it is the share of the tokens that a layer keeps, "
            "above 0 and up to 1."
        )
    if rate < least:
        raise ValueError(
            f"keep={rate} is not possible with reducer={reducer!r}, which leaves {least:g} of the "
            f"tokens at least; use {least:g} or more, or more reduce_layers."
        )


def _check_numbers(made: dict[int, ReductionSpec], patches: int) -> None:
    left = patches
    for layer, spec in made.items():
        reducer = spec.make()
        if reducer.remove > left // 2:
            raise ValueError(
                f"remove={reducer.remove} is not possible in layer {layer + 1}: {left} tokens are "
                "left there, and half of them can be merged. Use less, or fewer reduce_layers."
            )
        left = int(reducer.keep_table(left).kept[left])


def layer_tokens(specs: dict[int, ReductionSpec], depth: int, tokens: ArrayLike) -> np.ndarray:
    """Counts the patch tokens that enter each layer, and those after the last: [depth + 1, ...].

    Args:
      specs: Reducing layers, from `reduction_specs`.
      depth: Number of layers.
      tokens: Numbers of active patch tokens of images, any shape.
    """
    left = [np.asarray(tokens, np.float64)]
    for layer in range(depth):
        count = left[-1]
        if layer in specs and count.size:
            kept = specs[layer].make().keep_table(math.ceil(np.max(count))).kept
            count = np.interp(count, np.arange(len(kept)), kept)  # also for fractional means
        left.append(count)
    return np.stack(left)


def start(
    x: Array,
    specs: dict[int, ReductionSpec],
    grid: tuple[int, int] | None = None,
    *,
    residual: bool = False,
) -> ReductionState:
    """Makes the state before the first layer.

    Args:
      x: [B, N, D] tokens.
      specs: Reducing layers, from `reduction_specs`.
      grid: (rows, columns) of the patch tokens if they are a whole grid.
      residual: Whether each token keeps its own features for un-merging.
    """
    batch, count, _ = x.shape
    position = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], (batch, count))
    is_random = any(reducers.REDUCERS[spec.reducer].needs_random_score for spec in specs.values())
    return ReductionState(
        size=jnp.ones((batch, count), jnp.float32),
        position=position,
        token_id=position,
        random_score=base.random_score(x) if is_random else None,
        residual=jnp.zeros(x.shape, jnp.float32) if residual else None,
        grid=grid,
    )


def reduce(
    x: Array,
    attn_input: Array,
    key: Array,
    mask: Mask | None,
    state: ReductionState,
    *,
    spec: ReductionSpec,
    reducer: base.Reducer,
    scores: Callable[[Array, Array], Array],
    train: bool,
) -> tuple[Array, Mask, ReductionState]:
    """Reduces tokens in any layout.

    Args:
      x: [B, N, D] tokens.
      attn_input: [B, N, D], input of the layer's attention.
      key: [B, N, H, d], keys of the layer's attention.
      mask: Mask of the layer.
      state: State of the tokens.
      spec: Specification of the layer's reduction.
      reducer: The layer's reducer, bound to its parameters.
      scores: Function for pre-softmax scores of M queries, up to a constant for each: [B, M, D],
        [B, N, D] -> [B, H, M, N].
      train: Whether the model is training.

    Returns:
      Tokens [B, K, D], their mask and their state.
    """
    mask = mask or Mask()
    if reducer.keeps_all:
        return x, mask, dataclasses.replace(state, history=(*state.history, state.position))
    rows = functools.partial(_reduce_rows, spec=spec, reducer=reducer, scores=scores, train=train)
    reduce_all = functools.partial(_reduce_buckets, rows=rows) if mask.length_buckets else rows
    shorter, mask, after = reduce_all(x, attn_input, key, mask, state)
    if state.residual is not None:
        before, merged = (
            s.unmerge(t).astype(jnp.float32) for s, t in ((state, x), (after, shorter))
        )
        after = dataclasses.replace(after, residual=before - merged)
    return shorter, mask, after


def _reduce_buckets(
    x: Array,
    attn_input: Array,
    key: Array,
    mask: Mask,
    state: ReductionState,
    *,
    rows: Callable[..., tuple[Array, Mask, ReductionState]],
) -> tuple[Array, Mask, ReductionState]:
    """Reduces tokens in rows of several lengths, each length by itself."""
    groups, first = x.shape[0], 0
    parts, positions = [], []
    apart = split_buckets(mask, x, attn_input, key, state.size, state.token_id, state.random_score)
    for (count, _), (own, arrays) in zip(mask.length_buckets, apart, strict=True):
        part, part_input, part_key, size, token_id, random_score = arrays
        here = dataclasses.replace(
            start(part, {}), size=size, token_id=token_id, random_score=random_score
        )
        parts.append(rows(part, part_input, part_key, own, here))
        length = parts[-1][0].shape[1]
        # Positions of this bucket's rows within the group.
        row = jnp.arange(groups * count, dtype=jnp.int32)[:, None] % count
        position = parts[-1][2].position
        positions.append(jnp.where(position < 0, -1, first + row * length + position))
        first += count * length
    tokens, masks, states = zip(*parts, strict=True)
    together = functools.partial(join_buckets, groups=groups)
    mask = dataclasses.replace(
        mask,
        weights=together([m.weights for m in masks]),
        segments=together([m.segments for m in masks]),
        sizes=together([m.sizes for m in masks]),
        length_buckets=tuple(
            (count, x.shape[1]) for (count, _), x in zip(mask.length_buckets, tokens, strict=True)
        ),
    )
    position = base.compose(state.position, together(positions))
    after = ReductionState(
        size=together([s.size for s in states]),
        position=position,
        token_id=together([s.token_id for s in states]),
        random_score=together([s.random_score for s in states]),
        history=(*state.history, position),
    )
    return together(tokens), mask, after


def _reduce_rows(
    x: Array,
    attn_input: Array,
    key: Array,
    mask: Mask,
    state: ReductionState,
    *,
    spec: ReductionSpec,
    reducer: base.Reducer,
    scores: Callable[[Array, Array], Array],
    train: bool,
) -> tuple[Array, Mask, ReductionState]:
    member, prefix = _segment_membership(x, mask, spec.prefix)
    tokens = base.Tokens(x, member, prefix, state.size, grid=state.grid)
    if reducer.needs_random_score:
        tokens = dataclasses.replace(tokens, random_score=state.random_score)
    if reducer.needs_keys:
        tokens = dataclasses.replace(tokens, keys=key.mean(axis=2))
    if reducer.needs_importance:
        # The query of a mean of tokens is the mean of their queries.
        query = base.importance_query(attn_input, tokens, mean=spec.mean_query)
        importance = base.attention_received(scores(query, attn_input), member)
        tokens = dataclasses.replace(tokens, importance=importance)
    length, images = x.shape[1], member.shape[2]
    # The last run of a row is empty positions, not an image.
    most = images if images == 1 else images - 1
    table = reducer.keep_table(length - spec.prefix)
    merge = reducer(tokens, table, table.capacity(length, spec.prefix, most), train=train)
    size = merge.sizes(state.size)
    position = base.compose(state.position, merge.positions(length))
    score = state.random_score
    after = ReductionState(
        size=size,
        position=position,
        token_id=base.take(state.token_id, merge.kept),
        random_score=None if score is None else base.take(score, merge.kept),
        history=(*state.history, position),
    )
    return merge.tokens(x), _kept_mask(mask, merge, size if reducer.counts_sizes else None), after


def _kept_mask(mask: Mask, merge: base.Merge, sizes: Array | None) -> Mask:
    weights, segments = mask.weights, mask.segments
    return dataclasses.replace(
        mask,
        weights=None if weights is None else base.take(weights, merge.kept, fill=1.0),
        segments=None if segments is None else base.take(segments, merge.kept, fill=NOBODY),
        sizes=sizes,
    )


def _segment_membership(x: Array, mask: Mask, prefix: int) -> tuple[Array, Array]:
    """Returns tokens' images within a row [B, N, M] and whether they are prefix tokens [B, N]."""
    batch, count, _ = x.shape
    position = jnp.arange(count)[None]
    active = jnp.ones((batch, count), bool)
    if mask.segments is not None:
        active = mask.segments != NOBODY
    if mask.segments is None or mask.single_segment:
        if mask.weights is not None:
            active &= mask.weights > 0.5
        return active[:, :, None], active & (position < prefix)
    new = changes(mask.segments)
    run = jnp.cumsum(new, axis=1)
    first = lax.cummax(jnp.where(new, position, 0), axis=1)
    member = (run[:, :, None] == jnp.arange(mask.max_segments)[None, None]) & active[:, :, None]
    return member, active & (position - first < prefix)
