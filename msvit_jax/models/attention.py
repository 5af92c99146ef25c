"""Multi-head attention as one pure function, the only one in the library.

Its implementations are interchangeable: plain XLA, `jax.nn.dot_product_attention` with a fused
kernel where the platform has one, and for TPUs Pallas kernels: ours for short sequences, see
`attention_kernel`, JAX's flash attention for long ones.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from msvit_jax import sharding
from msvit_jax.errors import check_choice
from msvit_jax.models import attention_kernel, packed_attention
from msvit_jax.tokens.packing import NOBODY, changes
from msvit_jax.typed import Float

BiasFactors = tuple[Array, Array]

IMPLEMENTATIONS = ("auto", "xla", "fused", "pallas")
_FAR = -attention_kernel.HIDDEN  # larger than the difference of any two scores of a row
# Least tokens for our TPU kernel: up to a tile XLA keeps the scores on the chip by itself.
_SHORT_FROM = 129
_FLASH_BLOCK = 128  # tokens in a block of flash attention, which takes whole blocks only


@struct.dataclass
class Mask:
    """Which tokens see which; without any of these every token of a row sees every other.

    Attributes:
      weights: [B, N], weight of each token as a key, 0 or 1, with at least one 1 in every row; 0
        hides it from all tokens. Gradient reaches the weights, also those of hidden tokens.
      segments: [B, N] int32, index of the image that each token belongs to, `NOBODY` for an empty
        position. Tokens see their own image only; what an empty position holds, NaN even, reaches
        no image.
      sizes: [B, N] float32, number of tokens that each stands for; its key counts that many times
        (ToMe's proportional attention).
      bias: [B, H, N, N], term added to the scores (relationship reuse: DVT, section 3.3). Rows are
        then images, without length buckets.
      length_buckets: Pairs (rows, length), one for each length bucket, where rows of several
        lengths are laid end to end; the first axis of all arrays is then groups, the second all
        positions of a group. Empty: B rows of length N.
      single_segment: Whether each row holds at most one image, starting at its first position,
        without a gap.
      max_segments: Largest number of segments in a row; unused with `single_segment`.
      images: Number of images in the batch, if there are segments: an int, or a symbolic size where
        the batch's is left open.
    """

    weights: Array | None = None
    segments: Array | None = None
    sizes: Array | None = None
    bias: Array | None = None
    length_buckets: tuple[tuple[int, int], ...] = struct.field(pytree_node=False, default=())
    single_segment: bool = struct.field(pytree_node=False, default=False)
    max_segments: int = struct.field(pytree_node=False, default=2)
    images: Any = struct.field(pytree_node=False, default=0)

    @property
    def only_hides(self) -> bool:
        """Whether tokens are shown or hidden and nothing else, without a gradient to the mask."""
        return self.weights is None and self.sizes is None and self.bias is None


def attention(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B N H d"],
    value: Float[Array, "B N H d"],
    mask: Mask | None = None,
    *,
    implementation: str = "auto",
) -> Float[Array, "B N H d"]:
    """Computes softmax attention within rows among the tokens that the mask shows.

    out_i = sum_j w_j exp(q_i k_j / sqrt(d)) v_j / sum_j w_j exp(q_i k_j / sqrt(d)) over the tokens
    j of i's image; a bias b_ij, if there is one, is added to q_i k_j / sqrt(d). With weights it is
    the masked attention of MSViT (section 3) and DynamicViT. The weights multiply the exponentials,
    so a straight-through weight of 0 hides its key and still receives gradient, which an additive
    mask of minus infinity would not give.

    Args:
      query: [B, N, H, d] queries.
      key: [B, N, H, d] keys.
      value: [B, N, H, d] values.
      mask: Attention mask; None if all tokens of a row see each other.
      implementation: Implementation to use, one of `IMPLEMENTATIONS`; "auto" chooses by platform,
        dtype and length.

    Returns:
      [B, N, H, d] in the dtype of `value`. Scores and exponentials are float32.

    Raises:
      ValueError: The implementation is unknown, or does not support the mask.
    """
    check_choice("attention_impl", implementation, IMPLEMENTATIONS)
    mask = mask or Mask()
    if mask.length_buckets and mask.bias is not None:
        raise ValueError("An attention bias cannot be combined with length buckets.")
    if not _takes_packed(query, mask, implementation):
        return _by_buckets(query, key, value, mask, implementation)
    if implementation == "fused":
        return _packed(query, key, value, mask)
    others = functools.partial(_by_buckets, implementation="xla")
    return lax.platform_dependent(query, key, value, mask, cuda=_packed, default=others)


def _by_buckets(query: Array, key: Array, value: Array, mask: Mask, implementation: str) -> Array:
    if not mask.length_buckets:
        return _attend(query, key, value, mask, implementation)
    parts = [
        _attend(q, k, v, own, implementation)
        for own, (q, k, v) in split_buckets(mask, query, key, value)
    ]
    return join_buckets(parts, query.shape[0])


def split_buckets(mask: Mask, *arrays: Any) -> list[tuple[Mask, list[Any]]]:
    """Cuts a mask and arrays [G, T, ...] into length buckets, each [G * rows, length, ...]."""
    ends = list(itertools.accumulate(rows * length for rows, length in mask.length_buckets))[:-1]
    parts = []
    # Split instead of sliced: the gradient of slices is a sum of arrays as large as the whole.
    split = lambda x: (  # noqa: E731
        [None] * len(mask.length_buckets) if x is None else jnp.split(x, ends, axis=1)
    )
    names = ("weights", "segments", "sizes")
    everything = (*(getattr(mask, name) for name in names), *arrays)
    for (_, length), *part in zip(mask.length_buckets, *map(split, everything), strict=True):
        cut = [None if x is None else x.reshape(-1, length, *x.shape[2:]) for x in part]
        fields: dict[str, Any] = dict(zip(names, cut, strict=False))
        own = dataclasses.replace(mask, length_buckets=(), **fields)
        parts.append((own, cut[len(names) :]))
    return parts


def join_buckets(parts: Sequence[Any], groups: Any) -> Any:
    """Lays buckets end to end again: each [G * rows, length, ...] -> [G, T, ...]."""
    if parts[0] is None:
        return None
    flat = [x.reshape(groups, -1, *x.shape[2:]) for x in parts]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)


def _attend(query: Array, key: Array, value: Array, mask: Mask, implementation: str) -> Array:
    if mask.weights is None and mask.segments is not None:
        # Zero times NaN is NaN, so the contents of empty positions are replaced, not just hidden.
        key, value = (packed_attention.emptied(x, mask.segments) for x in (key, value))
    if implementation == "auto":
        return _auto(query, key, value, mask)
    if implementation == "fused" and mask.weights is not None:
        raise ValueError(
            "attention_impl='fused' gives no gradient to the weights of the slots and trimmed "
            "layouts; use 'auto', 'xla' or 'pallas' with them."
        )
    if implementation == "pallas":
        return _checked_pallas(query, mask)(query, key, value, mask)
    return {"xla": _xla, "fused": _fused}[implementation](query, key, value, mask)


def _checked_pallas(query: Array, mask: Mask) -> Any:
    if jax.default_backend() == "gpu":
        raise ValueError("attention_impl='pallas' is a kernel for TPUs; use 'auto' or 'fused'.")
    kernel = _tpu_kernel(query, mask)
    if kernel is None:
        raise ValueError(
            f"attention_impl='pallas' takes more than {attention_kernel.most_tokens()} tokens only "
            "without a gate's weights, sizes and bias; use 'auto' or 'xla'."
        )
    return kernel


def _tpu_kernel(query: Array, mask: Mask) -> Any:
    """Returns the Pallas implementation for this length and mask, None if there is none."""
    if query.shape[1] <= attention_kernel.most_tokens():
        return _short
    return _flash if mask.only_hides else None


def _takes_tpu_kernel(x: Array, mask: Mask) -> bool:
    """Tells whether "auto" takes a Pallas kernel on TPUs, for arrays [B, N, ...] of x's dtype."""
    if not may_run_kernel(x) or x.shape[1] < _SHORT_FROM:
        return False
    return _tpu_kernel(x, mask) is not None


def may_run_kernel(x: Array) -> bool:
    """Tells whether a Pallas kernel for TPUs may be traced for arrays [B, ...] of x's dtype."""
    # Elsewhere it would cost tracing, and an export for several platforms cannot hold it.
    if sharding.platform() != "tpu":
        return False
    # A TPU has no float16. A kernel has to be told which images are on which device.
    known = isinstance(x.shape[0], int) and sharding.can_map(x.shape[0])
    return known and x.dtype in (jnp.bfloat16, jnp.float32)


def joins_heads(x: Array, mask: Mask | None, implementation: str) -> bool:
    """Tells whether attention on a TPU wants the channels of all heads on one axis.

    Args:
      x: [B, N, D] tokens.
      mask: Attention mask.
      implementation: Implementation of attention.
    """
    mask = mask or Mask()
    auto = implementation == "auto" and _takes_tpu_kernel(x, mask)
    if mask.length_buckets or not (auto or implementation == "pallas"):
        return False
    return _tpu_kernel(x, mask) is _short


def _auto(query: Array, key: Array, value: Array, mask: Mask) -> Array:
    """Chooses the faster implementation for the platform that the program is compiled for."""
    others: dict[str, Any] = {}
    if _takes_tpu_kernel(query, mask):
        others["tpu"] = _tpu_kernel(query, mask)
    # Only where there is a GPU: cuDNN's version is asked for while the call is traced.
    several = mask.segments is not None and not mask.single_segment
    together = mask.weights is None and mask.bias is None and not several
    if together and _has_cudnn(query.dtype):
        others["cuda"] = _fused
    if not others:
        return _xla(query, key, value, mask)
    return lax.platform_dependent(query, key, value, mask, default=_xla, **others)


def _takes_packed(x: Array, mask: Mask, implementation: str) -> bool:
    """Tells whether one call of cuDNN takes the mask's sequences as they lie, for x's dtype."""
    if implementation not in ("auto", "fused") or mask.segments is None or not mask.only_hides:
        return False
    several = len(mask.length_buckets) > 1 if mask.single_segment else len(mask.length_buckets) < 2
    if not several or not isinstance(x.shape[0], int):  # sequences of a batch of any size
        return False
    if not _has_cudnn(x.dtype) or not packed_attention.available():
        return False
    return _sequences(x, mask).row_length % 2 == 0  # the only ones that cuDNN has a gradient for


def _packed(query: Array, key: Array, value: Array, mask: Mask) -> Array:
    """Calls cuDNN for images that lie end to end, in rows or in length buckets."""
    return packed_attention.attend(
        query, key, value, cast(Array, mask.segments), _sequences(query, mask)
    )


def _sequences(x: Array, mask: Mask) -> packed_attention.Sequences:
    if mask.single_segment:
        return packed_attention.Sequences(mask.length_buckets)
    width = mask.length_buckets[0][1] if mask.length_buckets else x.shape[1]
    return packed_attention.Sequences(((1, width),), mask.max_segments)


def _has_cudnn(dtype: Any) -> bool:
    """Tells whether JAX's default device has cuDNN's attention for a dtype."""
    return jax.default_backend() == "gpu" and dtype in (jnp.bfloat16, jnp.float16)


def _xla(query: Array, key: Array, value: Array, mask: Mask) -> Array:
    if mask.weights is not None:
        weights = mask.weights.astype(jnp.float32)
        return _plain(query, key, value, weights, mask.bias, _size_bias(mask.sizes))
    marks = None
    if mask.segments is not None and mask.single_segment:
        marks = _key_bias(mask.segments != mask.segments[:, :1])
    elif mask.segments is not None:
        marks = _segment_bias(mask.segments, mask.max_segments)
    return _plain(query, key, value, None, mask.bias, _joined(marks, _size_bias(mask.sizes)))


def scores(
    query: Float[Array, "B N H d"], key: Float[Array, "B N H d"], mask: Mask | None = None
) -> Float[Array, "B H N N"]:
    """Computes attention's scores before the softmax, the mask's bias included, for a cascade.

    [B, N, H, d] twice -> [B, H, N, N] float32.
    """
    return _scores(query, key, None if mask is None else mask.bias, None)


@jax.custom_vjp
def _plain(
    query: Array,
    key: Array,
    value: Array,
    weights: Array | None,
    bias: Array | None,
    marks: BiasFactors | None,
) -> Array:
    """Computes attention in plain products, with a backward pass that keeps no scores.

    Keeping [B, H, N, N] arrays costs more memory traffic than computing the scores again.

    Weights are 0 or 1, and a gate must learn how the output changes when one of them is flipped.
    With e_ij = exp(score_ij) and total_i = the sum of e_ij over the keys of weight 1, a hidden key
    j that is switched on gets the share

        a_ij = e_ij / (total_i + e_ij) = sigmoid(score_ij - log total_i),

    and the output of query i moves by exactly a_ij (v_j - out_i). So the gradient to w_j is this
    move times the cotangent g_i, summed over i. The derivative of the weighted softmax at w_j = 0
    would have e_ij / total_i in place of a_ij, which is unbounded: hidden keys of trained models
    score far above all active ones. The gradient to an active key's weight is the derivative, with
    the share e_ij / total_i. docs/results/gate_gradient.md compares this with other estimates.
    """
    return _forward(query, key, value, weights, bias, marks)[0]


def _forward(
    query: Array,
    key: Array,
    value: Array,
    weights: Array | None,
    bias: Array | None,
    marks: BiasFactors | None,
) -> tuple[Array, tuple[Any, ...]]:
    hidden = None if weights is None else _key_bias(weights < 0.5)
    score = _scores(query, key, bias, _joined(marks, hidden))
    # Subtracting the largest score avoids overflow; the quotient does not depend on it.
    largest = score.max(axis=-1)
    exponentials = jnp.exp(score - largest[..., None])
    total = exponentials.sum(axis=-1)
    mixed = _product("bhqk,bhkd->bhqd", exponentials.astype(value.dtype), _heads_first(value))
    out = _heads_first((mixed / total[..., None]).astype(value.dtype))
    out, log_total = checkpoint_name((out, largest + jnp.log(total)), attention_kernel.SAVED)
    return out, (query, key, value, weights, bias, marks, out, log_total)


def _backward(kept: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    query, key, value, weights, bias, marks, out, log_total = kept
    # Scores relative to log(total), so that exp(score) is the softmax. Hidden keys are included,
    # because their weights get gradient; `seen` cuts every other gradient of theirs.
    score = _scores(query, key, bias, marks) - log_total[..., None]
    if weights is None:
        shares = jnp.exp(score)
    else:
        hidden = (weights < 0.5)[:, None, None]
        # Active keys: the softmax share (scores are at most log_total but for rounding). Hidden
        # keys: the share each would get if it alone were switched on (see `_plain`).
        shares = jnp.where(hidden, jax.nn.sigmoid(score), jnp.exp(jnp.minimum(score, 0.0)))
    # Softmax's gradient to score_ij is share_ij * (g_i v_j - g_i out_i), where `gained` is g_i v_j
    # and `mean` g_i out_i. For a hidden key the same product is the effect of switching it on.
    mean = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    gained = _product("bhqd,bhkd->bhqk", _heads_first(cotangent), _heads_first(value))
    slope = shares * (gained - mean.transpose(0, 2, 1)[..., None])
    # The products with queries and keys run in the compute dtype; hidden keys pass nothing on.
    narrow, scale = slope.astype(query.dtype), query.shape[-1] ** -0.5
    seen = lambda x: x if weights is None else jnp.where(weights[:, :, None, None] < 0.5, 0, x)  # noqa: E731
    to_query = _product("bhqk,bhkd->bhqd", narrow, _heads_first(seen(key * scale)))
    to_key = _product("bhqk,bhqd->bhkd", narrow, _heads_first(query * scale))
    to_value = _product("bhqk,bhqd->bhkd", shares.astype(value.dtype), _heads_first(cotangent))
    return (
        _heads_first(to_query).astype(query.dtype),
        seen(_heads_first(to_key)).astype(key.dtype),
        seen(_heads_first(to_value)).astype(value.dtype),
        None if weights is None else slope.sum(axis=(1, 2)),
        None if bias is None else _seen_bias(slope, weights).astype(bias.dtype),
        None if marks is None else tuple(map(jnp.zeros_like, marks)),
    )


def _seen_bias(slope: Array, weights: Array | None) -> Array:
    """Returns the gradient to a bias, zero where its key is hidden."""
    return slope if weights is None else jnp.where(weights[:, None, None] < 0.5, 0, slope)


_plain.defvjp(_forward, _backward)
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


# A mask is added as further channels of queries and keys, whose product is exactly 0 where a key is
# seen and -_FAR where it is not, so the product of queries and keys already is the masked scores. A
# mask applied to the scores would cut one pass over them into three, on a TPU nearly a third of a
# block's time.
def _key_bias(hidden: Array) -> BiasFactors:
    """Makes channels that hide keys from all queries: [B, N] bool -> two of [B, N, 1]."""
    return jnp.ones((*hidden.shape, 1), jnp.float32), jnp.where(hidden, -_FAR, 0.0)[:, :, None]


def _segment_bias(segments: Array, most: int) -> BiasFactors:
    """Makes channels that separate runs of equal segments: [B, N] -> two of [B, N, most]."""
    # With one-hot runs r, (r_query - 1) * _FAR r_key sums to 0 in the same run, -_FAR otherwise.
    run = jax.nn.one_hot(jnp.cumsum(changes(segments), axis=1), most, dtype=jnp.float32)
    return run - 1, _FAR * run


def _size_bias(sizes: Array | None) -> BiasFactors | None:
    """Makes channels that add log(size) to the scores of a key: [B, N] -> two of [B, N, 1]."""
    if sizes is None:
        return None
    log = jnp.log(jnp.maximum(sizes, 1.0))[:, :, None]
    return jnp.ones_like(log), log


def _joined(*marks: BiasFactors | None) -> BiasFactors | None:
    there = [m for m in marks if m is not None]
    if len(there) < 2:
        return there[0] if there else None
    return tuple(jnp.concatenate(pair, axis=-1) for pair in zip(*there, strict=True))


def _heads_first(x: Array) -> Array:
    """Swaps [B, N, H, d] and [B, H, N, d]; XLA's batched products on CPU need heads first."""
    return x.transpose(0, 2, 1, 3)


def _scores(query: Array, key: Array, bias: Array | None, marks: BiasFactors | None) -> Array:
    """Computes scores [B, H, N, N] float32 of queries and keys [B, N, H, d].

    `bias` is [B, H, N, N], and each of `marks` is [B, N, C].
    """
    pair = [query * query.shape[-1] ** -0.5, key]
    if marks is not None:
        spread = [
            jnp.broadcast_to(m[:, :, None], (*x.shape[:3], m.shape[-1]))
            for m, x in zip(marks, pair, strict=True)
        ]
        pair = [
            jnp.concatenate([x, m.astype(x.dtype)], axis=-1)
            for x, m in zip(pair, spread, strict=True)
        ]
    query, key = map(_heads_first, pair)
    product = _product("bhqd,bhkd->bhqk", query, key)
    return product if bias is None else product + bias.astype(jnp.float32)


def _visible(segments: Array) -> Array:
    """Returns whether queries see keys: [B, N] -> [B, 1, N, N] bool; each sees some."""
    return segments[:, None, :, None] == segments[:, None, None, :]


def _fused(
    query: Array, key: Array, value: Array, mask: Mask, *, even: bool | None = None
) -> Array:
    """Calls `jax.nn.dot_product_attention`: cuDNN's kernel on CUDA, plain XLA elsewhere.

    cuDNN's backward pass with a bias, or with rows of several images, which are one to it, needs an
    even length; `even` pads an odd one by one position, by default where cuDNN is used.
    """
    cudnn = _has_cudnn(query.dtype)
    length = query.shape[1]
    bias, visible, lengths = mask.bias, None, None
    if mask.sizes is not None:
        counted = jnp.log(jnp.maximum(mask.sizes, 1.0))[:, None, None, :]
        bias = counted if bias is None else bias + counted
    if mask.segments is not None and mask.single_segment:
        lengths = (mask.segments == mask.segments[:, :1]).sum(axis=1, dtype=jnp.int32)
    elif mask.segments is not None:
        visible = _visible(mask.segments)
    added = bias is not None or visible is not None
    if length % 2 and added and (cudnn if even is None else even):
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value)
        )
        if visible is not None:
            # The added query sees what the last one sees, because it must see something.
            visible = jnp.pad(visible, ((0, 0), (0, 0), (0, 0), (0, 1)))
            visible = jnp.pad(visible, ((0, 0), (0, 0), (0, 1), (0, 0)), mode="edge")
        elif lengths is None:
            lengths = jnp.full(query.shape[:1], length, jnp.int32)
        if bias is not None:
            last = [(0, int(n == length)) for n in bias.shape[2:]]
            bias = jnp.pad(bias, ((0, 0), (0, 0), *last))
    if cudnn and bias is not None:  # which takes no bias that is the same for all queries
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], *[query.shape[1]] * 2))
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        None if bias is None else bias.astype(query.dtype),
        visible,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if cudnn else "xla",
    )
    return mixed[:, :length]


