"""Random augmentations of a training image: functions of uint8 [H, W, 3] pixels and a generator.

Mixup and cutmix need the whole batch; they are in `mix.py` and run on the device.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MEAN_COLOR = (124, 116, 104)  # ImageNet's mean; fills areas uncovered by rotation and shear
COLOR_STD = (58.4, 57.1, 57.4)
MAX_MAGNITUDE = 10.0


def flip(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors left to right with probability 1/2."""
    if rng.random() >= 0.5:
        return pixels
    flipped = np.empty_like(pixels)
    for channel in range(pixels.shape[2]):  # twice as fast as copying pixels[:, ::-1] at once
        flipped[..., channel] = pixels[:, ::-1, channel]
    return flipped


def shift(pixels: np.ndarray, reach: int, rng: np.random.Generator) -> np.ndarray:
    """Shifts by up to `reach` pixels along each axis; the border's pixels fill the gap.

    Equivalent to padding by `reach` with the edge pixels and cropping at random.
    """
    dy, dx = rng.integers(-reach, reach + 1, size=2)
    height, width = pixels.shape[:2]
    rows = np.arange(dy, dy + height).clip(0, height - 1)
    columns = np.arange(dx, dx + width).clip(0, width - 1)
    return pixels.take(rows, axis=0).take(columns, axis=1)


def photometric_distortion(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2 (SSD, 2016).

    Brightness moves by up to 32, contrast and saturation are scaled by 0.5 to 1.5, and the hue
    turns by up to a tenth of a circle; contrast comes before or after the colors. As in the
    published segmentation recipes.
    """
    x = pixels.astype(np.float32)
    if rng.random() < 0.5:
        x = (x + rng.uniform(-32, 32)).clip(0, 255)
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    first = rng.random() < 0.5
    if first:
        x = (x * contrast).clip(0, 255)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    turn = rng.uniform(-0.1, 0.1) if rng.random() < 0.5 else 0.0
    if saturation != 1 or turn:
        hsv = np.array(Image.fromarray(np.rint(x).astype(np.uint8)).convert("HSV"), np.float32)
        hsv[..., 1] = (hsv[..., 1] * saturation).clip(0, 255)
        hsv[..., 0] = (hsv[..., 0] + 256 * turn) % 256
        turned = Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")
        x = np.asarray(turned, np.float32)
    if not first:
        x = (x * contrast).clip(0, 255)
    return np.rint(x).astype(np.uint8)


def color_jitter(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Scales brightness, contrast and saturation by up to 1 +- `strength` each, in any order."""
    image = Image.fromarray(pixels)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for choice in rng.permutation(len(enhancers)):
        factor = rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength)
        image = enhancers[choice](image).enhance(factor)
    return np.asarray(image)


def random_erasing(
    pixels: np.ndarray,
    probability: float,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Fills a random rectangle with noise (Zhong et al. 2017; per-pixel noise as DeiT uses it).

    Args:
        pixels: [H, W, 3] uint8, the image; not changed in place.
        probability: Probability that anything is erased.
        rng: Random generator.
        area: Smallest and largest share of the image's area.
        ratio: Smallest and largest height / width; its logarithm is uniformly distributed.
    """
    if rng.random() >= probability:
        return pixels
    height, width = pixels.shape[:2]
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = rng.normal(MEAN_COLOR, COLOR_STD, size=(h, w, 3))
            erased = pixels.copy()
            erased[top : top + h, left : left + w] = noise.clip(0, 255)
            return erased
    return pixels


def rand_augment(
    pixels: np.ndarray, num_ops: int, magnitude: float, std: float, rng: np.random.Generator
) -> np.ndarray:
    """RandAugment (Cubuk et al. 2019) in the increasing form of timm's `rand-mX-mstdY-inc1`.

    Args:
        pixels: [H, W, 3] uint8, the image.
        num_ops: Number of operations, drawn with replacement; each is applied with probability 1/2.
        magnitude: Mean strength, 0 to 10.
        std: Standard deviation of the strength.
        rng: Random generator.
    """
    image = Image.fromarray(pixels)
    names = list(OPERATIONS)
    for choice in rng.integers(len(names), size=num_ops):
        strength = float(np.clip(rng.normal(magnitude, std), 0.0, MAX_MAGNITUDE)) / MAX_MAGNITUDE
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < 0.5:
            image = OPERATIONS[names[choice]](image, strength, sign)
    return np.asarray(image)


# An operation takes the image, a strength from 0 to 1, and the sign of a change with a direction.
Operation = Callable[[Image.Image, float, int], Image.Image]


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling.BILINEAR,
        fillcolor=MEAN_COLOR,
    )


def _rotate(image: Image.Image, strength: float, sign: int) -> Image.Image:
    angle = 30.0 * strength * sign
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=MEAN_COLOR)


def _solarize_add(image: Image.Image, strength: float, sign: int) -> Image.Image:
    del sign
    added = min(128, int(110 * strength))
    return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * 3)


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def operation(image: Image.Image, strength: float, sign: int) -> Image.Image:
        return enhancer(image).enhance(max(0.1, 1.0 + 0.9 * strength * sign))

    return operation


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "invert": lambda image, strength, sign: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": lambda image, strength, sign: ImageOps.posterize(
        image, max(1, 4 - int(4 * strength))
    ),
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, 256 - int(256 * strength)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength, sign: _affine(image, (1, 0.3 * strength * sign, 0, 0, 1, 0)),
    "shear_y": lambda image, strength, sign: _affine(image, (1, 0, 0, 0.3 * strength * sign, 1, 0)),
    "translate_x": lambda image, strength, sign: _affine(
        image, (1, 0, 0.45 * strength * sign * image.width, 0, 1, 0)
    ),
    "translate_y": lambda image, strength, sign: _affine(
        image, (1, 0, 0, 0, 1, 0.45 * strength * sign * image.height)
    ),
}
