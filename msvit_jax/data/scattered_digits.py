"""The embedded data set: real scanned digits, one per canvas, over varied backgrounds.

A TFDS builder that downloads nothing and needs no TensorFlow. The digits are scikit-learn's
(`load_digits`, 1,797 scans of 8 x 8 pixels), the photographs its two sample images. Every canvas is
a function of (config, split, index) alone, so two preparations are equal byte for byte.
"""

import dataclasses
import functools
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

TRAIN_SHARE = 0.78  # of the scanned digits of each class; the others are for validation only
MARGIN = 4  # pixels around the scan's box, so that small shifts of the canvas do not cut the digit


@dataclasses.dataclass(kw_only=True)
class ScatteredDigitsConfig(tfds.core.BuilderConfig):
    """Settings that differ between the variants of the data set.

    Attributes:
        canvas: Side of an image in pixels.
        digit_size: Smallest and largest side of the scanned digit's box in pixels.
        rotation: Largest rotation of a digit in degrees, in either direction.
        shear: Largest shear, in either direction.
        stretch: Largest logarithm of the factor by which width grows and height shrinks, or vice
            versa.
        train_examples: Number of training canvases.
        validation_examples: Number of validation canvases.
        bright: Whether digits are bright and backgrounds dimmed; otherwise colors are arbitrary but
            distinguishable.
        clutter: Largest number of distracting strokes in the background.
    """

    canvas: int = 64
    digit_size: tuple[float, float] = (24.0, 32.0)
    rotation: float = 6.0
    shear: float = 0.1
    stretch: float = 0.08
    train_examples: int = 20_000
    validation_examples: int = 2_000
    bright: bool = True
    clutter: int = 0


class ScatteredDigits(tfds.core.GeneratorBasedBuilder):
    """Classification and segmentation of one scanned digit on a larger canvas."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded; a search for checksums would need a package that TFDS does not declare.
    url_infos = None
    BUILDER_CONFIGS = (
        ScatteredDigitsConfig(name="default", description="Bright digits on dimmed backgrounds."),
        ScatteredDigitsConfig(
            name="hard",
            description="Larger canvases, any colors, undimmed photographs, clutter.",
            canvas=96,
            digit_size=(14.0, 30.0),
            rotation=15.0,
            shear=0.2,
            stretch=0.15,
            bright=False,
            clutter=4,
        ),
        ScatteredDigitsConfig(
            name="small",
            description="Smaller canvases on which digits move less: learned in minutes.",
            canvas=32,
            digit_size=(15.0, 19.0),
            train_examples=8_000,
            validation_examples=1_000,
        ),
        ScatteredDigitsConfig(
            name="small_digits",
            description="The default variant's canvases with digits down to the scans' own size.",
            digit_size=(10.0, 20.0),
        ),
        ScatteredDigitsConfig(
            name="tiny",
            description="The default variant with few examples, for tests and trials.",
            train_examples=320,
            validation_examples=100,
        ),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.canvas
        image = functools.partial(tfds.features.Image, encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": image(shape=(side, side, 3)),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                    "segmentation_mask": image(shape=(side, side, 1), use_colormap=True),
                    "id": tfds.features.Text(doc="split and index of the canvas"),
                    "source": tfds.features.Scalar(np.int32, doc="index in load_digits()"),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        return {
            "train": self._generate_examples("train", config.train_examples),
            "validation": self._generate_examples("validation", config.validation_examples),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
        digits = _digits()
        sources = digit_indices(split)
        for index in range(count):
            rng = np.random.default_rng([("train", "validation").index(split), index])
            source = int(rng.choice(sources))
            canvas = draw_canvas(digits.images[source], self.builder_config, rng)
            key = f"{split}_{index:05d}"
            yield (
                key,
                {
                    "image": _png(canvas.image),
                    "label": int(digits.target[source]),
                    "segmentation_mask": _png(canvas.mask),
                    "id": key,
                    "source": source,
                },
            )


def _sklearn_datasets() -> Any:
    # Imported here because the import takes a second and every command imports this module.
    from sklearn import datasets

    return datasets


@functools.cache
def _digits() -> Any:
    """Returns scikit-learn's digits: `images` [1797, 8, 8] from 0 to 16 and `target` [1797]."""
    return _sklearn_datasets().load_digits()


