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
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from msvit_jax import sharding

HIDDEN = -30_000.0  # score of a key that is not seen; its exponential is exactly zero
MOST_TOKENS = 1024  # beyond, a head's scores and what is computed of them do not fit
_LANES = 128  # channels that a TPU's vector unit holds side by side
_SUBLANES = 16  # rows of a tile of bfloat16
_MOST_IMAGES = 8  # images in a step, beyond which steps cost no less
_STEP_BYTES = 4 << 20  # what a step loads and stores, which is held twice
_FORWARD_SCORES, _BACKWARD_SCORES = 4, 8  # arrays of scores of one head that are alive at a time

_product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(query: Array, key: Array, value: Array, mask: KernelMask, heads: int) -> Array:
    """Computes softmax attention, see `attention.attention`.

    Args:
      query: [B, N, H * d] queries, a head's channels side by side, N at most `MOST_TOKENS`.
      key: [B, N, H * d] keys.
      value: [B, N, H * d] values.
      mask: Mask of the scores.
      heads: Number of heads H.

    Returns:
      [B, N, H * d] in the dtype of `value`. Products take the dtype of the queries, scores and
      exponentials are float32.
    """
    arrays = {"query": query, "key": key, "value": value, **_mask_arrays(mask)}

    @sharding.map_devices
    def run(arrays: dict[str, Array]) -> dict[str, Array]:
        results = {"out": arrays["value"]}
        return _call(_forward_kernel, arrays, results, heads, _FORWARD_SCORES)

    return run(arrays)["out"]


def _forward(
    query: Array, key: Array, value: Array, mask: KernelMask, heads: int
) -> tuple[Array, tuple[Any, ...]]:
    out = attend(query, key, value, mask, heads)
    return out, (query, key, value, mask, out)


