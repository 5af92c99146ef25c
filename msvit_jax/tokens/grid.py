"""Grids of patches, regions and slots: static-shape array functions without parameters.

A *region* is a square of 2 x 2 fine cells that one coarse token can stand for. *Slots* hold the
positions of a region's fine cells in region-major order, so an array of slots has the length of the
fine grid whatever a gate decides: slot 0 of a region carries its coarse token or its first fine
one, slots 1 to 3 its other fine tokens or nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msvit_jax.typed import AnyArray, Float, Int, Num, Shaped

REGION = 2  # fine cells along one side of a region


def patches(
    images: Shaped[AnyArray, "B H W C"], size: int
) -> Shaped[AnyArray, "B H//{size} W//{size} {size} {size} C"]:
    """Cuts images into squares: [B, H, W, C] -> [B, H/size, W/size, size, size, C].

    Raises:
      ValueError: The image is not a whole number of patches.
    """
    batch, height, width, channels = images.shape
    if height % size or width % size:
        raise ValueError(
            f"An image of {height} x {width} px is not a whole number of {size} px patches; "
            f"use an image size divisible by {size}."
        )
    split = images.reshape(batch, height // size, size, width // size, size, channels)
    return split.transpose(0, 1, 3, 2, 4, 5)


def subpatches(images: Array, size: int, times: int) -> list[Array]:
    """Sorts small squares by their offset within larger ones: times**2 of [B, H/t, W/t, C].

    Args:
      images: [B, H, W, C], images that are a whole number of the larger squares.
      size: Side of the small squares.
      times: Number of small squares along a side of a larger one.
    """
    if times == 1:
        return [images]
    batch, height, width, channels = images.shape
    rows, columns = height // (size * times), width // (size * times)
    split = images.reshape(batch, rows, times, size, columns, times, size, channels)
    shape = (batch, rows * size, columns * size, channels)
    pairs = [(i, j) for i in range(times) for j in range(times)]
    return [split[:, :, i, :, :, j].reshape(shape) for i, j in pairs]


def pool(
    cells: Float[AnyArray, "*B H W C"], size: int = REGION
) -> Float[AnyArray, "*B H//{size} W//{size} C"]:
    """Averages squares of cells: [..., H, W, C] -> [..., H/size, W/size, C].

    On an image, bilinear resizing by one half is exactly this mean.
    """
    # Sums of strided slices: a mean over axes of the reshaped image costs a TPU five times more.
    rows = sum(cells[..., i::size, :, :] for i in range(size))
    return sum(rows[..., i::size, :] for i in range(size)) / size**2


def to_regions(
    cells: Shaped[AnyArray, "B H W D"], size: int = REGION
) -> Shaped[AnyArray, "B R {size}**2 D"]:
    """Orders a grid region by region: [B, H, W, D] -> [B, R, size**2, D], regions row-major."""
    split = patches(cells, size)
    batch, rows, columns, *_, width = split.shape
    return split.reshape(batch, rows * columns, size * size, width)


def from_regions(
    regions: Shaped[AnyArray, "B R {size}**2 D"], region_grid: tuple[int, int], size: int = REGION
) -> Shaped[AnyArray, "B H W D"]:
    """Undoes `to_regions`: [B, R, size**2, D] and the grid of regions -> [B, H, W, D]."""
    batch, _, _, width = regions.shape
    rows, columns = region_grid
    split = regions.reshape(batch, rows, columns, size, size, width).transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(batch, rows * size, columns * size, width)


def count_tokens(coarse: np.ndarray) -> np.ndarray:
    """Counts the active patch tokens of images, [N], from the decisions of their regions, [N, R].

    A region is coarse where its decision is above 1/2.
    """
    return np.where(coarse > 0.5, 1, REGION**2).sum(axis=1)


def fill_slots(
    fine: Float[AnyArray, "B R S D"],
    coarse: Float[AnyArray, "B R D"],
    is_coarse: Num[AnyArray, "B R"],
) -> Float[AnyArray, "B R S D"]:
    """Fills each region's slots with its coarse token or with its fine ones.

    Args:
      fine: [B, R, S, D], fine tokens, region by region.
      coarse: [B, R, D], coarse tokens.
      is_coarse: [B, R], 1 where the coarse token stands for the region, 0 where the fine ones do.

    Returns:
      [B, R, S, D]. Slots 1 to S-1 of coarse regions keep their fine token: `slot_weights` hides it.
    """
    first = jnp.arange(fine.shape[2])[None, None, :, None] == 0
    return jnp.where(first & (is_coarse > 0.5)[:, :, None, None], coarse[:, :, None, :], fine)


def slot_weights(
    is_coarse: Num[AnyArray, "B R"], slots: int = REGION**2
) -> Num[AnyArray, "B R {slots}"]:
    """Returns 1 for slots with a token, else 0: [B, R] -> [B, R, slots]; slot 0 always has one."""
    rest = 1 - is_coarse[:, :, None]
    return jnp.concatenate([jnp.ones_like(rest), jnp.repeat(rest, slots - 1, axis=2)], axis=2)


def slot_areas(
    is_coarse: Num[AnyArray, "B R"], slots: int = REGION**2
) -> Num[AnyArray, "B R {slots}"]:
    """Number of fine cells each slot's token stands for: [B, R] -> [B, R, slots]."""
    weights = slot_weights(is_coarse, slots)
    return weights.at[:, :, 0].add((slots - 1) * is_coarse)


