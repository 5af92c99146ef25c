"""Images with masks: read and changed together, and cut into windows in evaluation."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from PIL import Image

from msvit_jax.data import augment, decode, image_files, sources
from msvit_jax.data.batches import Rows, ahead
from msvit_jax.data.image_files import ImageError
from msvit_jax.errors import UserError
from msvit_jax.image_size import height_and_width
from msvit_jax.segmentation import IGNORED, Confusion, MaskClasses, Stitcher, Windows, to_classes

Batch = dict[str, np.ndarray]
_TRIES = 10  # crops drawn until no class has more than its share, as in the published recipes


def read(
    example: dict[str, Any], classes: MaskClasses, exif_orientation: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes an example: uint8 pixels [H, W, 3], and uint8 class numbers [H, W] or `IGNORED`.

    Raises:
      UserError: One cannot be decoded, their sizes differ, or a pixel has no known class; the
        message names the example.
    """
    pixels, mask = example["image"], example[sources.MASK]
    if isinstance(mask, np.ndarray):
        return pixels, mask  # decoded before
    try:
        pixels = image_files.decode(pixels, exif_orientation)
    except ImageError as error:
        raise decode.unreadable(example, error) from error
    try:
        mask = to_classes(decode.decode_mask_values(mask, exif_orientation), classes)
    except ValueError as error:
        raise UserError(
            f"Cannot use the mask of {example['name']}: {error}. Repair it and prepare the data "
            "set again, or set data.mask_classes and data.ignore_label to what its masks hold."
        ) from error
    if mask.shape != pixels.shape[:2]:
        (height, width), (rows, columns) = pixels.shape[:2], mask.shape
        turned = (height, width) == (columns, rows)
        hint = " Is the image turned by its EXIF data? Try data.exif_orientation=False." * turned
        raise UserError(
            f"{example['name']}: its image has {height} x {width} px, its mask {rows} x {columns}; "
            f"they must have the same size.{hint}"
        )
    return pixels, mask


def mask_classes(builder: Any, config: ConfigDict) -> MaskClasses:
    """Returns the classes of a data set's masks, as the data set or the config tells them.

    Raises:
      UserError: Neither does, or what they tell does not fit together.
    """
    told = sources.told_classes(builder)
    count = config.mask_classes
    if told is None and count is None:
        raise UserError(
            f"Data set {config.name!r} does not say how many classes its masks have; set "
            "data.mask_classes (and data.ignore_label, if pixels without a class are not "
            f"{IGNORED})."
        )
    if told is None or count not in (None, len(told.names)):
        told = MaskClasses(tuple(map(str, range(count))), told.first if told else 0)
    ignored = told.ignored if config.ignore_label is None else config.ignore_label
    try:
        return MaskClasses(told.names, told.first, ignored)
    except ValueError as error:
        raise UserError(f"data.mask_classes and data.ignore_label: {error}") from error


