"""Attention over short sequences as one kernel for TPUs, written in Pallas.

Scores of [heads, N, N] never leave the chip's fast memory (VMEM). A step of the kernel loads the
queries, keys and values of some images and of as few heads as fill whole tiles, and computes one
head after the other, forward or backward. Flash attention (Dao et al. 2022) does so in blocks
because long sequences do not fit; 197 to 1,024 tokens do, so nothing is rescaled and nothing is
padded to blocks. The backward pass computes the softmax again, as there. How heads lie in tiles,
the masks and the gradient to weights are our design.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from msvit_jax import sharding

HIDDEN = -30_000.0  # score of a key that is not seen; its exponential is exactly zero
LOG2_E = math.log2(math.e)
SAVED = (
    "attention"  # name of what attention's backward passes take, for policies of `jax.checkpoint`
)
_LANES = 128  # channels that a TPU's vector unit holds side by side
_SUBLANES = 16  # rows of a tile of bfloat16
_MOST_IMAGES = 8  # images in a step, beyond which steps cost no less
_STEP_SHARE = 16  # part of a chip's fast memory that a step loads and stores, which is held twice
_SCORE_BYTES = 2 << 20  # one array of scores of images that are computed side by side
_FORWARD_SCORES, _BACKWARD_SCORES = 4, 8  # arrays of scores of one head that are alive at a time

# Where JAX has it depends on the version.
_approximate_reciprocal = (pltpu if hasattr(pltpu, "reciprocal") else pl).reciprocal
dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


def most_tokens() -> int:
    """Most tokens for which a head's scores and what is computed of them fit the chip."""
    return 1024 if sharding.vmem_bytes() >= 64 << 20 else 640


