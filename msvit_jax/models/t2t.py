"""T2T-ViT (Yuan et al. 2021): a ViT with tokens made of overlapping windows in three steps.

Between the steps (*soft splits*) a Performer, attention of linear cost, mixes the tokens. Beyond
the tokenizer everything is `ViT`'s; as in the official models, positions are fixed, layer norms
have epsilon 1e-5, and queries, keys and values have no bias.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from msvit_jax import flops
from msvit_jax.models import vit_checks
from msvit_jax.models.block import LayerNorm, gelu, init_weights
from msvit_jax.models.vit import ViT
from msvit_jax.tokens import grid

TOKEN_WIDTH = 64  # channels between the steps
FEATURES = 32  # random features of a Performer
DROPOUT = 0.1
_NORM_EPSILON = 1e-5
_EPSILON = 1e-8
_WINDOW, _STRIDE, _PADDING = 3, 2, 1  # for the second and the third soft split


@dataclasses.dataclass(frozen=True)
class SoftSplit:
    """The first soft split: window, stride and padding in px, and the side of its grid."""

    window: int
    stride: int
    padding: int
    side: int


def first_split(image_size: int, side: int) -> SoftSplit:
    """Finds the first soft split that leads to a grid of `side` cells after two more.

    Windows are 7/4 of their stride: 7 / 4 px for 14 cells of 224 px as in T2T-ViT, 11 / 6 for 10
    and 14 / 8 for 7 as in DVT. The rule that gives these for other sizes is our reconstruction.

    Raises:
      ValueError: No stride leads to that grid; the message lists sides that have one.
    """
    split = _first_split(image_size, side)
    if split is None:
        fitting = [s for s in range(1, image_size // 4 + 1) if _first_split(image_size, s)]
        raise ValueError(
            f"T2T tokens of a {image_size} px image do not make a grid of {side} x {side}; sides "
            "that fit: " + ", ".join(map(str, fitting))
        )
    return split


def _first_split(image_size: int, side: int) -> SoftSplit | None:
    if side < 1:
        return None
    stride = -(-image_size // (4 * side))
    wanted = -(-image_size // stride)
    window = max(-(-7 * stride // 4), _WINDOW)
    padding = max(0, -(-(stride * (wanted - 1) + window - image_size) // 2))
    count = (image_size + 2 * padding - window) // stride + 1
    return SoftSplit(window, stride, padding, count) if _halved(_halved(count)) == side else None


def _halved(side: int) -> int:
    """Cells along a side after one of the later soft splits."""
    return (side + 2 * _PADDING - _WINDOW) // _STRIDE + 1


def orthogonal_features(key: Array, shape: tuple[int, int]) -> Array:
    """Initializes a Performer's matrix: [m, d] orthogonal rows of norm sqrt(m)."""
    return nn.initializers.orthogonal(math.sqrt(shape[0]))(key, shape, jnp.float32)


