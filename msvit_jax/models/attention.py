"""Multi-head attention as one pure function, the only one in the library.

It has interchangeable implementations with one meaning: plain XLA, `jax.nn.dot_product_attention`
with a fused kernel where the platform has one, and JAX's Pallas kernel for TPUs.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from msvit_jax.tokens.packing import NOBODY

IMPLEMENTATIONS = ("auto", "xla", "fused", "pallas")
# An inactive key may score far above every active one. Its exponential never reaches the output,
# but must stay finite, because the gradient to its weight is a multiple of it.
_LARGEST_EXPONENT = 30.0
_PALLAS_BLOCK = 128  # the kernel wants whole blocks of this many tokens
_PALLAS_FROM = 1024  # tokens from which on scores cost more memory traffic than padding to blocks


@struct.dataclass
class Mask:
    """Who is seen by whom. Without any of these every token of a row sees every other.

    Attributes:
      weights: [B, N], 0 or 1, at least one 1 in every row; a token of weight 0 is hidden from all.
        Gradient reaches the weights, of hidden tokens too.
      segments: [B, N] int32, the image that a token belongs to, `NOBODY` for an empty place.
        Tokens see their own image only; what an empty place holds, NaN even, reaches no image.
      shelves: for rows of several lengths laid end to end: (rows, length) of each; the first axis
        of all arrays is then groups, the second all places of a group. Empty: B rows of length N.
      alone: whether each row holds one image at most, its first token in its first place.
      images: of the batch, if there are segments.
    """

    weights: Array | None = None
    segments: Array | None = None
    shelves: tuple[tuple[int, int], ...] = struct.field(pytree_node=False, default=())
    alone: bool = struct.field(pytree_node=False, default=False)
    images: int = struct.field(pytree_node=False, default=0)


def attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | None = None,
    *,
    implementation: str = "auto",
) -> Array:
    """Softmax attention within rows, seeing what the mask shows.

    out_i = sum_j w_j exp(q_i k_j / sqrt(d)) v_j / sum_j w_j exp(q_i k_j / sqrt(d)) over the tokens
    j of i's image: with weights the masked attention of MSViT (section 3) and DynamicViT. The
    weights multiply the exponentials, so a straight-through weight of 0 hides its key and still
    receives gradient, which an additive mask of minus infinity would not give.

    Args:
      query: [B, N, H, d].
      key: [B, N, H, d].
      value: [B, N, H, d].
      mask: None: all tokens of a row see each other.
      implementation: one of `IMPLEMENTATIONS`; "auto" chooses by platform and length. Weights
        need "xla" and get it from "auto".

    Returns:
      [B, N, H, d] in the dtype of `value`. Scores and exponentials are float32.

    Raises:
      ValueError: unknown implementation, or one that does not support the mask.
    """
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attention_impl={implementation!r} is none of {names}.")
    mask = mask or Mask()
    if not mask.shelves:
        return _attend(query, key, value, mask, implementation)
    parts, offset = [], 0
    for rows, length in mask.shelves:
        cut = functools.partial(_shelf, offset=offset, rows=rows, length=length)
        own = Mask(
            None if mask.weights is None else cut(mask.weights),
            None if mask.segments is None else cut(mask.segments),
            alone=mask.alone,
        )
        mixed = _attend(cut(query), cut(key), cut(value), own, implementation)
        parts.append(mixed.reshape(query.shape[0], rows * length, *query.shape[2:]))
        offset += rows * length
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _shelf(x: Array, offset: int, rows: int, length: int) -> Array:
    """Rows of one shelf: [G, T, ...] -> [G * rows, length, ...]."""
    return x[:, offset : offset + rows * length].reshape(-1, length, *x.shape[2:])


def _attend(query: Array, key: Array, value: Array, mask: Mask, implementation: str) -> Array:
    if mask.weights is not None:
        if implementation not in ("auto", "xla"):
            raise ValueError(
                f"attention_impl={implementation!r} gives no gradient to the weights of the slots "
                "and trimmed layouts; use 'xla' or 'auto' with them."
            )
        return _weighted(query, key, value, mask.weights)
    if mask.segments is not None:
        # Zero times NaN is NaN: what empty places hold must not meet the weights' zeros.
        value = jnp.where((mask.segments == NOBODY)[:, :, None, None], 0, value)
    if implementation == "auto":
        return _auto(query, key, value, mask.segments, alone=mask.alone)
    attend = {"xla": _xla, "fused": _fused, "pallas": _pallas}[implementation]
    return attend(query, key, value, mask.segments, alone=mask.alone)


def _auto(query: Array, key: Array, value: Array, segments: Array | None, *, alone: bool) -> Array:
    """The implementation that pays on the platform that the program is compiled for."""
    plain = functools.partial(_xla, alone=alone)
    if query.shape[1] < _PALLAS_FROM:
        return plain(query, key, value, segments)
    blocks = functools.partial(_pallas, alone=alone)
    return lax.platform_dependent(query, key, value, segments, default=plain, tpu=blocks)


def _weighted(query: Array, key: Array, value: Array, key_weights: Array) -> Array:
    """Attention with weights, folded into the values: no other array of the size of the scores."""
    scores = _scores(query, key)
    weights = key_weights.astype(jnp.float32)
    hidden = lax.stop_gradient(weights[:, None, None, :]) == 0
    largest = jnp.where(hidden, -jnp.inf, lax.stop_gradient(scores)).max(-1, keepdims=True)
    exponentials = jnp.exp(jnp.minimum(scores - largest, _LARGEST_EXPONENT))
    total = jnp.einsum("bhqk,bk->bhq", exponentials, weights)
    value = value * key_weights.astype(value.dtype)[:, :, None, None]
    return _mix(exponentials, total, value)


def _xla(query: Array, key: Array, value: Array, segments: Array | None, *, alone: bool) -> Array:
    scores = _scores(query, key)
    if segments is not None:
        scores = jnp.where(_visible(segments, alone), scores, -jnp.inf)
    # The largest score only steadies the exponential: the quotient does not depend on it.
    largest = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    exponentials = jnp.exp(scores - largest)
    return _mix(exponentials, exponentials.sum(axis=-1), value)


def _visible(segments: Array, alone: bool) -> Array:
    """Which keys a query sees: [B, N] -> [B, 1, 1 or N, N] bool; never none."""
    if alone:
        return (segments == segments[:, :1])[:, None, None, :]
    return segments[:, None, :, None] == segments[:, None, None, :]


def _scores(query: Array, key: Array) -> Array:
    """[B, N, H, d] twice -> [B, H, N, N] float32."""
    # Heads first before the products: XLA's batched products on CPU want it so.
    query, key = (x.transpose(0, 2, 1, 3) for x in (query, key))
    scale = query.shape[-1] ** -0.5
    return jnp.einsum("bhqd,bhkd->bhqk", query * scale, key, preferred_element_type=jnp.float32)


def _mix(exponentials: Array, total: Array, value: Array) -> Array:
    """Values [B, N, H, d] in the shares [B, H, N, N] over their totals [B, H, N]."""
    summed = jnp.einsum(
        "bhqk,bhkd->bhqd",
        exponentials.astype(value.dtype),
        value.transpose(0, 2, 1, 3),
        preferred_element_type=jnp.float32,
    )
    return (summed / total[..., None]).astype(value.dtype).transpose(0, 2, 1, 3)


def _fused(query: Array, key: Array, value: Array, segments: Array | None, *, alone: bool) -> Array:
    """`jax.nn.dot_product_attention`: cuDNN's kernel on CUDA, plain XLA elsewhere."""
    on_gpu = jax.default_backend() == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16)
    mask = None if segments is None else _visible(segments, alone)
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, implementation="cudnn" if on_gpu else "xla"
    )


def _pallas(
    query: Array, key: Array, value: Array, segments: Array | None, *, alone: bool
) -> Array:
    """JAX's flash attention for TPUs, on sequences padded to whole blocks."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    del alone
    length = query.shape[1]
    padding = -length % _PALLAS_BLOCK
    if segments is None:
        segments = jnp.zeros(query.shape[:2], jnp.int32)
    # The kernel adds its mask to the scores, where NaN would remain NaN.
    key = jnp.where((segments == NOBODY)[:, :, None, None], 0, key)
    ids = jnp.pad(segments, ((0, 0), (0, padding)), constant_values=NOBODY)
    spread = ((0, 0), (0, 0), (0, padding), (0, 0))
    padded = [jnp.pad(x.transpose(0, 2, 1, 3), spread) for x in (query, key, value)]
    mixed = flash.flash_attention(
        *padded,
        segment_ids=flash.SegmentIds(q=ids, kv=ids),
        sm_scale=1 / math.sqrt(query.shape[-1]),
    )
    return mixed[:, :, :length].transpose(0, 2, 1, 3)
