"""Pictures of a model's decisions about one image: values per region or patch, drawn on its pixels.

A new kind of picture needs one more function here and one more `Column` on the sheet.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from msvit_jax.pictures.sheet import HEAT_OPACITY, Column, Picture, Strip, heat
from msvit_jax.tokens.grid import REGION

MIN_SIDE = 256  # small images are enlarged to this, so that cells and captions are legible
GATE_COLUMNS = (
    Column("image"),
    Column("tokens: yellow fine, dim coarse"),
    Column("gate", heat=("P(fine)  0", "1")),
)

MERGE_LEGEND = "yellow: patch that holds a token · flat and dim: merged into one · black: dropped"

_FINE_LINE = (255, 221, 51)
_COARSE_LINE = (112, 112, 112)
_HOST_LINE = _FINE_LINE
_GROUP_LINE = (150, 150, 150)
_DROPPED = 0.12  # brightness factor of dropped patches; they stay faintly visible


def enlarge(image: Picture, scale: int | None = None) -> Picture:
    """Repeats every pixel `scale` times in both directions; None: to at least 256."""
    _check_image(image)
    factor = scale or math.ceil(MIN_SIDE / min(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def token_map(
    image: Picture,
    coarse: np.ndarray,
    region_grid: tuple[int, int],
    *,
    scale: int | None = None,
    brightness: float = 0.6,
) -> Picture:
    """Draws the mixed-scale grid: one cell per token, bright where the tokens are fine.

    A coarse region is shown as the model sees it, pooled 2x2, and dimmed.

    Args:
      image: [H, W, 3] uint8, the image; H and W are multiples of twice the grid.
      coarse: [R], 1 for a coarse region and 0 for others; regions are in row-major order.
      region_grid: Numbers of rows and columns of regions; R = rows * columns.
      scale: Integer enlargement factor; None makes the short side at least 256.
      brightness: Brightness factor of coarse regions.

    Returns:
      [H * scale, W * scale, 3] uint8, the picture.

    Raises:
      ValueError: The image or `coarse` does not fit the grid.
    """
    height, width = _region_size(image, region_grid)
    decisions = _per_region(coarse, region_grid, "coarse")
    if not np.isin(decisions, (0, 1)).all():
        raise ValueError("`coarse` must hold 0 and 1 only; threshold the probabilities first.")
    is_coarse = decisions == 1
    dimmed = np.rint(_pooled(image) * brightness).astype(np.uint8)
    mixed = np.where(_spread(is_coarse, height, width)[..., None], dimmed, image)
    return _outline_tokens(enlarge(mixed, scale), is_coarse)


def gate_heat_map(
    image: Picture,
    p_coarse: np.ndarray,
    region_grid: tuple[int, int],
    *,
    scale: int | None = None,
    opacity: float = HEAT_OPACITY,
) -> Picture:
    """Draws each region's probability of being fine, dark 0 to yellow 1, over the gray image.

    Args:
      image: [H, W, 3] uint8, the image; H and W are multiples of twice the grid.
      p_coarse: [R], the gate's probability that a region is coarse; regions in row-major order.
      region_grid: Numbers of rows and columns of regions; R = rows * columns.
      scale: Integer enlargement factor; None makes the short side at least 256.
      opacity: Share of the heat colors in the blend.

    Returns:
      [H * scale, W * scale, 3] uint8, the picture.

    Raises:
      ValueError: The image or `p_coarse` does not fit the grid.
    """
    height, width = _region_size(image, region_grid)
    p_fine = 1 - _per_region(p_coarse, region_grid, "p_coarse").astype(np.float64)
    if not ((p_fine >= 0) & (p_fine <= 1)).all():
        raise ValueError("`p_coarse` must hold probabilities from 0 to 1; apply the sigmoid first.")
    gray = np.asarray(Image.fromarray(image).convert("L"))
    return enlarge(heat(_spread(p_fine, height, width), gray, opacity), scale)


def mask_overlay(
    image: Picture,
    labels: np.ndarray,
    colors: np.ndarray,
    *,
    scale: int | None = None,
    opacity: float = 0.6,
) -> Picture:
    """Blends an image with the colors of its pixels' classes.

    Args:
      image: [H, W, 3] uint8, the image.
      labels: [H, W] integers, class of each pixel; pixels of other numbers are only dimmed.
      colors: [classes, 3] uint8, colors of the classes.
      scale: Integer enlargement factor; None makes the short side at least 256.
      opacity: Share of the colors in the blend.

    Returns:
      [H * scale, W * scale, 3] uint8, the picture.

    Raises:
      ValueError: The labels have another size than the image.
    """
    _check_image(image)
    if labels.shape != image.shape[:2]:
        raise ValueError(f"Labels {labels.shape} do not fit an image of {image.shape[:2]}.")
    known = labels < len(colors)
    painted = np.where(known[..., None], colors[np.where(known, labels, 0)], 0)
    blended = opacity * painted + (1 - opacity) * image
    return enlarge(np.rint(blended).astype(np.uint8), scale)


def merge_map(
    image: Picture,
    merge_targets: np.ndarray,
    *,
    coarse: np.ndarray | None = None,
    scale: int | None = None,
    brightness: float = 0.7,
) -> Picture:
    """Draws which patches are part of the same token.

    The merge target of a group shows its own pixels inside a yellow frame. Patches merged into it
    show the mean color of the whole group, dimmed, with gray lines to other groups. Dropped patches
    are nearly black.

    Args:
      image: [H, W, 3] uint8, the image; H and W are multiples of the grid.
      merge_targets: [rows, columns] integers, the merge target of each patch as an index, row by
        row: the patch itself if it was not merged into another, -1 if it was dropped
        (`Output.merge_maps`). For a coarse token's four patches it is the first of them.
      coarse: [rows / 2, columns / 2], 1 for a coarse region of a mixed-scale model, which is shown
        as one patch, pooled 2x2; None for other models.
      scale: Integer enlargement factor; None makes the short side at least 256.
      brightness: Brightness factor of merged patches.

    Returns:
      [H * scale, W * scale, 3] uint8, the picture.

    Raises:
      ValueError: The image does not fit the grid, or `merge_targets` is not a valid merge map.
    """
    merge_targets = _checked_targets(merge_targets)
    height, width = _patch_size(image, merge_targets.shape)
    is_coarse = np.zeros(merge_targets.shape, bool)
    if coarse is not None:
        is_coarse = _spread(np.asarray(coarse) > 0.5, REGION, REGION)
    held = _held(merge_targets, is_coarse)
    drawn = np.where(_spread(is_coarse, height, width)[..., None], _pooled(image), image)
    drawn = drawn.astype(np.float64)
    for target in np.unique(merge_targets[~held & (merge_targets >= 0)]):
        group = merge_targets == target
        mean = image[_spread(group, height, width)].mean(axis=0)
        drawn[_spread(group & ~held, height, width)] = brightness * mean
    drawn[_spread(merge_targets < 0, height, width)] *= _DROPPED
    return _outline_groups(enlarge(np.rint(drawn).astype(np.uint8), scale), merge_targets, held)


def count_tokens(merge_targets: np.ndarray) -> np.ndarray:
    """Counts the tokens left in merge maps: [..., rows, columns] -> [...]."""
    cells = np.arange(math.prod(merge_targets.shape[-2:])).reshape(merge_targets.shape[-2:])
    return (merge_targets == cells).sum(axis=(-2, -1))


def gate_strip(
    image: Picture,
    coarse: np.ndarray,
    p_coarse: np.ndarray,
    region_grid: tuple[int, int],
    *,
    caption: str = "",
    wrong: bool = False,
) -> Strip:
    """A strip of an image, its mixed-scale grid and its gate's heat map (GATE_COLUMNS)."""
    pictures = (
        enlarge(image),
        token_map(image, coarse, region_grid),
        gate_heat_map(image, p_coarse, region_grid),
    )
    return Strip(pictures, caption, wrong)