def both_scales(
    fine: Float[AnyArray, "B R S D"], coarse: Float[AnyArray, "B R D"]
) -> Float[AnyArray, "B R S+1 D"]:
    """Joins both scales of each region, the coarse token first, as the paper has them.

    The active ones among them are in the order of `fill_slots`.

    Args:
      fine: [B, R, S, D], fine tokens, region by region.
      coarse: [B, R, D], coarse tokens.

    Returns:
      [B, R, 1 + S, D] tokens.
    """
    return jnp.concatenate([coarse[:, :, None], fine], axis=2)


def both_weights(
    is_coarse: Num[AnyArray, "B R"], slots: int = REGION**2
) -> Num[AnyArray, "B R {slots}+1"]:
    """Weights of `both_scales`, linear in the decisions: [B, R] -> [B, R, 1 + slots]."""
    fine = jnp.repeat(1 - is_coarse[:, :, None], slots, axis=2)
    return jnp.concatenate([is_coarse[:, :, None], fine], axis=2)


def both_areas(
    is_coarse: Num[AnyArray, "B R"], slots: int = REGION**2
) -> Num[AnyArray, "B R {slots}+1"]:
    """Number of fine cells each token of `both_scales` stands for: [B, R] -> [B, R, 1 + slots]."""
    return both_weights(is_coarse, slots).at[:, :, 0].multiply(slots)


def slots_to_map(
    slots: Shaped[AnyArray, "B R S D"],
    is_coarse: Num[AnyArray, "B R"],
    region_grid: tuple[int, int],
) -> Shaped[AnyArray, "B H W D"]:
    """Makes a dense map from slots, each coarse token repeated over the cells it stands for.

    Args:
      slots: [B, R, S, D] tokens.
      is_coarse: [B, R] decisions, 0 or 1.
      region_grid: (rows, columns) of regions.

    Returns:
      [B, H, W, D] on the fine grid (MSViT, dense prediction).
    """
    repeated = jnp.where(is_coarse[:, :, None, None] > 0.5, slots[:, :, :1], slots)
    return from_regions(repeated, region_grid)


def both_to_map(
    tokens: Float[AnyArray, "B R S D"],
    is_coarse: Num[AnyArray, "B R"],
    region_grid: tuple[int, int],
) -> Float[AnyArray, "B H W D"]:
    """Makes the dense map of `slots_to_map` from the tokens of both scales.

    The map is linear in the decisions, so that gradient tells a gate what its cells would become
    with the other scale's tokens, which are there as well (MSViT's mask at the output).

    Args:
      tokens: [B, R, 1 + S, D] tokens, in the order of `both_scales`.
      is_coarse: [B, R] decisions, 0 or 1.
      region_grid: (rows, columns) of regions.

    Returns:
      [B, H, W, D] on the fine grid.
    """
    share = is_coarse[:, :, None, None].astype(tokens.dtype)
    mixed = share * tokens[:, :, :1] + (1 - share) * tokens[:, :, 1:]
    return from_regions(mixed, region_grid)


