"""Crops of images and their masks, made on the devices; see `on_device`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from msvit_jax.data import augment
from msvit_jax.image_size import height_and_width
from msvit_jax.segmentation import IGNORED

# Keys of a config's `data` section that need the processor, with the values that leave them out.
HOST_ONLY = {
    "photometric": False,
    "max_class_share": 1.0,
    "pad_shift": 0,
    "color_jitter": 0.0,
    "erasing": 0.0,
}


def draw(
    config: ConfigDict, rng: np.random.Generator, batch: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws how each image of a batch is scaled, cropped and mirrored.

    Returns:
      Sizes that images are scaled to, int32 [B, 2] (height, width), upper left corners of the crops
      in the scaled images, int32 [B, 2], and whether to mirror, bool [B].
    """
    size = np.asarray((height, width))
    factors = np.full(batch, 1.0 if config.short_side is None else config.short_side / size.min())
    if config.scale_range is not None:
        lowest, highest = config.scale_range
        factors *= rng.uniform(lowest, highest, size=batch)
    scaled = np.maximum(1, np.rint(factors[:, None] * size)).astype(np.int32)
    crop = np.asarray(height_and_width(config.image_size), np.int32)
    corners = rng.integers(np.maximum(scaled - crop, 0) + 1, dtype=np.int32)
    flips = rng.random(batch) < 0.5 if config.flip else np.zeros(batch, bool)
    return scaled, corners, flips


@functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, 0, None))
def cut(
    image: Array, mask: Array, scaled: Array, corner: Array, flip: Array, size: tuple[int, int]
) -> dict[str, Array]:
    """Scales, crops and mirrors images and masks, filling what lies beyond a smaller image.

    Args:
      image: [B, H, W, 3] uint8.
      mask: [B, H, W] uint8 class numbers.
      scaled: [B, 2] from `draw`.
      corner: [B, 2] from `draw`.
      flip: [B] from `draw`.
      size: (h, w) of the crops in px.

    Returns:
      {'image': uint8 [B, h, w, 3], 'segmentation_mask': uint8 [B, h, w]}.
    """
    places = [corner[axis] + jnp.arange(size[axis]) for axis in (0, 1)]  # in the scaled image
    inside = (places[0] < scaled[0])[:, None] & (places[1] < scaled[1])[None]
    scale = scaled.astype(jnp.float32) / jnp.asarray(mask.shape, jnp.float32)
    resized = jax.image.scale_and_translate(
        image.astype(jnp.float32),
        (*size, 3),
        (0, 1),
        scale,
        -corner.astype(jnp.float32),
        "linear",
    )
    resized = jnp.rint(resized).clip(0, 255).astype(jnp.uint8)
    pixels = jnp.where(inside[..., None], resized, jnp.asarray(augment.MEAN_COLOR, jnp.uint8))
    # In whole numbers, as pixels whose center falls between two others round either way in floats.
    rows, columns = (
        ((2 * places[axis] + 1) * side // (2 * scaled[axis])).clip(0, side - 1)
        for axis, side in enumerate(mask.shape)
    )
    classes = jnp.where(inside, mask[rows][:, columns], jnp.uint8(IGNORED))
    return {
        "image": jnp.where(flip, pixels[:, ::-1], pixels),
        "segmentation_mask": jnp.where(flip, classes[:, ::-1], classes),
    }
