"""Normalization of images: from bytes to what a model takes, and from one model's to another's."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from msvit_jax.typed import AnyArray, Float, Num


def normalize(
    images: Num[AnyArray, "B H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W 3"]:
    """Normalizes uint8 images [B, H, W, 3], scaled to 0 to 1, with mean and std: float32."""
    return (images.astype(jnp.float32) / 255 - _channels(mean)) / _channels(std)


def renormalize(
    images: Float[AnyArray, "B H W 3"], ours: Any, theirs: Any
) -> Float[AnyArray, "B H W 3"]:
    """Converts images [B, H, W, 3] from one model's normalization to another's.

    Args:
      images: Images that are normalized for `ours`.
      ours: Model with `mean` and `std`.
      theirs: Model with `mean` and `std`.
    """
    if (ours.mean, ours.std) == (theirs.mean, theirs.std):
        return images
    pixels = images * _channels(ours.std) + _channels(ours.mean)
    return (pixels - _channels(theirs.mean)) / _channels(theirs.std)


def _channels(values: tuple[float, ...]) -> Array:
    """Makes [1, 1, 1, 3] float32 of three numbers, for images [B, H, W, 3]."""
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3)