def _pooled(image: Picture) -> Picture:
    """Replaces every 2x2 block of pixels by its mean."""
    height, width, _ = image.shape
    small = np.asarray(Image.fromarray(image).reduce(2))
    return small.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]


def _check_image(image: Picture) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"Expected a uint8 image [H, W, 3], got {image.dtype} {image.shape}.")


def _patch_size(image: Picture, grid_size: tuple[int, ...]) -> tuple[int, int]:
    _check_image(image)
    rows, columns = grid_size
    if image.shape[0] % rows or image.shape[1] % columns:
        raise ValueError(
            f"An image of {image.shape[0]} x {image.shape[1]} pixels cannot be cut into"
            f" {rows} x {columns} patches."
        )
    return image.shape[0] // rows, image.shape[1] // columns


def _region_size(image: Picture, region_grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a region in pixels; both are even, because it has 2 x 2 fine cells."""
    _check_image(image)
    rows, columns = region_grid
    if image.shape[0] % (2 * rows) or image.shape[1] % (2 * columns):
        raise ValueError(
            f"An image of {image.shape[0]} x {image.shape[1]} pixels cannot be cut into"
            f" {rows} x {columns} regions of 2 x 2 cells each."
        )
    return image.shape[0] // rows, image.shape[1] // columns


def _per_region(values: np.ndarray, region_grid: tuple[int, int], name: str) -> np.ndarray:
    values, (rows, columns) = np.asarray(values), region_grid
    if values.shape != (rows * columns,):
        raise ValueError(
            f"`{name}` has shape {values.shape}, but a grid of {rows} x {columns} regions"
            f" needs ({rows * columns},): one number per region, in row-major order."
        )
    return values.reshape(region_grid)


def _spread(per_region: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeats every region's value over all of its pixels: [rows, columns] -> [H, W]."""
    return per_region.repeat(height, axis=0).repeat(width, axis=1)


def _outline_tokens(picture: Picture, is_coarse: np.ndarray) -> Picture:
    """Outlines every token just inside its own cell."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    rows, columns = is_coarse.shape
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    for row, column in np.ndindex(rows, columns):
        parts = 1 if is_coarse[row, column] else 2
        color = _COARSE_LINE if is_coarse[row, column] else _FINE_LINE
        for y, x in np.ndindex(parts, parts):
            top, left = row * height + y * (height // parts), column * width + x * (width // parts)
            corner = (left + width // parts - 1, top + height // parts - 1)
            draw.rectangle(((left, top), corner), outline=color)
    return np.asarray(canvas)


def _checked_targets(merge_targets: np.ndarray) -> np.ndarray:
    merge_targets = np.asarray(merge_targets)
    if merge_targets.ndim != 2 or not np.issubdtype(merge_targets.dtype, np.integer):
        raise ValueError(
            f"Expected integers [rows, columns], got {merge_targets.dtype} {merge_targets.shape}."
        )
    named = np.unique(merge_targets[merge_targets >= 0])
    if (
        (merge_targets < -1).any()
        or (named >= merge_targets.size).any()
        or (merge_targets.reshape(-1)[named] != named).any()
    ):
        raise ValueError("`merge_targets` must name patches that name themselves, or -1.")
    return merge_targets


def _held(merge_targets: np.ndarray, is_coarse: np.ndarray) -> np.ndarray:
    """[rows, columns] bool, True for merge targets: one patch, or a coarse token's four."""
    row, column = np.indices(merge_targets.shape)
    first = row // REGION * REGION * merge_targets.shape[1] + column // REGION * REGION
    return merge_targets == np.where(
        is_coarse, first, np.arange(merge_targets.size).reshape(merge_targets.shape)
    )


def _outline_groups(picture: Picture, merge_targets: np.ndarray, held: np.ndarray) -> Picture:
    """Draws lines just inside patches: frames around merge targets, and borders between groups."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    rows, columns = merge_targets.shape
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    # The area outside the image is another group.
    groups, frames = np.pad(merge_targets, 1, constant_values=-2), np.pad(held, 1)
    for row, column in np.ndindex(rows, columns):
        top, left = row * height, column * width
        bottom, right = top + height - 1, left + width - 1
        sides = {
            (0, 1): ((left, top), (right, top)),
            (2, 1): ((left, bottom), (right, bottom)),
            (1, 0): ((left, top), (left, bottom)),
            (1, 2): ((right, top), (right, bottom)),
        }
        for (down, across), line in sides.items():
            beside = (row + down, column + across)
            if held[row, column] and not (
                frames[beside] and groups[beside] == merge_targets[row, column]
            ):
                draw.line(line, fill=_HOST_LINE)
            elif groups[beside] != merge_targets[row, column]:
                draw.line(line, fill=_GROUP_LINE)
    return np.asarray(canvas)