class Performer(nn.Module):
    """A transformer layer whose attention cost per token is linear in its random features.

    Choromanski et al. 2021, with T2T-ViT's skip connection from the values. Its random matrix is
    never trained: it is a parameter whose gradient is cut, see `ViT.pos_init`.
    """

    width: int = TOKEN_WIDTH
    features: int = FEATURES
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Mixes tokens: [B, N, C] -> [B, N, width]; in training with dropout (rng "dropout")."""
        norm = {"epsilon": _NORM_EPSILON}
        dense = {"dtype": self.dtype, "kernel_init": init_weights}
        drop = nn.Dropout(DROPOUT, deterministic=not train)
        shape = (self.features, self.width)
        matrix = lax.stop_gradient(self.param("random_features", orthogonal_features, shape))
        kqv = nn.Dense(3 * self.width, name="kqv", **dense)(LayerNorm(name="norm1", **norm)(x))
        key, query, value = jnp.split(kqv, 3, axis=-1)
        mixed = _linear_attention(query, key, value, matrix)
        y = value + drop(nn.Dense(self.width, name="proj", **dense)(mixed))
        hidden = nn.Dense(self.width, name="fc1", **dense)(LayerNorm(name="norm2", **norm)(y))
        return y + drop(nn.Dense(self.width, name="fc2", **dense)(gelu(hidden)))


def _linear_attention(query: Array, key: Array, value: Array, matrix: Array) -> Array:
    """Computes [B, N, d] from [B, N, d] three times and [m, d]; features and sums in float32."""
    query, key = (_exponential_features(x.astype(jnp.float32), matrix) for x in (query, key))
    total = jnp.einsum("bnm,bm->bn", query, key.sum(axis=1))
    gathered = jnp.einsum("bnm,bnd->bmd", key, value.astype(jnp.float32))
    mixed = jnp.einsum("bnm,bmd->bnd", query, gathered) / (total[..., None] + _EPSILON)
    return mixed.astype(value.dtype)


def _exponential_features(x: Array, matrix: Array) -> Array:
    """Computes exp(W x - |x|^2 / 2) / sqrt(m): [B, N, d] -> [B, N, m]."""
    square = (x**2).sum(axis=-1, keepdims=True) / 2
    return jnp.exp(jnp.einsum("bnd,md->bnm", x, matrix) - square) / math.sqrt(matrix.shape[0])


class Tokenizer(nn.Module):
    """Tokens-to-token: soft split, Performer, soft split, Performer, soft split, linear layer.

    Soft splits order their features (row, column, channel); PyTorch's unfold has the channel first.
    """

    width: int
    split: SoftSplit
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Makes tokens: [B, H, W, 3] -> [B, h, w, D]."""
        first, later = self.split, (_WINDOW, _STRIDE, _PADDING)
        x = images.astype(self.dtype)
        x = grid.windows(x, first.window, first.stride, first.padding)
        for step in (1, 2):
            size = x.shape[:3]
            mixed = Performer(dtype=self.dtype, name=f"performer_{step}")(
                x.reshape(size[0], -1, x.shape[3]), train=train
            )
            x = grid.windows(mixed.reshape(*size, -1), *later)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=init_weights, name="proj")(x)


def performer_macs(tokens: int, channels: int) -> float:
    """Counts multiply-accumulates of one Performer over `tokens` tokens of `channels` channels."""
    linear = channels * 3 * TOKEN_WIDTH + 3 * TOKEN_WIDTH**2
    features = 2 * TOKEN_WIDTH * FEATURES
    return tokens * (linear + features + 2 * TOKEN_WIDTH * FEATURES + FEATURES)


class T2TViT(ViT):
    """A `ViT` over T2T tokens.

    Attributes are the ViT's. Images are whole numbers of `patch_size` px, the step from token to
    token; with `fixed_grid_size` the first soft split is chosen for it.
    """

    def _embedding(self) -> nn.Module:
        return Tokenizer(self.width, self.split, self.dtype)

    def check_grid(self) -> None:
        """Raises ValueError unless a first soft split leads to the grid."""
        vit_checks.check_square(self, "The tokenizer of T2T-ViT")
        if self.fixed_grid_size is None:
            vit_checks.check_divisible(self)
        _ = self.split

    @property
    def split(self) -> SoftSplit:
        """The first soft split.

        Raises:
          ValueError: There is none for the grid.
        """
        return first_split(self.image_shape[0], self.grid_size)

    @property
    def embed_macs(self) -> float:
        """Multiply-accumulates of the tokenizer; soft splits only rearrange numbers."""
        first = self.split
        second = _halved(first.side)
        joined = _WINDOW**2 * TOKEN_WIDTH
        return (
            performer_macs(first.side**2, 3 * first.window**2)
            + performer_macs(second**2, joined)
            + float(flops.dense(self.max_tokens, joined, self.width))
        )

    @property
    def embed_norm_elements(self) -> float:
        """Number of values that the tokenizer's layer norms output."""
        first = self.split
        normed = first.side**2 * (3 * first.window**2 + TOKEN_WIDTH)
        return float(normed + _halved(first.side) ** 2 * (_WINDOW**2 + 1) * TOKEN_WIDTH)

    def _tokens(self, images: Array, train: bool) -> Array:
        return self.patch_embed(images, train=train)
