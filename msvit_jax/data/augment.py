"""Random changes of a training image, each a function of uint8 pixels and a generator.

Mixup and cutmix need the whole batch; they are in `mix.py` and run on the device.
"""

import numpy as np


def flip(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors [H, W, C] left to right, every other time."""
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def shift(pixels: np.ndarray, reach: int, rng: np.random.Generator) -> np.ndarray:
    """Moves [H, W, C] by up to `reach` pixels each way; the border's pixels fill the gap.

    The same as padding by `reach` with the edge and cropping at random.
    """
    dy, dx = rng.integers(-reach, reach + 1, size=2)
    height, width = pixels.shape[:2]
    rows = np.arange(dy, dy + height).clip(0, height - 1)
    columns = np.arange(dx, dx + width).clip(0, width - 1)
    return pixels.take(rows, axis=0).take(columns, axis=1)
