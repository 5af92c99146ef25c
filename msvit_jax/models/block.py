"""The transformer block of every model in the library, and its parts.

Pre-norm attention and MLP (Dosovitskiy et al. 2021), LayerScale (Touvron et al. 2021, CaiT) and
stochastic depth, as timm's models have them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from msvit_jax.models import block_kernel, reduction
from msvit_jax.models.attention import Mask, attention, joins_heads, scores
from msvit_jax.models.reduction import ReductionSpec, ReductionState

init_weights = nn.initializers.truncated_normal(0.02)


def gelu(x: Array) -> Array:
    """Computes the exact GELU; timm, DeiT and Hugging Face weights were trained with it.

    Uses erf in float32: `nn.gelu` uses erfc, because 1 + erf cancels in the left tail of bfloat16,
    and that costs three times as much on a TPU.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + lax.erf(y * np.float32(np.sqrt(0.5))))).astype(x.dtype)


def _tanh_gelu(x: Array) -> Array:
    """Computes GELU's tanh approximation; big_vision and vision_transformer train with it."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


GELUS = {"exact": gelu, "tanh": _tanh_gelu}  # values of `ViT.gelu`


def drop_path(x: Array, rate: Array, key: Array, mask: Mask | None = None) -> Array:
    """Applies stochastic depth (Huang et al. 2016): drops a branch for whole images.

    The branch of the other images is rescaled.

    Args:
      x: [B, N, D], output of a branch.
      rate: Scalar probability of dropping; may be traced, as under a scan over layers.
      key: Random key.
      mask: Mask whose segments tell which image each token belongs to, where a row is not an image;
        the same images are dropped in every layout.
    """
    keep = 1 - rate
    if mask is None or mask.segments is None:
        kept = jax.random.bernoulli(key, keep, (x.shape[0], 1, 1))
    else:
        images = jax.random.bernoulli(key, keep, (mask.images,))
        kept = images[jnp.maximum(mask.segments, 0)][:, :, None]
    return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros_like(x))


class LayerNorm(nn.LayerNorm):
    """flax's layer norm, always computed in float32 and returned in the dtype that came in."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalizes the last axis: [..., D] -> [..., D]."""
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


def _heads_apart(x: Array, kernel: Array, bias: Array | None) -> list[Array]:
    """Projects tokens [B, N, D] by a kernel [D, 3, H, d]: three of [B, N, H, d]."""
    tokens = x.shape[0] * x.shape[1]
    # A batch whose size is known only at run time (`export`) is treated as a large one.
    if isinstance(tokens, int) and tokens < x.shape[-1]:
        whole = jnp.einsum("bnd,dche->bnche", x, kernel)
        parts = [whole[:, :, i] for i in range(3)]
    else:
        parts = [jnp.einsum("bnd,dhe->bnhe", x, kernel[:, i]) for i in range(3)]
    if bias is None:
        return parts
    return [part + bias[i] for i, part in enumerate(parts)]


def _heads_together(x: Array, kernel: Array, bias: Array | None) -> list[Array]:
    """The same, with the heads on one axis until the end: no copy where they are joined again."""
    parts = [jnp.einsum("bnd,de->bne", x, kernel[:, i].reshape(x.shape[-1], -1)) for i in range(3)]
    if bias is not None:
        parts = [_add_bias(part, bias[i].reshape(-1)) for i, part in enumerate(parts)]
    return [part.reshape(*x.shape[:2], *kernel.shape[2:]) for part in parts]


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    """Adds a bias [D] to tokens [B, N, D]."""
    return x + bias[None, None]


def _add_bias_backward(_: None, cotangent: Array) -> tuple[Array, Array]:
    # A sum over tokens as a product with ones: a TPU's sum of what a kernel wrote takes 35 times as
    # long. A tile of rows of ones costs what one does.
    ones = jnp.ones((8, *cotangent.shape[:2]), cotangent.dtype)
    return cotangent, jnp.einsum("rbn,bnd->rd", ones, cotangent)[0]


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), None), _add_bias_backward)


