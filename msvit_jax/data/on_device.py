"""A training split that stays on the devices: crops, flips and shifts are made there.

For data sets of some gigabytes at most, where the processor could not make images as fast as the
devices learn from them. Which examples a batch holds, and how each is cut, depends on (seed, step)
alone, for any number of processes.
"""

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from msvit_jax import sharding
from msvit_jax.data import decode, on_device_masks, pipeline, segmentation, sources
from msvit_jax.errors import UserError
from msvit_jax.image_size import ImageSize, height_and_width

# Keys of a config's `data` section that need the processor, with the values that leave them out.
HOST_ONLY = {"color_jitter": 0.0, "erasing": 0.0, "randaugment.num_ops": 0, "resize": "pillow"}


def train_iterator(
    config: ConfigDict, *, batch_size: int, seed: int, mesh: Mesh, start_step: int = 0
) -> Iterator[dict[str, Array]]:
    """Yields the global batches of steps `start_step`, `start_step` + 1, ...

    Every epoch has its own order, and a batch may span two epochs. Images are cut by
    `jax.image.scale_and_translate` (cubic, antialiased), within a few gray levels of Pillow.

    Args:
      config: The `data` section of a config.
      batch_size: Global batch size B.
      seed: Seed of the examples' order and augmentation.
      mesh: Mesh of devices; each holds the whole split.
      start_step: First step to yield.

    Yields:
      {'image': uint8 [B, h, w, 3], 'label': int32 [B]}, cut over the mesh; for the target
      'segmentation_mask' {'image', 'segmentation_mask': uint8 [B, h, w]}.

    Raises:
      UserError: The config asks for what is only made by the processor, the images differ in size,
        or one cannot be read.
    """
    masked = config.target == sources.MASK
    _check(config, on_device_masks.HOST_ONLY if masked else HOST_ONLY)
    images, answers = _stacked(config)
    count, height, width = images.shape[:3]
    whole = sharding.replicated(mesh)
    placed = [sharding.put(x, whole) for x in (images, answers)]
    how, make = (on_device_masks.draw, _cut_masked) if masked else (draw, _cut)
    cut = jax.jit(make, static_argnames="size", out_shardings=sharding.batch_sharding(mesh))
    step = start_step
    while True:
        rng = np.random.default_rng((seed, step))
        drawn = how(config, rng, batch_size, height, width)
        chosen = _examples_of(step, batch_size, count, seed)
        yield cut(*placed, chosen, *drawn, size=height_and_width(config.image_size))
        step += 1


def draw(
    config: ConfigDict, rng: np.random.Generator, batch: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws how each image of a batch is cut.

    Returns:
      Boxes float32 [B, 4] (left, upper, right, lower), shifts int32 [B, 2] (down, right) and
      whether to mirror, bool [B].
    """
    boxes = np.tile(np.asarray([0, 0, width, height], np.float32), (batch, 1))
    if config.crop_scale is not None:
        scale, ratio = tuple(config.crop_scale), tuple(config.crop_ratio)
        drawn = [decode.random_box(width, height, scale, ratio, rng) for _ in range(batch)]
        boxes = np.asarray(drawn, np.float32)
    flips = rng.random(batch) < 0.5 if config.flip else np.zeros(batch, bool)
    reach = config.pad_shift
    shifts = rng.integers(-reach, reach + 1, (batch, 2), dtype=np.int32)
    return boxes, shifts, flips


def _examples_of(step: int, batch: int, count: int, seed: int) -> np.ndarray:
    """Returns the examples of a step's batch: places in one order after the other, [B]."""
    first, last = step * batch, (step + 1) * batch - 1
    epochs = range(first // count, last // count + 1)
    orders = [np.random.default_rng((seed, epoch, count)).permutation(count) for epoch in epochs]
    start = first - epochs[0] * count
    return np.concatenate(orders)[start : start + batch].astype(np.int32)


def _cut(
    images: Array,
    labels: Array,
    chosen: Array,
    boxes: Array,
    shifts: Array,
    flips: Array,
    size: tuple[int, int],
) -> dict[str, Array]:
    """Cuts, mirrors and shifts the chosen images."""
    picked = images[chosen]
    if images.shape[1:3] != size:
        picked = jax.vmap(resized_crop, (0, 0, None))(picked, boxes, size)
    picked = jnp.where(flips[:, None, None, None], picked[:, :, ::-1], picked)
    rows, columns = (  # the border fills the gap
        (shifts[:, axis, None] + jnp.arange(side)[None]).clip(0, side - 1)
        for axis, side in enumerate(size)
    )
    picked = jax.vmap(lambda x, down, across: x[down][:, across])(picked, rows, columns)
    return {"image": picked, "label": labels[chosen]}


def _cut_masked(
    images: Array,
    masks: Array,
    chosen: Array,
    scaled: Array,
    corners: Array,
    flips: Array,
    size: tuple[int, int],
) -> dict[str, Array]:
    """Cuts and mirrors the chosen images with their masks."""
    return on_device_masks.cut(images[chosen], masks[chosen], scaled, corners, flips, size)


def resized_crop(image: Array, box: Array, size: ImageSize) -> Array:
    """Cuts a box (left, upper, right, lower) out of uint8 [H, W, 3]; returns uint8 [h, w, 3].

    Unlike Pillow, which cuts first, pixels around the box count at its border.
    """
    corner, far = box[:2][::-1], box[2:][::-1]  # rows first
    shape = height_and_width(size)
    scale = jnp.asarray(shape, jnp.float32) / (far - corner)
    resized = jax.image.scale_and_translate(
        image.astype(jnp.float32), (*shape, 3), (0, 1), scale, -corner * scale, "cubic"
    )
    return jnp.rint(resized).clip(0, 255).astype(jnp.uint8)


def _check(config: ConfigDict, host_only: Mapping[str, Any]) -> None:
    if config.target == sources.MASK:
        segmentation.check_config(config)
    for key, off in host_only.items():
        value = functools.reduce(operator.getitem, key.split("."), config)
        if value != off:
            raise UserError(
                f"data.{key}={value!r} is made by the processor, not on the devices; set it to "
                f"{off!r} or leave data.on_device out."
            )


def _stacked(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Decodes the training split: uint8 [N, H, W, 3], and int32 [N] or masks uint8 [N, H, W]."""
    examples: Sequence[dict[str, Any]] = pipeline.decoded_examples(config)
    shapes = {example["image"].shape for example in examples}
    if len(shapes) > 1:
        raise UserError(
            f"data.on_device needs images of one size; {config.name} has {len(shapes)} sizes. "
            "Resize them before msvit prepare, set data.crop_scale to None, or leave "
            "data.on_device out."
        )
    images = np.stack([example["image"] for example in examples])
    if config.target == sources.MASK:
        return images, np.stack([example[sources.MASK] for example in examples])
    return images, np.asarray([example["label"] for example in examples], np.int32)