@dataclasses.dataclass(frozen=True)
class SegmentationTransform(grain.transforms.RandomMap):
    """Turns a training image and its mask into uint8 [h, w, 3] pixels and [h, w] classes."""

    classes: MaskClasses
    size: tuple[int, int]
    short_side: int | None
    scale_range: tuple[float, float] | None
    max_class_share: float
    exif_orientation: bool
    flip: bool
    pad_shift: int
    photometric: bool
    color_jitter: float
    erasing: float

    @classmethod
    def from_config(cls, config: ConfigDict, classes: MaskClasses) -> "SegmentationTransform":
        """Reads its fields from the `data` section of a config.

        Raises:
          UserError: The config asks for what cannot be done with a mask.
        """
        check_config(config)
        return cls(
            classes=classes,
            size=height_and_width(config.image_size),
            short_side=config.short_side,
            scale_range=config.scale_range and tuple(config.scale_range),
            max_class_share=config.max_class_share,
            exif_orientation=config.exif_orientation,
            flip=config.flip,
            pad_shift=config.pad_shift,
            photometric=config.photometric,
            color_jitter=config.color_jitter,
            erasing=config.erasing,
        )

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> Batch:
        """Applies geometric changes to both, then color changes to the image alone."""
        pixels, mask = read(element, self.classes, self.exif_orientation)
        pixels, mask = self._crop(pixels, mask, rng)
        # One array, so that whatever moves the image moves its mask.
        both = np.concatenate([pixels, mask[..., None]], axis=2)
        if self.flip:
            both = augment.flip(both, rng)
        if self.pad_shift:
            both = augment.shift(both, self.pad_shift, rng)
        pixels, mask = np.ascontiguousarray(both[..., :3]), both[..., 3]
        if self.photometric:
            pixels = augment.photometric_distortion(pixels, rng)
        if self.color_jitter:
            pixels = augment.color_jitter(pixels, self.color_jitter, rng)
        if self.erasing:
            pixels = augment.random_erasing(pixels, self.erasing, rng)
        return {"image": pixels, sources.MASK: mask}

    def _crop(
        self, pixels: np.ndarray, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scales and crops to [h, w], filling what lies beyond a smaller image below and right."""
        size = mask.shape
        factor = 1.0 if self.short_side is None else self.short_side / min(size)
        if self.scale_range is not None:
            factor *= rng.uniform(*self.scale_range)
        scaled = [max(1, round(side * factor)) for side in size]
        crop = [min(pair) for pair in zip(self.size, scaled, strict=True)]
        for _ in range(_TRIES):
            top, left = (int(rng.integers(s - c + 1)) for s, c in zip(scaled, crop, strict=True))
            down, across = size[0] / scaled[0], size[1] / scaled[1]
            box = (left * across, top * down, (left + crop[1]) * across, (top + crop[0]) * down)
            box = (box[0], box[1], min(box[2], size[1]), min(box[3], size[0]))
            cut = _resized(mask, box, crop, Image.Resampling.NEAREST)
            if not self._one_class_rules(cut):
                break
        image = _resized(pixels, box, crop, Image.Resampling.BILINEAR)
        beyond = [(0, size - side) for size, side in zip(self.size, crop, strict=True)]
        if any(end for _, end in beyond):
            filled = np.empty((*self.size, 3), np.uint8)
            filled[:] = augment.MEAN_COLOR
            filled[: crop[0], : crop[1]] = image
            image, cut = filled, np.pad(cut, beyond, constant_values=IGNORED)
        return image, cut

    def _one_class_rules(self, mask: np.ndarray) -> bool:
        if self.max_class_share >= 1:
            return False
        counts = np.bincount(mask[mask != IGNORED])
        return counts.size == 0 or int(np.max(counts)) > self.max_class_share * int(counts.sum())


def check_config(config: ConfigDict) -> None:
    """Raises UserError for a `data` section that asks for what cannot be done with a mask."""
    refused = {
        "randaugment.num_ops": config.randaugment.num_ops,
        "mixup": config.mixup,
        "cutmix": config.cutmix,
        "crop_scale": config.crop_scale,
    }
    for key, value in refused.items():
        if value:
            raise UserError(
                f"data.{key} changes images without their masks, so it cannot be used with "
                f"data.target={sources.MASK}. There are scale_range, flip, pad_shift, photometric, "
                "color_jitter and erasing."
            )


def _resized(
    pixels: np.ndarray, box: image_files.Box, size: list[int], how: Image.Resampling
) -> np.ndarray:
    if box == (0, 0, size[1], size[0]) and pixels.shape[:2] == tuple(size):
        return pixels
    whole = Image.fromarray(pixels)
    return np.asarray(whole.resize((size[1], size[0]), how, box=box))


class WindowBatches(Iterable[Batch]):
    """All windows of every image of a split, in batches of one size.

    Yields {'image': uint8 [b, h, w, 3], 'segmentation_mask': uint8 [b, h, w], 'valid': bool [b]}.
    Rows of padding are zero, with `valid` False. Processes share the images; each has equally many
    batches. `take` gets the answers in the same order and scores whole images at their own size.
    """

    def __init__(
        self, config: ConfigDict, examples: Any, classes: MaskClasses, rows: Rows, patch_size: int
    ) -> None:
        """Prepares the batches.

        Args:
          config: The `data` section of a config.
          examples: Split as a sequence of examples with masks.
          classes: Classes of the masks.
          rows: This process's rows of a batch.
          patch_size: Side of the model's patches in px.
        """
        self._config, self._examples, self._rows = config, examples, rows
        self._classes, self._patch = classes, patch_size
        self.windows = Windows.from_config(config)
        self.start()

    def start(self) -> None:
        """Forgets all answers."""
        self._waiting: list[tuple[Stitcher, np.ndarray]] = []
        self.confusion = Confusion(len(self._classes.names))
        self.images = 0

    def __iter__(self) -> Iterator[Batch]:
        self.start()
        filled: list[Batch] = []
        count = 0
        for pixels, mask in self._pairs():
            self._waiting.append((Stitcher(self.windows, mask.shape, self._patch), mask))
            cut = zip(self.windows.cut(pixels), self.windows.cut(mask, nearest=True), strict=True)
            for image, part in cut:
                filled.append({"image": image, sources.MASK: part, "valid": np.asarray(True)})
                if len(filled) == self._rows.local:
                    yield _stacked(filled)
                    filled, count = [], count + 1
        if filled:
            empty = {key: np.zeros_like(value) for key, value in filled[0].items()}
            filled += [empty] * (self._rows.local - len(filled))
            yield _stacked(filled)
            count += 1
        for _ in range(count, self._common_count()):
            yield self._empty()

    def _pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Reads this process's images and masks, a few ahead."""
        examples, classes = self._examples, self._classes
        exif = self._config.exif_orientation

        def pair(index: int) -> tuple[np.ndarray, np.ndarray]:
            return read(examples[index], classes, exif)

        dataset = grain.MapDataset.range(len(examples))[self._rows.index :: self._rows.count]
        return ahead(dataset.map(pair), self._config) if len(dataset) else iter(())

    def _common_count(self) -> int:
        """Number of batches of the process that has most; 0 if there is one process."""
        if self._rows.count == 1:
            return 0
        per_process = np.zeros(self._rows.count, np.int64)
        for index in range(len(self._examples)):
            opened = image_files.open_image(
                self._examples[index]["image"], self._config.exif_orientation
            )
            per_process[index % self._rows.count] += self.windows.count(opened.size[::-1])
        return -(-int(np.max(per_process)) // self._rows.local)

    def _empty(self) -> Batch:
        shape, rows = self.windows.shape, self._rows.local
        return {
            "image": np.zeros((rows, *shape, 3), np.uint8),
            sources.MASK: np.zeros((rows, *shape), np.uint8),
            "valid": np.zeros(rows, bool),
        }

    def result(self) -> tuple[Confusion, int]:
        """Returns the counts over all processes' images, and how many images there are."""
        if self._waiting:
            raise ValueError(f"{len(self._waiting)} images wait for answers.")
        if self._rows.count == 1:
            return self.confusion, self.images
        counts = np.append(self.confusion.counts.reshape(-1), self.images)
        # As bits, because JAX without 64-bit types would cut the numbers.
        gathered = multihost_utils.process_allgather(counts.view(np.int32)).view(np.int64)
        total = gathered.reshape(-1, counts.size).sum(axis=0)
        whole = Confusion(len(self._classes.names))
        whole.counts[:] = total[:-1].reshape(whole.counts.shape)
        return whole, int(total[-1])

    def take(self, batch: Batch, logits: np.ndarray) -> None:
        """Takes the logits of a batch, [b, h, w, C], in the order of the batches."""
        for row in range(int(batch["valid"].sum())):
            stitcher, mask = self._waiting[0]
            stitcher.add(logits[row])
            if not stitcher.missing:
                self._waiting.pop(0)
                self.confusion.add(stitcher.labels, mask)
                self.images += 1


def _stacked(rows: list[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
