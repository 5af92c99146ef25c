"""Token Mergence: multi-scale patch features, then unimportant tokens merged into important ones.

Bian et al. 2023 (arXiv 2306.04897). The paper has no public code and only its abstract was
available: tokens are split by importance, unimportant ones are merged into important ones by
similarity, and multi-scale features are fused before that; 33 % fewer MACs for 0.1 points on
DeiT-S. Everything else here is our reconstruction. Merging itself is an attribute of any `ViT`
(`reducer`, see `reducers`); this module adds the scales.
"""

import functools
import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from numpy.typing import ArrayLike

from msvit_jax import flops
from msvit_jax.image_size import shown
from msvit_jax.models.backbone_mixin import BackboneMixin
from msvit_jax.models.block import gelu
from msvit_jax.models.embedding import PatchEmbed
from msvit_jax.models.output import Output, also_empty
from msvit_jax.models.vit import ViT
from msvit_jax.models.vit_checks import check_images
from msvit_jax.tokens import grid


class ScaleFeatures(nn.Module):
    """Features of another patch size's embedding, resampled to the backbone's grid.

    Smaller patches are averaged over the cell they lie in, larger ones repeated over the cells they
    cover. A GELU is applied first: without it, the mean over smaller patches would be linear in the
    cell's pixels, as the backbone's own embedding already is, and would add nothing. The projection
    starts at zero, so a model starts as if the scale were not there.
    """

    width: int
    patch_size: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Computes the features: [B, H, W, 3] -> [B, H / stride, W / stride, D]."""
        embed = PatchEmbed(self.width, self.patch_size, self.dtype, name="embed")
        parts = max(1, self.stride // self.patch_size)
        # One offset within the cells at a time, so that no map of all small patches is in memory.
        features = [gelu(embed(part)) for part in grid.subpatches(images, self.patch_size, parts)]
        x = functools.reduce(operator.add, features) / parts**2
        zeros = nn.initializers.zeros
        x = nn.Dense(self.width, kernel_init=zeros, dtype=self.dtype, name="proj")(x)
        times = max(1, self.patch_size // self.stride)
        return jnp.repeat(jnp.repeat(x, times, axis=1), times, axis=2)


class Mergence(BackboneMixin, nn.Module):
    """A `ViT` that sees several patch sizes, and reduces tokens as its own attributes specify.

    Attributes:
      backbone: Transformer on the tokens, with its `reducer`, `reduce_layers` and `keep`.
      scales: Patch sizes in px whose features are fused before the first layer; the backbone's own
        is always there. Others divide it or are multiples of it, and divide the image.
    """

    backbone: ViT
    scales: tuple[int, ...] = (8, 16)

    def setup(self) -> None:
        """Makes the submodules."""
        self.check()
        vit = self.backbone
        self.features = [
            ScaleFeatures(vit.width, size, self.patch_size, vit.dtype, name=f"scale_{size}")
            for size in self._others
        ]

    def check(self) -> None:
        """Raises ValueError for scales that do not fit the image or its patches."""
        stride = self.patch_size
        for size in self.scales:
            if size < 1 or any(side % size for side in self.image_shape[:2]):
                raise ValueError(
                    f"scales={self.scales}: patches of {size} px do not divide an image of "
                    f"{shown(self.image_size)}; use sizes that do, or another image_size."
                )
            if size % stride and stride % size:
                raise ValueError(
                    f"scales={self.scales}: {size} px neither divides patch_size={stride} nor is a "
                    "multiple of it; use sizes that fit the backbone's grid."
                )

    @property
    def side_multiple(self) -> int:
        """Number of px that both sides of an image must be a multiple of."""
        return math.lcm(self.patch_size, *self.scales)

    @property
    def _others(self) -> list[int]:
        return sorted(set(self.scales) - {self.patch_size})

    def macs(self, tokens: ArrayLike) -> np.ndarray:
        """Counts multiply-accumulates for images with the given numbers of patch tokens."""
        vit = self.backbone
        extra = 0.0
        for size in self._others:
            height, width, _ = self.image_shape
            patches = (height // size) * (width // size)
            extra += float(flops.dense(patches, 3 * size**2, vit.width))
            extra += float(flops.dense(min(patches, vit.max_tokens), vit.width, vit.width))
        return vit.macs(tokens) + extra

    @also_empty
    def __call__(self, images: Array, *, train: bool = False) -> Output:
        """Classifies images.

        Args:
          images: [B, H, W, 3] float32 images, normalized; H and W are divisible by every patch
            size.
          train: Whether stochastic depth is on (rng stream "dropout").
        """
        check_images(images, self.side_multiple)
        x = self.backbone.embed(images)
        for features in self.features:
            x = x + features(images)
        return self.backbone.forward_tokens(x, train=train)
