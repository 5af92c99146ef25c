"""Bilinear resizing as two products with matrices: the same numbers on the device and on the CPU.

It is that of PyTorch with align_corners=False, which published segmentation models end with.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@functools.cache
def bilinear(old: int, new: int) -> np.ndarray:
    """Returns the matrix that resizes an axis: [new, old] float32, read-only; rows sum to 1.

    Beyond the first and last cell's centers their values are repeated. Nothing is averaged where an
    axis gets shorter.
    """
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.minimum(at.astype(int), max(old - 2, 0))
    matrix = np.zeros((new, old))
    rows = np.arange(new)
    matrix[rows, low] = 1 - (at - low)
    np.add.at(matrix, (rows, np.minimum(low + 1, old - 1)), at - low)
    matrix = matrix.astype(np.float32)
    matrix.flags.writeable = False
    return matrix


def upsample(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes on the CPU: [h, w, C] -> [H, W, C] float32."""
    if x.shape[:2] == tuple(size):
        return np.asarray(x, np.float32)
    height, width, channels = x.shape
    rows = bilinear(height, size[0]) @ x.reshape(height, -1).astype(np.float32)
    return np.matmul(bilinear(width, size[1]), rows.reshape(size[0], width, channels))


def upsample_logits(logits: Array, size: tuple[int, int], patch_size: int) -> Array:
    """Brings logits of patches to the pixels of the images they were computed for.

    Args:
      logits: [B, h, w, C], logits on the grid of the padded images.
      size: (H, W) of the images before they were padded below and on the right.
      patch_size: Side of a patch in px.

    Returns:
      [B, H, W, C] float32.
    """
    rows, columns = (
        jnp.asarray(bilinear(cells, cells * patch_size)[:side])
        for cells, side in zip(logits.shape[1:3], size, strict=True)
    )
    x = logits.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, x, precision=exact)