@struct.dataclass
class KernelMask:
    """What is added to the scores; every part may be missing.

    Attributes:
      key_bias: [B, 1, N] float32, term added to the scores of each key, without gradient.
      segments: [B, N] int32; tokens see only tokens of their own segment.
      weights: [B, N] float32, 0 for a hidden key and 1 for all others, with the gradient of
        `attention._plain`.
      bias: [B, H, N, N], term added to each score, with gradient.
    """

    key_bias: Array | None = None
    segments: Array | None = None
    weights: Array | None = None
    bias: Array | None = None

    def arrays(self) -> dict[str, Array]:
        """Returns the parts that are there in the shapes that a kernel adds to scores [N, N]."""
        found = {"key_bias": self.key_bias, "bias": self.bias}
        if self.segments is not None:
            found |= {"segment_of_query": self.segments[:, :, None]}
            found |= {"segment_of_key": self.segments[:, None]}
        if self.weights is not None:
            found["weights"] = self.weights[:, None]
        return {name: x for name, x in found.items() if x is not None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(query: Array, key: Array, value: Array, mask: KernelMask, heads: int) -> Array:
    """Computes softmax attention, see `attention.attention`.

    Args:
      query: [B, N, H * d] queries, a head's channels side by side, N at most `most_tokens()`.
      key: [B, N, H * d] keys.
      value: [B, N, H * d] values.
      mask: Mask of the scores.
      heads: Number of heads H.

    Returns:
      [B, N, H * d] in the dtype of `value`. Products take the dtype of the queries, scores and
      exponentials are float32.
    """
    arrays = {"query": query, "key": key, "value": value, **mask.arrays()}

    @sharding.map_devices
    def run(arrays: dict[str, Array]) -> dict[str, Array]:
        results = {"out": arrays["value"]}
        return _call(forward_kernel, arrays, results, heads, _FORWARD_SCORES)

    return run(arrays)["out"]


def _forward(
    query: Array, key: Array, value: Array, mask: KernelMask, heads: int
) -> tuple[Array, tuple[Any, ...]]:
    out = checkpoint_name(attend(query, key, value, mask, heads), SAVED)
    return out, (query, key, value, mask, out)


def _backward(heads: int, kept: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    query, key, value, mask, out = kept
    arrays = {"query": query, "key": key, "value": value, "out": out, "cotangent": cotangent}

    @sharding.map_devices
    def run(arrays: dict[str, Array]) -> dict[str, Array]:
        names = ("query", "key", "value", "weights", "bias")
        results = {f"to_{name}": arrays[name] for name in names if name in arrays}
        return _call(_backward_kernel, arrays, results, heads, _BACKWARD_SCORES)

    found = run({**arrays, **mask.arrays()})
    to_weights = None if mask.weights is None else found["to_weights"][:, 0]
    to_mask = KernelMask(weights=to_weights, bias=found.get("to_bias"))
    return found["to_query"], found["to_key"], found["to_value"], to_mask


attend.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    arrays: Mapping[str, Array],
    results: Mapping[str, Any],
    heads: int,
    scores: int,
) -> dict[str, Array]:
    """Runs a kernel over all images, and over the heads of each a few at a time.

    Args:
      kernel: Function of an image's index in the step, the number of heads in the step, and a
        namespace of references.
      arrays: Inputs by name, [B, ...].
      results: Arrays like the outputs, by name.
      heads: Number of heads.
      scores: Number of arrays of a head's scores that the kernel needs at a time.
    """
    batch, length, width = arrays["query"].shape
    names, everything = (*arrays, *results), {**arrays, **results}
    together = heads_together(heads, width // heads)
    parts = heads // together
    shapes = {name: _step_shape(name, x, parts) for name, x in everything.items()}
    one = sum(padded_bytes(shapes[name], x.dtype) for name, x in everything.items())
    fits = [
        n
        for n in range(1, _MOST_IMAGES + 1)
        if batch % n == 0 and n * one <= sharding.vmem_bytes() // _STEP_SHARE
    ]
    images = max(fits, default=1)
    of_image = together * padded_bytes((length, length), jnp.float32)
    fits = [n for n in (2, 4) if images % n == 0 and n * of_image <= _SCORE_BYTES]
    side_by_side = max(fits, default=1)
    alive = side_by_side * scores * of_image

    def step(*references: Any) -> None:
        named = SimpleNamespace(**dict(zip(names, references, strict=True)))
        run = lambda image, _: kernel(image, together, named)  # noqa: E731
        lax.fori_loop(0, images, run, None, unroll=side_by_side)

    def block(name: str) -> pl.BlockSpec:
        where = {"bias": lambda i, j: (i, j, 0, 0), "tokens": lambda i, j: (i, 0, j)}
        where["mask"] = lambda i, j: (i, 0, 0)
        return pl.BlockSpec((images, *shapes[name]), where[_kind(name)])

    backward = "cotangent" in arrays
    found = pl.pallas_call(
        step,
        grid=(batch // images, parts),
        in_specs=[block(name) for name in arrays],
        out_specs=[block(name) for name in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=2 * images * one + alive + (8 << 20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * (5 if backward else 2) * batch * length**2 * width,
            transcendentals=batch * heads * length**2,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in everything.values()),
        ),
        name="short_attention_" + ("backward" if backward else "forward"),
    )(*arrays.values())
    return dict(zip(results, found, strict=True))


def _kind(name: str) -> str:
    """Tells whether an array's last axis holds channels, or it is a bias, or another mask."""
    if name in ("bias", "to_bias"):
        return "bias"
    masks = ("key_bias", "segment_of_query", "segment_of_key", "weights", "to_weights")
    return "mask" if name in masks else "tokens"


def _step_shape(name: str, x: Any, parts: int) -> tuple[int, ...]:
    """Shape of what a step sees of one image's array if its heads are done in so many parts."""
    first, *_, last = x.shape[1:]
    if _kind(name) == "bias":
        return first // parts, *x.shape[2:]
    return first, last // parts if _kind(name) == "tokens" else last


def heads_together(heads: int, channels: int) -> int:
    """Number of heads that are computed together: as few as fill whole tiles, or all."""
    fewest = _LANES // math.gcd(_LANES, channels)
    return heads if heads % fewest else fewest


def padded_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Bytes of an array whose last two axes are padded to whole tiles."""
    *outer, rows, columns = shape
    size = _up(rows, _SUBLANES) * _up(columns, _LANES)
    return math.prod(outer) * size * jnp.dtype(dtype).itemsize


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _tiles_of(head: int, channels: int, width: int) -> tuple[slice, int]:
    """Returns the whole tiles of channels that a head lies in, and where in them it begins."""
    start = head * channels
    first = start // _LANES * _LANES
    return slice(first, min(_up(start + channels, _LANES), width)), start - first


class _Head:
    """One head of one image: reads the tiles of channels that it lies in, and adds its results.

    A head of 64 channels fills half of a tile. Cutting it out would move it; instead the other
    half is zero in one factor of each product, which costs a TPU nothing, because its product is
    as wide as a tile. Results are kept in the head's own channels only.
    """

    def __init__(self, references: Any, image: Array, head: int, heads: int) -> None:
        width = references.query.shape[-1]
        channels = width // heads
        self.references, self.image, self.index = references, image, head
        self.scale = channels**-0.5
        self._tiles, begin = _tiles_of(head, channels, width)
        size = self._tiles.stop - self._tiles.start
        lane = lax.broadcasted_iota(jnp.int32, (1, size), 1)
        self._own = None if size == channels else (lane >= begin) & (lane < begin + channels)

    def tiles(self, name: str) -> Array:
        """Returns the tiles of an array: [N, channels of the tiles]."""
        return getattr(self.references, name)[self.image, :, self._tiles]

    def alone(self, name: str, factor: float = 1.0) -> Array:
        """Returns the tiles of an array times a factor, with zeros in other heads' channels."""
        x = self.tiles(name)
        factors = factor if self._own is None else jnp.where(self._own, factor, 0.0)
        return x if self._own is None and factor == 1.0 else _narrow(x, factors)

    def add(self, results: "_Results", name: str, x: Array) -> None:
        """Adds this head's channels of tiles in float32 to the results."""
        for first in range(self._tiles.start, self._tiles.stop, _LANES):
            lanes = slice(first - self._tiles.start, first - self._tiles.start + _LANES)
            before, part = results.get((name, first)), x[:, lanes]
            if before is not None and self._own is not None:
                part = jnp.where(self._own[:, lanes], part, before)
            results[name, first] = part


_Results = dict[tuple[str, int], Array]  # by the array's name and the tile's first channel


def _store(references: Any, image: Array, results: _Results) -> None:
    """Writes what all heads of a step have added, tile by tile: once, and in the arrays' dtype."""
    for (name, first), x in results.items():
        reference = getattr(references, name)
        reference[image, :, first : first + x.shape[1]] = x.astype(reference.dtype)


def _narrow(x: Array, factor: Array | float) -> Array:
    """Multiplies in float32, which a TPU's vector unit computes in, and returns x's dtype."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _masked_scores(head: _Head, query: Array, key: Array, shared: Array | None) -> Array:
    """Computes scores [N, N] float32: queries by keys, with all that is added but the weights.

    These are scores to the base of two: a TPU has no other exponential. `query` comes with the
    factor log2(e), a bias gets it here.
    """
    score = dot(query, key, (((1,), (1,)), ((), ())))
    if hasattr(head.references, "bias"):
        bias = head.references.bias[head.image, head.index].astype(jnp.float32)
        score += LOG2_E * bias
    return score if shared is None else score + shared


def _shared_bias(image: Array, references: Any) -> Array | None:
    """Computes what is added to the scores of all heads: [1 or N, N] float32."""
    shared = None
    if hasattr(references, "segment_of_key"):
        same = references.segment_of_query[image] == references.segment_of_key[image]
        shared = jnp.where(same, 0.0, HIDDEN)
    if hasattr(references, "key_bias"):
        own = LOG2_E * references.key_bias[image]
        shared = own if shared is None else shared + own
    return shared


def _hidden(image: Array, references: Any) -> Array | None:
    """Returns whether keys have weight zero: [1, N] bool."""
    return references.weights[image] < 0.5 if hasattr(references, "weights") else None


class _Softmax(NamedTuple):
    """Exponentials of scores [N, N], less the largest score of the keys shown, and their sums."""

    exponentials: Array
    total: Array
    largest: Array


def _softmax(score: Array, hidden: Array | None) -> _Softmax:
    if hidden is not None:
        score = jnp.where(hidden, HIDDEN, score)
    largest = jnp.max(score, axis=-1, keepdims=True)
    exponentials = jnp.exp2(score - largest)
    return _Softmax(exponentials, jnp.sum(exponentials, axis=-1, keepdims=True), largest)


def reciprocal(x: Array) -> Array:
    """Computes 1 / x for x between 1 and a million.

    A quotient looks after zeros and infinities as well, and takes three times as long.
    """
    inverse = _approximate_reciprocal(x, approx=True)  # right to 8 bits at least
    for _ in range(2):  # steps of Newton's method, which double the bits
        inverse = inverse * (2.0 - x * inverse)
    return inverse


# Kernels go through the stages of all heads one after the other, not through the heads: products,
# exponentials and sums run on different units, which the compiler then keeps busy side by side
# (docs/results/kernel_schedules.md).


def forward_kernel(
    image: Array, heads: int, references: Any, some: Sequence[int] | None = None
) -> None:
    """Computes `out` of an image from `query`, `key`, `value` and the mask.

    Args:
      image: Index of the image in all references.
      heads: Number of heads in the references.
      references: References by name.
      some: Heads to compute, which fill whole tiles; None for all.
    """
    shared, hidden = _shared_bias(image, references), _hidden(image, references)
    some = range(heads) if some is None else some
    of_image = [_Head(references, image, index, heads) for index in some]
    scores = [
        _masked_scores(head, head.alone("query", head.scale * LOG2_E), head.tiles("key"), shared)
        for head in of_image
    ]
    softmaxes = [_softmax(score, hidden) for score in scores]
    results: _Results = {}
    for head, softmax in zip(of_image, softmaxes, strict=True):
        value = head.tiles("value")
        mixed = dot(softmax.exponentials.astype(value.dtype), value, (((1,), (0,)), ((), ())))
        head.add(results, "out", mixed * reciprocal(softmax.total))
    _store(references, image, results)


def _backward_kernel(image: Array, heads: int, references: Any) -> None:
    """Computes all gradients of one image; the formulas are those of `attention._backward`."""
    shared, hidden = _shared_bias(image, references), _hidden(image, references)
    of_image = [_Head(references, image, index, heads) for index in range(heads)]
    queries = [head.alone("query", head.scale * LOG2_E) for head in of_image]
    scores = [
        _masked_scores(head, query, head.tiles("key"), shared)
        for head, query in zip(of_image, queries, strict=True)
    ]
    cotangents = [head.alone("cotangent") for head in of_image]
    moves = [_moves(*pair) for pair in zip(of_image, cotangents, strict=True)]
    shares = [_shares(score, hidden) for score in scores]
    slopes = [share * move for share, move in zip(shares, moves, strict=True)]
    if hidden is not None:
        to_weights = sum(jnp.sum(slope, axis=0, keepdims=True) for slope in slopes)
        before = jnp.where(pl.program_id(1) == 0, 0.0, references.to_weights[image])
        references.to_weights[image] = before + to_weights
        slopes, shares = ([jnp.where(hidden, 0.0, x) for x in xs] for xs in (slopes, shares))
    results: _Results = {}
    parts = (of_image, queries, cotangents, slopes, shares)
    for head, query, cotangent, slope, share in zip(*parts, strict=True):
        key = head.tiles("key")
        if hasattr(references, "bias"):
            references.to_bias[image, head.index] = slope.astype(references.to_bias.dtype)
        slope, share = slope.astype(key.dtype), share.astype(cotangent.dtype)
        to_query = dot(slope, key, (((1,), (0,)), ((), ())))
        head.add(results, "to_query", to_query * head.scale)
        to_key = dot(slope, query, (((0,), (0,)), ((), ())))
        head.add(results, "to_key", to_key / LOG2_E)
        head.add(results, "to_value", dot(share, cotangent, (((0,), (0,)), ((), ()))))
    _store(references, image, results)


def _moves(head: _Head, cotangent: Array) -> Array:
    """Computes how the loss changes with each query's share of each key's value: [N, N]."""
    gained = dot(cotangent, head.tiles("value"), (((1,), (1,)), ((), ())))
    product = cotangent.astype(jnp.float32) * head.tiles("out").astype(jnp.float32)
    return gained - jnp.sum(product, axis=-1, keepdims=True)


def _shares(score: Array, hidden: Array | None) -> Array:
    """Computes the softmax [N, N]; a hidden key's share is the one it would get if switched on."""
    softmax = _softmax(score, hidden)
    shares = softmax.exponentials * reciprocal(softmax.total)
    if hidden is None:
        return shares
    alone = 1 / (1 + jnp.exp2(softmax.largest + jnp.log2(softmax.total) - score))
    return jnp.where(hidden, alone, shares)