def targets_to_map(
    targets: Int[AnyArray, "B N"], is_coarse: Num[AnyArray, "B R"], size: tuple[int, int]
) -> Int[AnyArray, "B rows columns"]:
    """Makes a dense map of merge targets by cell from merge targets by slot.

    Args:
      targets: [B, R * 4] int32, the slot that each slot was merged into; -1 for none.
      is_coarse: [B, R] decisions, 0 or 1.
      size: (rows, columns) of the grid of cells.

    Returns:
      [B, rows, columns] int32, the merge target of each cell, cells counted row by row; -1 for
      none.
    """
    cells = jnp.arange(size[0] * size[1], dtype=jnp.int32).reshape(1, *size, 1)
    named = to_regions(cells).reshape(-1)[jnp.maximum(targets, 0)]
    slots = jnp.where(targets < 0, -1, named).reshape(*is_coarse.shape, REGION**2, 1)
    return slots_to_map(slots, is_coarse, (size[0] // REGION, size[1] // REGION))[..., 0]


def center_distance(size: tuple[int, int]) -> np.ndarray:
    """Distance of each region from the image's center, 1 in the corners: [rows * columns]."""
    rows, columns = (np.linspace(-1.0, 1.0, n) if n > 1 else np.zeros(1) for n in size)
    distance = np.sqrt(rows[:, None] ** 2 + columns[None, :] ** 2).reshape(-1)
    return distance / max(distance.max(), 1e-9)


def sincos(size: tuple[int, int], width: int, *, row_first: bool = True) -> np.ndarray:
    """Sines and cosines of the row and column of a grid's cells (h, w): [h * w, width] float64.

    There are width / 4 frequencies for each; `row_first` tells whether the row's or the column's
    come first.
    """
    frequency = 10000.0 ** -np.linspace(0.0, 1.0, width // 4)
    cells = np.divmod(np.arange(size[0] * size[1]), size[1])
    angles = [np.outer(p, frequency) for p in (cells if row_first else cells[::-1])]
    return np.concatenate([wave(a) for a in angles for wave in (np.sin, np.cos)], axis=1)


def resize_positions(
    positions: Float[AnyArray, "h w D"], grid_size: tuple[int, int], method: str = "timm"
) -> Float[AnyArray, "H W D"]:
    """Resizes position embeddings [h, w, D] to another grid, by the method of their code base.

    Args:
      positions: [h, w, D], embeddings of every cell.
      grid_size: (rows, columns) of the result.
      method: Name of the method, one of `RESIZINGS`.
    """
    if positions.shape[:2] == tuple(grid_size):
        return positions
    if method == "timm":
        shape = (*grid_size, positions.shape[-1])
        return jax.image.resize(positions, shape, method="bicubic", antialias=True)
    beyond = RESIZINGS[method]
    rows, columns = (
        jnp.asarray(_cubic(old, new, beyond), positions.dtype)
        for old, new in zip(positions.shape[:2], grid_size, strict=True)
    )
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("yh,xw,hwd->yxd", rows, columns, positions, precision=exact)


# timm: bicubic (a = -0.5) with antialiasing. The others, without and with a = -0.75, differ in what
# is added to the new length before the scale is computed: transformers' ViT, DeiT and DINOv2 add
# nothing, DINOv2's own code 0.1.
RESIZINGS = {"timm": 0.0, "transformers": 0.0, "dinov2": 0.1}
_CUBIC = -0.75


@functools.cache
def _cubic(old: int, new: int, beyond: float) -> np.ndarray:
    """PyTorch's bicubic interpolation of an axis: [new, old] float64; rows sum to 1."""
    at = (np.arange(new) + 0.5) * (old / (new + beyond)) - 0.5
    cells = np.floor(at)[:, None] + np.arange(-1, 3)
    far = np.abs(at[:, None] - cells)
    near = ((_CUBIC + 2) * far - (_CUBIC + 3)) * far**2 + 1
    tail = _CUBIC * (((far - 5) * far + 8) * far - 4)
    matrix = np.zeros((new, old))
    inside = cells.clip(0, old - 1).astype(int)  # beyond an edge, the edge cell is repeated
    np.add.at(matrix, (np.arange(new)[:, None], inside), np.where(far <= 1, near, tail))
    matrix.flags.writeable = False
    return matrix


def resize_kernel(kernel: np.ndarray, size: int) -> np.ndarray:
    """Resizes the kernel of a patch embedding: [p, p, C, D] -> [size, size, C, D] float32.

    FlexiViT's pseudo-inverse (Beyer et al. 2022, arXiv 2212.08013, section 3.4): for patches
    enlarged bilinearly, the new kernel gives exactly the tokens that the old one gave for the
    original patches; for patches made smaller it is the closest approximation.
    """
    old = kernel.shape[0]
    enlarge = jax.image.resize(jnp.eye(old), (size, old), method="bilinear", antialias=False)
    inverse = np.linalg.pinv(np.asarray(enlarge, np.float64).T)
    return np.einsum("pi,qj,ijcd->pqcd", inverse, inverse, kernel).astype(np.float32)


@functools.cache
def upsampling(old: int, new: int) -> np.ndarray:
    """Returns the matrix that resizes an axis from `old` to `new` cells: [new, old] float32.

    Nearest neighbor to the next multiple of `old`, then adaptive average pooling, as DVT's code
    resizes what a stage reuses (7 -> 14 -> 10, 10 -> 20 -> 14). Rows sum to 1; the matrix is
    read-only.
    """
    if old < 1 or new < 1:
        raise ValueError(f"Grids of {old} and {new} cells: at least 1 is needed.")
    between = -(-new // old) * old
    cells = np.arange(between)
    rows = []
    for row in range(new):
        first, end = row * between // new, -(-(row + 1) * between // new)
        pooled = ((cells >= first) & (cells < end)) / (end - first)
        rows.append(pooled.reshape(old, -1).sum(axis=1))
    matrix = np.asarray(rows, np.float32)
    matrix.flags.writeable = False
    return matrix


def grid_upsampling(old: tuple[int, int], new: tuple[int, int], prefix: int = 0) -> np.ndarray:
    """Returns the matrix that resizes a row-major grid of tokens: [P + H*W, P + h*w] float32.

    One product with it is faster on a TPU (docs/dvt.md) than gathering and blending along each
    axis, whose gradient is a loop that scatters.

    Args:
      old: (h, w) of the grid.
      new: (H, W) of the result; each axis is resized by `upsampling`.
      prefix: Number P of tokens before the grid, which stay as they are.
    """
    cells = np.kron(*(upsampling(*sides) for sides in zip(old, new, strict=True)))
    matrix = np.eye(prefix + cells.shape[0], prefix + cells.shape[1], dtype=np.float32)
    matrix[prefix:, prefix:] = cells
    return matrix


def windows(
    x: Float[AnyArray, "B H W C"], size: int, stride: int, padding: int
) -> Float[AnyArray, "B h w K"]:
    """Cuts overlapping squares, PyTorch's unfold: [B, H, W, C] -> [B, h, w, size**2 * C].

    Features are ordered (row, column, channel).

    Args:
      x: [B, H, W, C] map.
      size: Side of a square.
      stride: Step from one square to the next.
      padding: Width of the zeros on every side.
    """
    around = (padding, padding)
    x = jnp.pad(x, ((0, 0), around, around, (0, 0)))
    for axis in (1, 3):  # rows, then columns: [B, h, size, W, C], then [B, h, size, w, size, C]
        count = (x.shape[axis] - size) // stride + 1
        reach = (count - 1) * stride + 1
        offsets = [
            jax.lax.slice_in_dim(x, offset, offset + reach, stride, axis=axis)
            for offset in range(size)
        ]
        x = jnp.stack(offsets, axis=axis + 1)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(*x.shape[:3], -1)