class QKV(nn.Module):
    """Queries, keys and values from one kernel [D, 3D], applied in three products.

    Splitting the result of one product would copy all of it, which on a TPU is half of a block's
    time. For fewer tokens than channels, splitting the kernel copies more.
    """

    heads: int
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def _parameters(self, width: int) -> tuple[Array, Array | None]:
        """Returns the kernel [D, 3, heads, d] and the bias [3, 1, 1, heads, d]."""
        shape = (3, self.heads, width // self.heads)
        kernel = self.param("kernel", init_weights, (width, 3 * width))
        kernel = kernel.astype(self.dtype).reshape(width, *shape)
        if not self.bias:
            return kernel, None
        bias = self.param("bias", nn.initializers.zeros, (3 * width,))
        return kernel, bias.astype(self.dtype).reshape(3, 1, 1, *shape[1:])

    def __call__(self, x: Array, together: bool = False) -> list[Array]:
        """Projects tokens: [B, N, D] -> three of [B, N, heads, D / heads].

        `together` is whether the heads are joined again on a TPU, see `attention.joins_heads`.
        """
        kernel, bias = self._parameters(x.shape[-1])
        if not together:
            return _heads_apart(x, kernel, bias)
        return lax.platform_dependent(x, kernel, bias, default=_heads_apart, tpu=_heads_together)

    def scores(self, asking: Array, x: Array) -> Array:
        """Computes scores of M queries: [B, M, D] and [B, N, D] -> [B, heads, M, N] float32.

        These are attention's scores before the softmax, less a term that is the same for all N. The
        few queries go through the keys' kernel instead of the many tokens, so nothing that
        attention computed for itself is needed, and a TPU keeps none of it in memory.
        """
        kernel, bias = self._parameters(x.shape[-1])
        query = jnp.einsum("bmd,dhe->bmhe", asking, kernel[:, 0])
        query = (query if bias is None else query + bias[0]) * query.shape[-1] ** -0.5
        folded = jnp.einsum("bmhe,dhe->bmhd", query, kernel[:, 1])
        return jnp.einsum("bmhd,bnd->bhmn", folded, x, preferred_element_type=jnp.float32)


class Attention(nn.Module):
    """Multi-head self-attention."""

    width: int
    heads: int
    qkv_bias: bool = True
    implementation: str = "auto"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes the submodules."""
        self.qkv = QKV(self.heads, self.qkv_bias, self.dtype)
        self.proj = nn.Dense(self.width, dtype=self.dtype, kernel_init=init_weights)

    def __call__(self, x: Array, mask: Mask | None = None) -> tuple[Array, Array, Array]:
        """Maps [B, N, D] to [B, N, D]; also returns queries and keys. `mask`: see `attention`."""
        together = joins_heads(x, mask, self.implementation)
        query, key, value = self.qkv(x, together)
        mixed = attention(query, key, value, mask, implementation=self.implementation)
        return self.proj(mixed.reshape(x.shape)), query, key

    def scores(self, asking: Array, x: Array) -> Array:
        """Computes scores of given queries: [B, M, D], [B, N, D] -> [B, heads, M, N] float32."""
        return self.qkv.scores(asking, x)


class MLP(nn.Module):
    """Two linear layers with a GELU between them; `width` channels come out."""

    hidden: int
    width: int
    dtype: Any = jnp.float32
    gelu: str = "exact"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps each token on its own: [..., C] -> [..., width]."""
        dense = {"dtype": self.dtype, "kernel_init": init_weights}
        hidden = GELUS[self.gelu](nn.Dense(self.hidden, name="fc1", **dense)(x))
        return nn.Dense(self.width, name="fc2", **dense)(hidden)


class LayerScale(nn.Module):
    """One learned factor per channel."""

    start: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Scales the channels: [..., D] -> [..., D]."""
        gamma = self.param("gamma", nn.initializers.constant(self.start), (x.shape[-1],))
        return x * gamma.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x)).

    With a `reduction`, tokens are reduced between the halves: see `models.reduction`. In a cascade,
    either half may reuse what an earlier transformer computed: see `reusing`.
    """

    width: int
    heads: int
    hidden: int
    qkv_bias: bool = True
    layer_scale: float | None = None
    norm_epsilon: float = 1e-6
    attention_impl: str = "auto"
    dtype: Any = jnp.float32
    gelu: str = "exact"
    reduction: ReductionSpec | None = None

    def setup(self) -> None:
        """Makes the submodules and parameters."""
        self.norm1 = LayerNorm(epsilon=self.norm_epsilon)
        self.attn = Attention(
            self.width, self.heads, self.qkv_bias, self.attention_impl, self.dtype
        )
        self.norm2 = LayerNorm(epsilon=self.norm_epsilon)
        self.mlp = MLP(self.hidden, self.width, self.dtype, self.gelu)
        if self.reduction is not None:
            self.reducer = self.reduction.make()
        if self.layer_scale is not None:
            self.ls1 = LayerScale(self.layer_scale)
            self.ls2 = LayerScale(self.layer_scale)

    def _attn_residual(
        self, x: Array, attn_input: Array, drop_rate: Array | None, mask: Mask | None
    ) -> tuple[Array, Array, Array]:
        """Returns x plus attention of its norm `attn_input`, and the queries and keys."""
        branch, query, key = self.attn(attn_input, mask)
        if self.layer_scale is not None:
            branch = self.ls1(branch)
        return x + self._maybe_dropped(branch, drop_rate, mask), query, key

    def _mlp_residual(
        self, x: Array, drop_rate: Array | None, mask: Mask | None, extra: Array | None = None
    ) -> Array:
        seen = x if extra is None else jnp.concatenate([x, extra.astype(x.dtype)], axis=-1)
        branch = self.mlp(self.norm2(seen))
        if self.layer_scale is not None:
            branch = self.ls2(branch)
        return x + self._maybe_dropped(branch, drop_rate, mask)

    def _maybe_dropped(self, branch: Array, drop_rate: Array | None, mask: Mask | None) -> Array:
        if drop_rate is None:
            return branch
        return drop_path(branch, drop_rate, self.make_rng("dropout"), mask)

    def _attn_half(self, x: Array, drop_rate: Array | None, mask: Mask | None) -> Array:
        """Applies the first half; on a TPU as one kernel, except where there is a gradient."""
        if not self._takes_kernels(x, drop_rate):
            return self._attn_residual(x, self.norm1(x), drop_rate, mask)[0]
        return block_kernel.attention_half(
            x,
            self._params("norm1", "attn", "ls1"),
            mask,
            heads=self.heads,
            epsilon=self.norm_epsilon,
            by_parts=self._unbound("_attn_by_parts"),
        )

    def _mlp_half(self, x: Array, drop_rate: Array | None, mask: Mask | None) -> Array:
        """Applies the second half; on a TPU as one kernel, except where there is a gradient."""
        if not self._takes_kernels(x, drop_rate):
            return self._mlp_residual(x, drop_rate, mask)
        return block_kernel.mlp_half(
            x,
            self._params("norm2", "mlp", "ls2"),
            gelu=self.gelu,
            epsilon=self.norm_epsilon,
            by_parts=self._unbound("_mlp_by_parts"),
        )

    def _takes_kernels(self, x: Array, drop_rate: Array | None) -> bool:
        if drop_rate is not None or self.is_initializing():
            return False
        return block_kernel.may_be_used(x, self.attention_impl)

    def _params(self, *names: str) -> dict[str, Any]:
        params = self.variables["params"]
        return {name: params[name] for name in names if name in params}

    def _unbound(self, method: str) -> Callable[..., Array]:
        """Returns a method of this block as a function of x, parameters and further arguments."""
        block = self.clone(parent=None)
        return lambda x, params, *more: block.apply({"params": params}, x, *more, method=method)

    def _attn_by_parts(self, x: Array, mask: Mask) -> Array:
        return self._attn_residual(x, self.norm1(x), None, mask)[0]

    def _mlp_by_parts(self, x: Array) -> Array:
        return self._mlp_residual(x, None, None)

    def __call__(self, x: Array, drop_rate: Array | None = None, mask: Mask | None = None) -> Array:
        """Applies both halves.

        Args:
          x: [B, N, D] tokens.
          drop_rate: Scalar probability of dropping each branch of an image; None for never.
          mask: Attention mask, which also tells the images of a row apart; None if a row is one
            image.
        """
        return self._mlp_half(self._attn_half(x, drop_rate, mask), drop_rate, mask)

    def reducing(
        self,
        x: Array,
        drop_rate: Array | None,
        mask: Mask | None,
        state: ReductionState,
        train: bool,
    ) -> tuple[Array, Mask, ReductionState]:
        """Applies both halves, reducing tokens in between: [B, N, D] -> [B, K, D], mask, state."""
        assert self.reduction is not None
        attn_input = self.norm1(x)
        x, _, key = self._attn_residual(x, attn_input, drop_rate, mask)
        x, shorter, state = reduction.reduce(
            *(x, attn_input, key, mask, state),
            spec=self.reduction,
            reducer=self.reducer,
            scores=self.attn.scores,
            train=train,
        )
        return self._mlp_half(x, drop_rate, shorter), shorter, state

    def reusing(
        self, x: Array, drop_rate: Array | None, relation: Array | None, features: Array | None
    ) -> tuple[Array, Array]:
        """Applies both halves, reusing another transformer's results (DVT, sections 3.2, 3.3).

        Args:
          x: [B, N, D] tokens.
          drop_rate: Scalar probability of dropping each branch of an image; None for never.
          relation: [B, H, N, N], bias added to the scores of attention; or None.
          features: [B, N, C], channels that the MLP sees besides those of x; or None.

        Returns:
          Tokens [B, N, D], and the scores of attention, `relation` included: [B, H, N, N] float32.
        """
        mask = None if relation is None else Mask(bias=relation)
        x, query, key = self._attn_residual(x, self.norm1(x), drop_rate, mask)
        # Attention computes the same product; XLA merges the two into one.
        return self._mlp_residual(x, drop_rate, mask, features), scores(query, key, mask)