def _backward(heads: int, kept: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    query, key, value, mask, out = kept
    arrays = {"query": query, "key": key, "value": value, "out": out, "cotangent": cotangent}

    @sharding.map_devices
    def run(arrays: dict[str, Array]) -> dict[str, Array]:
        names = ("query", "key", "value", "weights", "bias")
        results = {f"to_{name}": arrays[name] for name in names if name in arrays}
        return _call(_backward_kernel, arrays, results, heads, _BACKWARD_SCORES)

    found = run({**arrays, **_mask_arrays(mask)})
    to_weights = None if mask.weights is None else found["to_weights"][:, 0]
    to_mask = KernelMask(weights=to_weights, bias=found.get("to_bias"))
    return found["to_query"], found["to_key"], found["to_value"], to_mask


attend.defvjp(_forward, _backward)


def _mask_arrays(mask: KernelMask) -> dict[str, Array]:
    """Gives the parts of a mask the shapes that the kernel adds to scores [N, N]."""
    found = {"key_bias": mask.key_bias, "bias": mask.bias}
    if mask.segments is not None:
        found |= {"segment_of_query": mask.segments[:, :, None]}
        found |= {"segment_of_key": mask.segments[:, None]}
    if mask.weights is not None:
        found["weights"] = mask.weights[:, None]
    return {name: x for name, x in found.items() if x is not None}


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
    together = _heads_together(heads, width // heads)
    parts = heads // together
    shapes = {name: _step_shape(name, x, parts) for name, x in everything.items()}
    one = sum(_vmem_bytes(shapes[name], x.dtype) for name, x in everything.items())
    fits = [n for n in range(1, _MOST_IMAGES + 1) if batch % n == 0 and n * one <= _STEP_BYTES]
    images = max(fits, default=1)
    alive = together * scores * _vmem_bytes((length, length), jnp.float32)

    def step(*references: Any) -> None:
        named = SimpleNamespace(**dict(zip(names, references, strict=True)))
        lax.fori_loop(0, images, lambda image, _: kernel(image, together, named), None)

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


def _heads_together(heads: int, channels: int) -> int:
    """Number of heads in a step: as few as fill whole tiles of channels, or all."""
    fewest = _LANES // math.gcd(_LANES, channels)
    return heads if heads % fewest else fewest


def _vmem_bytes(shape: Sequence[int], dtype: Any) -> int:
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
    """One head of one image: reads and writes the tiles of channels that it lies in.

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

    def alone(self, x: Array) -> Array:
        """Returns tiles with zeros in the channels of other heads."""
        if self._own is None:
            return x
        return jnp.where(self._own, x.astype(jnp.float32), 0.0).astype(x.dtype)

    def write(self, name: str, x: Array) -> None:
        """Writes this head's channels of tiles in float32."""
        reference = getattr(self.references, name)
        if self._own is not None:
            x = jnp.where(self._own, x, self.tiles(name).astype(jnp.float32))
        reference[self.image, :, self._tiles] = x.astype(reference.dtype)


def _masked_scores(head: _Head, query: Array, key: Array, shared: Array | None) -> Array:
    """Computes scores [N, N] float32: queries by keys, with all that is added but the weights."""
    score = _product(query, key, (((1,), (1,)), ((), ())))
    if hasattr(head.references, "bias"):
        score += head.references.bias[head.image, head.index].astype(jnp.float32)
    return score if shared is None else score + shared


def _shared_bias(image: Array, references: Any) -> Array | None:
    """Computes what is added to the scores of all heads: [1 or N, N] float32."""
    shared = None
    if hasattr(references, "segment_of_key"):
        same = references.segment_of_query[image] == references.segment_of_key[image]
        shared = jnp.where(same, 0.0, HIDDEN)
    if hasattr(references, "key_bias"):
        own = references.key_bias[image]
        shared = own if shared is None else shared + own
    return shared


def _hidden(image: Array, references: Any) -> Array | None:
    """Returns whether keys have weight zero: [1, N] bool."""
    return references.weights[image] < 0.5 if hasattr(references, "weights") else None


def _softmax(score: Array, hidden: Array | None) -> tuple[Array, Array, Array]:
    """Returns exponentials [N, N], their sums and the largest scores [N, 1], of the keys shown."""
    if hidden is not None:
        score = jnp.where(hidden, HIDDEN, score)
    largest = jnp.max(score, axis=-1, keepdims=True)
    exponentials = jnp.exp(score - largest)
    return exponentials, jnp.sum(exponentials, axis=-1, keepdims=True), largest


def _forward_kernel(image: Array, heads: int, references: Any) -> None:
    shared, hidden = _shared_bias(image, references), _hidden(image, references)
    for index in range(heads):
        head = _Head(references, image, index, heads)
        query = head.alone(head.tiles("query") * head.scale)
        score = _masked_scores(head, query, head.tiles("key"), shared)
        exponentials, total, _ = _softmax(score, hidden)
        value = head.tiles("value")
        mixed = _product(exponentials.astype(value.dtype), value, (((1,), (0,)), ((), ())))
        head.write("out", mixed / total)


def _backward_kernel(image: Array, heads: int, references: Any) -> None:
    """Computes all gradients of one image; the formulas are those of `attention._backward`."""
    shared, hidden = _shared_bias(image, references), _hidden(image, references)
    to_weights = None
    for index in range(heads):
        head = _Head(references, image, index, heads)
        query, key = head.alone(head.tiles("query") * head.scale), head.tiles("key")
        score = _masked_scores(head, query, key, shared)
        exponentials, total, largest = _softmax(score, hidden)
        shares = exponentials / total
        if hidden is not None:
            # A hidden key's share is the one that it would get if it alone were switched on.
            alone = jax.nn.sigmoid(score - (largest + jnp.log(total)))
            shares = jnp.where(hidden, alone, shares)
        cotangent, out = head.alone(head.tiles("cotangent")), head.tiles("out")
        gained = _product(cotangent, head.tiles("value"), (((1,), (1,)), ((), ())))
        mean = jnp.sum(
            cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True
        )
        slope = shares * (gained - mean)
        if hidden is not None:
            moved = jnp.sum(slope, axis=0, keepdims=True)
            to_weights = moved if to_weights is None else to_weights + moved
            slope, shares = (jnp.where(hidden, 0.0, x) for x in (slope, shares))
        if hasattr(references, "bias"):
            references.to_bias[image, index] = slope.astype(references.to_bias.dtype)
        narrow = slope.astype(key.dtype)
        head.write("to_query", _product(narrow, key * head.scale, (((1,), (0,)), ((), ()))))
        head.write("to_key", _product(narrow, query, (((0,), (0,)), ((), ()))))
        shares = shares.astype(cotangent.dtype)
        head.write("to_value", _product(shares, cotangent, (((0,), (0,)), ((), ()))))
    if to_weights is not None:
        before = jnp.where(pl.program_id(1) == 0, 0.0, references.to_weights[image])
        references.to_weights[image] = before + to_weights
