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
    at = _centers(old, new)
    low, high = _neighbors(old, new)
    matrix = np.zeros((new, old))
    rows = np.arange(new)
    matrix[rows, low] = 1 - (at - low)
    np.add.at(matrix, (rows, high), at - low)
    matrix = matrix.astype(np.float32)
    matrix.flags.writeable = False
    return matrix


def _centers(old: int, new: int) -> np.ndarray:
    """Returns where the new cells' centers lie among the old ones', [new]."""
    return np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)


def _neighbors(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the old cells before and after each new one, two times [new]; the same for one."""
    low = np.minimum(_centers(old, new).astype(int), max(old - 2, 0))
    return low, np.minimum(low + 1, old - 1)


def upsample(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes on the CPU: [h, w, C] -> [H, W, C] float32."""
    x = np.asarray(x, np.float32)
    for axis, (old, new) in enumerate(zip(x.shape[:2], size, strict=True)):
        if old != new:
            x = _along(x, axis, new)
    return x


def _along(x: np.ndarray, axis: int, new: int) -> np.ndarray:
    """Resizes an axis: of the matrix's products only the two of a row that are not zero."""
    matrix = bilinear(x.shape[axis], new)
    low, high = _neighbors(x.shape[axis], new)
    rows = np.arange(new)
    shape = (-1, *(1,) * (x.ndim - 1 - axis))
    upper = np.where(high > low, matrix[rows, high], np.float32(0)).reshape(shape)
    mixed = np.take(x, low, axis) * matrix[rows, low].reshape(shape)
    mixed += np.take(x, high, axis) * upper
    return mixed


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