def digit_indices(split: str) -> np.ndarray:
    """Returns the indices in `load_digits()` that a split draws from; splits share none."""
    target = _digits().target
    order = np.random.default_rng(0).permutation(len(target))
    chosen = []
    for digit in range(10):
        of_class = order[target[order] == digit]
        cut = round(TRAIN_SHARE * len(of_class))
        chosen.append(of_class[:cut] if split == "train" else of_class[cut:])
    return np.sort(np.concatenate(chosen))


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A drawn example: `image` uint8 [S, S, 3] and `mask` uint8 [S, S], 1 where the digit is."""

    image: np.ndarray
    mask: np.ndarray


def draw_canvas(
    digit: np.ndarray, config: ScatteredDigitsConfig, rng: np.random.Generator
) -> Canvas:
    """Draws a scanned digit (float [8, 8], ink 0 to 16) at a random position on a background."""
    background = _background(config, rng)
    if config.clutter:
        background = _add_clutter(background, int(rng.integers(config.clutter + 1)), rng)
    alpha = _place(digit / 16.0, config, rng)
    color = _digit_color(background, alpha, config, rng)
    image = background + alpha[..., None] * (color - background)
    return Canvas(np.rint(image).astype(np.uint8), (alpha >= 0.5).astype(np.uint8))


def _place(ink: np.ndarray, config: ScatteredDigitsConfig, rng: np.random.Generator) -> np.ndarray:
    """Returns the digit's opacity on the canvas: scaled, rotated, sheared and moved at random.

    Shape and stroke width vary because a small transformer memorizes 1,800 scans within a few
    epochs.
    """
    size = rng.uniform(*config.digit_size)
    aspect = np.exp(rng.uniform(-config.stretch, config.stretch))
    angle = np.deg2rad(rng.uniform(-config.rotation, config.rotation))
    shear = rng.uniform(-config.shear, config.shear)
    reach = size / 2 + MARGIN
    center = rng.uniform(reach, config.canvas - reach, size=2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    to_canvas = rotation @ np.array([[1.0, shear], [0.0, 1.0]])
    to_canvas = to_canvas @ np.diag([size * aspect, size / aspect]) / 8
    to_scan = np.linalg.inv(to_canvas)

    padded = np.pad(ink, 2).astype(np.float32)  # soft edges for strokes at the scan's border
    offset = 6.0 - to_scan @ center
    scan = Image.fromarray(padded).transform(
        (config.canvas, config.canvas),
        Image.Transform.AFFINE,
        (*to_scan[0], offset[0], *to_scan[1], offset[1]),
        Image.Resampling.BICUBIC,
    )
    threshold, softness = rng.uniform(0.3, 0.45), rng.uniform(0.3, 0.5)
    return np.clip((np.asarray(scan, np.float64) - threshold) / softness + 0.5, 0.0, 1.0)


def _digit_color(
    background: np.ndarray,
    alpha: np.ndarray,
    config: ScatteredDigitsConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns a color [3] that stands out: bright, or any that differs from the covered pixels."""
    if config.bright:
        return rng.uniform(200.0, 255.0, size=3)
    covered = (background * alpha[..., None]).sum((0, 1)) / max(alpha.sum(), 1.0)
    candidates = rng.uniform(0.0, 255.0, size=(8, 3))
    contrast = np.abs((candidates - covered).mean(axis=1))
    visible = candidates[contrast >= 60.0]
    return visible[0] if len(visible) else candidates[contrast.argmax()]


def _background(config: ScatteredDigitsConfig, rng: np.random.Generator) -> np.ndarray:
    """Returns float64 [S, S, 3] in 0..255: plain, a gradient, or (half the time) a photo crop."""
    side = config.canvas
    kind = rng.choice(["plain", "graded", "photo"], p=[0.25, 0.25, 0.5])
    if kind == "photo":
        image = _photo_crop(side, rng)
    elif kind == "graded":
        start, end = rng.uniform(0.0, 255.0, size=(2, 1, 1, 3))
        image = start + _ramp(side, rng.uniform(0.0, 2 * np.pi)) * (end - start)
    else:
        image = np.broadcast_to(rng.uniform(0.0, 255.0, size=3), (side, side, 3))
    return image / 2 if config.bright else image


def _ramp(side: int, angle: float) -> np.ndarray:
    """Returns [S, S, 1] rising from 0 to 1 in the direction of `angle`."""
    along = np.linspace(-1.0, 1.0, side)
    ramp = np.cos(angle) * along[None, :] + np.sin(angle) * along[:, None]
    low, high = ramp.min(), ramp.max()
    return ((ramp - low) / (high - low))[..., None]


@functools.cache
def _photographs() -> list[Image.Image]:
    return [Image.fromarray(photo) for photo in _sklearn_datasets().load_sample_images().images]


def _photo_crop(side: int, rng: np.random.Generator) -> np.ndarray:
    photo = _photographs()[rng.integers(2)]
    crop = rng.uniform(0.75 * side, min(4.0 * side, *photo.size))
    left, top = rng.uniform(0.0, np.array(photo.size) - crop)
    resized = photo.resize(
        (side, side), Image.Resampling.BILINEAR, box=(left, top, left + crop, top + crop)
    )
    pixels = np.asarray(resized, np.float64)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _add_clutter(background: np.ndarray, strokes: int, rng: np.random.Generator) -> np.ndarray:
    """Draws short strokes and arcs that resemble parts of digits."""
    image = Image.fromarray(np.rint(background).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(strokes):
        x, y = rng.uniform(0, image.width, size=2)
        dx, dy = rng.uniform(3, 12, size=2)
        color = tuple(int(value) for value in rng.integers(0, 256, size=3))
        width = int(rng.integers(1, 4))
        if rng.random() < 0.5:
            draw.line((x, y, x + dx, y + rng.choice([-1, 1]) * dy), fill=color, width=width)
        else:
            start = rng.uniform(0, 360)
            box = (x - dx, y - dy, x + dx, y + dy)
            draw.arc(box, start, start + rng.uniform(60, 240), fill=color, width=width)
    return np.asarray(image, np.float64)


def _png(pixels: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    buffer.seek(0)
    return buffer
