"""Multi-head attention as one pure function, the only one in the library."""

import jax.numpy as jnp
from jax import Array, lax

# An inactive key may score far above every active one. Its exponential never reaches the output,
# but must stay finite, because the gradient to its weight is a multiple of it.
_LARGEST_EXPONENT = 30.0


def attention(query: Array, key: Array, value: Array, key_weights: Array | None = None) -> Array:
    """Softmax attention in which every key counts with a weight.

    out_i = sum_j w_j exp(q_i k_j / sqrt(d)) v_j / sum_j w_j exp(q_i k_j / sqrt(d)), the masked
    attention of MSViT (section 3) and DynamicViT. The weights multiply the exponentials, so a
    straight-through weight of 0 hides its key and still receives gradient, which an additive mask
    of minus infinity would not give. They are folded into the values: no array of the size of the
    scores is made for them.

    Args:
      query: [B, Q, H, d].
      key: [B, K, H, d].
      value: [B, K, H, d].
      key_weights: [B, K], 0 or 1, at least one 1 in every row; None where all keys count.

    Returns:
      [B, Q, H, d] in the dtype of `value`. Scores and exponentials are float32.
    """
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    if key_weights is None:
        # The largest score only steadies the exponential: the quotient does not depend on it.
        largest = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        exponentials = jnp.exp(scores - largest)
        total = exponentials.sum(axis=-1)
    else:
        weights = key_weights.astype(jnp.float32)
        hidden = lax.stop_gradient(weights[:, None, None, :]) == 0
        largest = jnp.where(hidden, -jnp.inf, lax.stop_gradient(scores)).max(-1, keepdims=True)
        exponentials = jnp.exp(jnp.minimum(scores - largest, _LARGEST_EXPONENT))
        total = jnp.einsum("bhqk,bk->bhq", exponentials, weights)
        value = value * key_weights.astype(value.dtype)[:, :, None, None]
    summed = jnp.einsum(
        "bhqk,bkhd->bqhd",
        exponentials.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return (summed / total.transpose(0, 2, 1)[..., None]).astype(value.dtype)
