"""Forces decisions on a model, so that random weights cost as much as trained ones would."""

import numpy as np

from msvit_jax.errors import UserError
from msvit_jax.tokens import grid

_MORE = grid.REGION**2 - 1  # additional tokens of a fine region compared with a coarse one


def token_counts(
    images: int, regions: int, *, tokens: float, spread: float, seed: int = 0
) -> np.ndarray:
    """Draws the number of active patch tokens of each image.

    Counts are normally distributed, clipped and rounded to what a grid allows (one token for a
    coarse region, four for a fine one), then adjusted by single regions until the mean is right.

    Args:
      images: Number of images.
      regions: Number of regions of an image.
      tokens: Mean number of active patch tokens.
      spread: Standard deviation before clipping.
      seed: Seed of the random numbers.

    Returns:
      [images] int, token counts; their mean is as close to `tokens` as whole regions allow.

    Raises:
      UserError: The grid does not allow such a mean, or the spread is negative.
    """
    most = regions * grid.REGION**2
    if not regions <= tokens <= most:
        raise UserError(
            f"tokens={tokens:g} is not possible: an image of this model has {regions} (all coarse) "
            f"to {most} (all fine) patch tokens; give --tokens from there."
        )
    if spread < 0:
        raise UserError(f"spread={spread:g} is negative; it is a standard deviation in tokens.")
    rng = np.random.default_rng(seed)
    wanted = rng.normal(tokens, spread, images).clip(regions, most)
    fine = np.rint((wanted - regions) / _MORE).astype(int)
    total = round(images * (tokens - regions) / _MORE)
    while missing := total - int(fine.sum()):
        step = int(np.sign(missing))
        movable = np.flatnonzero(fine < regions if step > 0 else fine > 0)
        fine[rng.choice(movable, min(abs(missing), movable.size), replace=False)] += step
    return regions + _MORE * fine


def decisions(counts: np.ndarray, regions: int, seed: int = 0) -> np.ndarray:
    """Chooses at random which regions are fine.

    Args:
      counts: [...], numbers of active patch tokens, from `token_counts`.
      regions: Number of regions of an image.
      seed: Seed of the random numbers.

    Returns:
      [..., regions] float32, 1 for coarse regions.
    """
    fine = (np.asarray(counts) - regions) // _MORE
    order = np.random.default_rng(seed).random((*fine.shape, regions)).argsort(axis=-1)
    return (order.argsort(axis=-1) >= fine[..., None]).astype(np.float32)
