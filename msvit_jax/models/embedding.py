"""Patch embedding and position embeddings."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from msvit_jax.models.block import init_weights
from msvit_jax.tokens import grid

POSITIONS = ("normal", "sincos", "fixed")  # values of `ViT.pos_init`


def sincos_positions(prefix: int, size: tuple[int, int]) -> Callable[..., Array]:
    """Returns an initializer for position embeddings [prefix + h * w, D] of a grid (h, w).

    Those of the prefix start small and random, those of the patches as sines and cosines of row
    and column at D / 4 frequencies each.
    """

    def start(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
        waves = grid.sincos(size, shape[1])
        first = init_weights(key, (prefix, shape[1]), dtype)
        return jnp.concatenate([first, jnp.asarray(waves, dtype)])

    return start


def sequence_positions(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """Initializes the fixed position embeddings of T2T-ViT: [N, D].

    Sines (even channels) and cosines (odd ones) of the position in the sequence, class token first
    (Vaswani et al. 2017).
    """
    del key
    channel = np.arange(shape[1])
    angle = np.arange(shape[0])[:, None] / 10000.0 ** (channel // 2 * 2 / shape[1])
    return jnp.asarray(np.where(channel % 2 == 0, np.sin(angle), np.cos(angle)), dtype)


class PatchEmbed(nn.Module):
    """Linear embedding of square patches, a convolution whose stride is its kernel size."""

    width: int
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Embeds patches: [B, H, W, 3] -> [B, H/p, W/p, D]; the kernel is [p, p, 3, D]."""
        squares = grid.patches(images.astype(self.dtype), self.patch_size)
        return nn.DenseGeneral(
            self.width,
            axis=(-3, -2, -1),
            dtype=self.dtype,
            kernel_init=nn.initializers.lecun_normal(),
            name="proj",
        )(squares)
