"""Decisions forced on a model, so that random weights show what trained ones would cost."""

import numpy as np

from msvit_jax.errors import UserError
from msvit_jax.tokens import grid

_MORE = grid.REGION**2 - 1  # tokens that a fine region has more than a coarse one


def token_counts(
    images: int, regions: int, *, tokens: float, spread: float, seed: int = 0
) -> np.ndarray:
    """Draws how many patch tokens are active in each image.

    Normally distributed, clipped and rounded to what a grid can give (one token for a coarse
    region, four for a fine one), then changed by single regions until the mean is right.

    Args:
      images: number of counts.
      regions: of an image.
      tokens: mean.
      spread: standard deviation, before clipping.
      seed: of the random numbers.

    Returns:
      [images] int, whose mean is as near to `tokens` as whole regions allow.

    Raises:
      UserError: a mean that the grid cannot give, or a negative spread.
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
      counts: [...] active patch tokens, as `token_counts` gives them.
      regions: of an image.
      seed: of the random numbers.

    Returns:
      [..., regions] float32, 1 = coarse.
    """
    fine = (np.asarray(counts) - regions) // _MORE
    order = np.random.default_rng(seed).random((*fine.shape, regions)).argsort(axis=-1)
    return (order.argsort(axis=-1) >= fine[..., None]).astype(np.float32)