def kernel_mask(mask: Mask) -> attention_kernel.KernelMask:
    """Writes a mask without length buckets as our kernels for TPUs take it."""
    added: list[Array] = []
    if mask.sizes is not None:
        added.append(jnp.log(jnp.maximum(mask.sizes, 1.0)))
    segments = mask.segments if mask.weights is None else None
    if segments is not None and mask.single_segment:
        added.append(jnp.where(segments != segments[:, :1], -_FAR, 0.0))
        segments = None
    return attention_kernel.KernelMask(
        key_bias=lax.stop_gradient(sum(added))[:, None] if added else None,
        segments=segments,
        weights=None if mask.weights is None else mask.weights.astype(jnp.float32),
        bias=mask.bias,
    )


def _short(query: Array, key: Array, value: Array, mask: Mask) -> Array:
    """Calls our kernel for TPUs, in which an image's scores stay on the chip."""
    flat = [x.reshape(*x.shape[:2], -1) for x in (query, key, value)]
    return attention_kernel.attend(*flat, kernel_mask(mask), query.shape[2]).reshape(query.shape)


def _flash(query: Array, key: Array, value: Array, mask: Mask) -> Array:
    """Calls JAX's flash attention for TPUs, on sequences padded to whole blocks."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    length = query.shape[1]
    padding = -length % _FLASH_BLOCK
    segments = mask.segments
    if segments is None:
        segments = jnp.zeros(query.shape[:2], jnp.int32)
    ids = jnp.pad(segments, ((0, 0), (0, padding)), constant_values=NOBODY)
    spread = ((0, 0), (0, 0), (0, padding), (0, 0))

    def attend(ids: Array, *padded: Array) -> Array:
        return flash.flash_attention(
            *padded,
            segment_ids=flash.SegmentIds(q=ids, kv=ids),
            sm_scale=1 / math.sqrt(query.shape[-1]),
        )

    padded = [jnp.pad(x.transpose(0, 2, 1, 3), spread) for x in (query, key, value)]
    mixed = sharding.map_devices(attend)(ids, *padded)
    return mixed[:, :, :length].transpose(0, 2, 1, 3)
