"""The input pipeline: Grain over TFDS data sets, the same batches for any number of processes.

The global batch of a step depends only on (seed, step). A process reads and decodes only its own
rows, and resuming needs only the step number.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from msvit_jax.data import augment, decode, image_files, segmentation, sources
from msvit_jax.data.batches import Rows, ahead
from msvit_jax.data.image_files import ImageError
from msvit_jax.errors import UserError
from msvit_jax.image_size import ImageSize, height_and_width, simplified
from msvit_jax.segmentation import MaskClasses

Batch = dict[str, np.ndarray]
EPOCHS = 2**31  # practically infinite; Grain's own infinity overflows with one example per batch


def dataset_info(config: ConfigDict) -> sources.DatasetInfo:
    """Opens (and for scattered_digits prepares) a config's data set and describes it."""
    builder = _opened(config)
    names = _class_names(config, builder)
    return sources.DatasetInfo(
        name=config.name,
        num_classes=len(names),
        class_names=names,
        train_examples=sources.num_examples(builder, config.train_split),
        eval_examples=sources.num_examples(builder, config.eval_split),
        has_segmentation=sources.mask_feature(builder) in builder.info.features,
        fingerprint=sources.fingerprint(builder, names),
    )


def class_names(config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of the classes of what is learned; the splits need not exist."""
    return _class_names(config, _opened(config))


def _opened(config: ConfigDict) -> Any:
    return sources.open_dataset(config.name, config.data_dir, config.target)


def _class_names(config: ConfigDict, builder: Any) -> tuple[str, ...]:
    if config.target == sources.MASK:
        return segmentation.mask_classes(builder, config).names
    return sources.class_names(builder)


def train_iterator(
    config: ConfigDict,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """Yields this process's rows of the global batches of steps `start_step`, `start_step` + 1, ...

    Rows are contiguous: process p of n holds rows p * B / n to (p + 1) * B / n. Every epoch has its
    own order. A batch may span two epochs, so that no example is left out.

    Args:
        config: The `data` section of a config.
        batch_size: Global batch size B.
        seed: Seed of the examples' order and augmentation.
        start_step: First step to yield.
        process_index: Index of this process; None: JAX's.
        process_count: Number of processes; None: JAX's.

    Yields:
        {'image': uint8 [B/n, h, w, 3], 'label': int32 [B/n]}; for the target 'segmentation_mask'
        {'image', 'segmentation_mask': uint8 [B/n, h, w]}, classes of the pixels.

    Raises:
        UserError: The data set cannot be opened (see `sources.open_dataset`), the batch size is not
            divisible by the number of processes, or an image cannot be read.
    """
    rows = Rows.of_process(batch_size, process_index, process_count)
    return train_batches(_train_examples(config), config, rows, seed, start_step)


def train_batches(
    examples: Any, config: ConfigDict, rows: "Rows", seed: int, start_step: int = 0
) -> Iterator[Batch]:
    """As `train_iterator`, for any sequence of examples (see `sources.Examples`)."""
    dataset = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(EPOCHS)
    dataset = dataset.random_map(_transform(config)).batch(rows.local)
    dataset = dataset[start_step * rows.count + rows.index :: rows.count]
    return ahead(dataset, config)


def _transform(config: ConfigDict) -> Any:
    if config.target == sources.MASK:
        classes = segmentation.mask_classes(_opened(config), config)
        return segmentation.SegmentationTransform.from_config(config, classes)
    return TrainTransform.from_config(config)


def eval_batches(
    config: ConfigDict,
    *,
    batch_size: int,
    split: str | None = None,
    patch_size: int = 1,
    process_index: int | None = None,
    process_count: int | None = None,
) -> "EvalBatches | segmentation.WindowBatches":
    """Returns batches that hold every example of a split exactly once, in order.

    For the target 'segmentation_mask' they hold windows of the images, see
    `segmentation.WindowBatches`.

    Args:
        config: The `data` section of a config.
        batch_size: Global batch size B.
        split: Name of the split; None: `config.eval_split`.
        patch_size: Side of the model's patches in px, for masks.
        process_index: Index of this process; None: JAX's.
        process_count: Number of processes; None: JAX's.
    """
    builder = _opened(config)
    examples = sources.open_split(builder, split or config.eval_split, config.target)
    rows = Rows.of_process(batch_size, process_index, process_count)
    if config.target == sources.MASK:
        classes = segmentation.mask_classes(builder, config)
        return segmentation.WindowBatches(config, examples, classes, rows, patch_size)
    return EvalBatches(config, examples, rows)


@dataclasses.dataclass(frozen=True)
class TrainTransform(grain.transforms.RandomMap):
    """Turns an encoded or cached training image into augmented uint8 [h, w, 3] pixels."""

    size: ImageSize
    crop_scale: tuple[float, float] | None
    crop_ratio: tuple[float, float]
    resize: str
    exif_orientation: bool
    flip: bool
    pad_shift: int
    randaugment: dict[str, Any] | None
    color_jitter: float
    erasing: float

    @classmethod
    def from_config(cls, config: ConfigDict) -> "TrainTransform":
        """Reads its fields from the `data` section of a config."""
        return cls(
            size=config.image_size,
            crop_scale=config.crop_scale and tuple(config.crop_scale),
            crop_ratio=tuple(config.crop_ratio),
            resize=_checked_resize(config.resize),
            exif_orientation=config.exif_orientation,
            flip=config.flip,
            pad_shift=config.pad_shift,
            randaugment=config.randaugment.to_dict() if config.randaugment.num_ops else None,
            color_jitter=config.color_jitter,
            erasing=config.erasing,
        )

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> Batch:
        """Applies geometric changes, then color changes, in the order of timm's pipeline."""
        pixels = self._crop(element, rng)
        if self.flip:
            pixels = augment.flip(pixels, rng)
        if self.pad_shift:
            pixels = augment.shift(pixels, self.pad_shift, rng)
        if self.randaugment:
            pixels = augment.rand_augment(pixels, rng=rng, **self.randaugment)
        if self.color_jitter:
            pixels = augment.color_jitter(pixels, self.color_jitter, rng)
        if self.erasing:
            pixels = augment.random_erasing(pixels, self.erasing, rng)
        return {"image": pixels, "label": np.asarray(element["label"], np.int32)}

    def _crop(self, element: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
        if self.crop_scale is None:
            return center_crop(element, self.size, 1.0, self.exif_orientation)
        try:
            opened = image_files.open_image(element["image"], self.exif_orientation)
            box = decode.random_box(*opened.size, self.crop_scale, self.crop_ratio, rng)
            return image_files.resized_crop(opened, box, self.size, decode.RESIZES[self.resize])
        except ImageError as error:
            raise decode.unreadable(element, error) from error


def _checked_resize(name: str) -> str:
    if name not in decode.RESIZES:
        known = ", ".join(decode.RESIZES)
        raise UserError(f"data.resize={name!r} is unknown; choose one of {known}.")
    if name == "opencv":
        decode.import_opencv()
    return name


def center_crop(
    element: dict[str, Any], size: ImageSize, fraction: float, exif_orientation: bool = True
) -> np.ndarray:
    """Crops the central box of `size`'s shape of an example's image; returns uint8 [h, w, 3]."""
    pixels, shape = element["image"], (*height_and_width(size), 3)
    if isinstance(pixels, np.ndarray) and pixels.shape == shape and fraction == 1.0:
        return pixels
    try:
        return image_files.center_crop(pixels, size, fraction, exif_orientation)
    except ImageError as error:
        raise decode.unreadable(element, error) from error


class EvalBatches(Iterable[Batch]):
    """Exact evaluation set that can be iterated repeatedly, with equally many batches per process.

    Yields {'image': uint8 [b, h, w, 3], 'label': int32 [b], 'valid': bool [b]}, and
    'segmentation_mask': uint8 [b, h, w] if the data set has masks. Padding rows of the last batch
    are zero, with `valid` False.
    """

    def __init__(self, config: ConfigDict, examples: sources.Examples, rows: Rows) -> None:
        self._config = config
        self._examples = examples
        self._rows = rows
        self._kept: list[Batch] | None = None

    def __len__(self) -> int:
        return -(-len(self._examples) // (self._rows.local * self._rows.count))

    def __iter__(self) -> Iterator[Batch]:
        if not self._config.on_device:
            return self._made()
        if self._kept is None:  # as small as the training split, which the devices hold
            self._kept = list(self._made())
        return iter(self._kept)

    def _made(self) -> Iterator[Batch]:
        config, rows = self._config, self._rows
        padded = len(self) * rows.local * rows.count
        transform = functools.partial(
            _eval_example,
            examples=self._examples,
            size=config.image_size,
            crop=config.eval_crop,
            exif_orientation=config.exif_orientation,
        )
        dataset = grain.MapDataset.range(padded).map(transform).batch(rows.local)
        return ahead(dataset[rows.index :: rows.count], config)


def _eval_example(
    index: int, examples: sources.Examples, size: ImageSize, crop: float, exif_orientation: bool
) -> Batch:
    """Returns example `index`, or a zero row beyond the last one."""
    valid = index < len(examples)
    example = examples[index if valid else 0]
    made = {
        "image": center_crop(example, size, crop, exif_orientation),
        "label": np.asarray(example["label"], np.int32),
        "valid": np.asarray(valid),
    }
    if sources.MASK in example:
        made[sources.MASK] = _mask(example, size, crop, exif_orientation)
    return made if valid else {key: np.zeros_like(value) for key, value in made.items()}


def _mask(
    example: dict[str, Any], size: ImageSize, crop: float, exif_orientation: bool
) -> np.ndarray:
    try:
        return decode.decode_mask(example[sources.MASK], size, crop, exif_orientation)
    except ImageError as error:
        raise decode.unreadable(example, error) from error


def _train_examples(config: ConfigDict) -> Any:
    if not config.cache:
        return sources.open_split(_opened(config), config.train_split, config.target)
    if config.workers:
        raise UserError("data.cache keeps images in this process; set data.workers to 0 with it.")
    return decoded_examples(config)


def decoded_examples(config: ConfigDict) -> "_CachedExamples":
    """Returns the training split with decoded images, resized where every epoch needs the same.

    Raises:
        UserError: An image cannot be read.
    """
    builder = _opened(config)
    examples = sources.open_split(builder, config.train_split, config.target)
    return _decoded(_key(config, builder), examples)


def _key(config: ConfigDict, builder: Any) -> "_Key":
    size = simplified(config.image_size) if config.crop_scale is None else None
    key: _Key = (str(builder.data_dir), config.train_split, size, config.exif_orientation, None)
    if config.target == sources.MASK:
        key = (*key[:2], None, key[3], segmentation.mask_classes(builder, config))
    return key


class _CachedExamples(collections.UserList[dict[str, Any]]):
    """Decoded examples with a short representation, because Grain prints it."""

    def __repr__(self) -> str:
        return f"<{len(self)} decoded examples>"


# Folder, split, size, exif_orientation, classes of the masks where they are learned.
_Key = tuple[str, str, ImageSize | None, bool, MaskClasses | None]
_CACHE: dict[_Key, _CachedExamples] = {}


def _decoded(key: _Key, examples: sources.Examples) -> _CachedExamples:
    """Decodes a split once and caches it, resized if every epoch needs the same size."""
    if key not in _CACHE:
        _CACHE.clear()  # one split at a time: this can be most of the memory in use
        _CACHE[key] = _CachedExamples(
            _decode_example(example, *key[2:]) for example in examples.in_order()
        )
    return _CACHE[key]


def _decode_example(
    example: dict[str, Any],
    size: ImageSize | None,
    exif_orientation: bool,
    classes: MaskClasses | None,
) -> dict[str, Any]:
    if classes is not None:
        pixels, mask = segmentation.read(example, classes, exif_orientation)
        return example | {"image": pixels, sources.MASK: mask}
    if size is not None:
        return example | {"image": center_crop(example, size, 1.0, exif_orientation)}
    try:
        return example | {"image": image_files.decode(example["image"], exif_orientation)}
    except ImageError as error:
        raise decode.unreadable(example, error) from error


def device_batches(
    batches: Iterable[Any], put: Callable[[Any], Any], depth: int = 2
) -> Iterator[Any]:
    """Yields `put(batch)`, started `depth` batches early so that transfers overlap with compute.

    Args:
        batches: Batches in CPU memory; `train_iterator` makes them in the background.
        put: Function that moves a batch to the devices without waiting, such as `jax.device_put`.
        depth: Number of batches in transfer at a time.
    """
    waiting: collections.deque[Any] = collections.deque()
    for batch in batches:
        waiting.append(put(batch))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting
