"""Calibrates the gate's threshold to a mean number of tokens per image on a sample."""

import dataclasses

import numpy as np

from msvit_jax.errors import UserError
from msvit_jax.tokens import grid

_EXTRA = grid.REGION**2 - 1  # additional tokens of a fine region compared with a coarse one


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A threshold and its result on the sample.

    Attributes:
      threshold: Probability of staying coarse above which a region is coarse.
      tokens: Mean number of active patch tokens per image of the sample at this threshold.
      images: Number of images in the sample.
    """

    threshold: float
    tokens: float
    images: int


def threshold_for(probability: np.ndarray, tokens: float) -> Calibration:
    """The threshold that gives a sample's images the most tokens without exceeding a mean.

    A region is fine if its probability of staying coarse does not exceed the threshold, so sorting
    the sample's probabilities suffices: no sweep and no forward pass of the transformer is needed.
    The threshold lies halfway between two probabilities, so that rounding on other devices changes
    no decision.

    Args:
      probability: [N, R] float32, probability that each region stays coarse.
      tokens: Upper bound on the mean number of active patch tokens per image.

    Raises:
      UserError: No threshold reaches the target; the message states the range.
    """
    images, regions = probability.shape
    least, most = regions, (1 + _EXTRA) * regions
    if not least <= tokens <= most:
        raise UserError(
            f"A mean of {tokens:g} tokens per image is out of reach: an image of this model has "
            f"{least} tokens if it is coarse all over and {most} if it is fine all over."
        )
    ordered = np.sort(probability.astype(np.float32), axis=None)
    # A small allowance for rounding: 100 tokens on 3 images are 51 fine regions.
    fine = int(np.floor(images * (tokens - least) / _EXTRA + 1e-6))
    threshold = _between(ordered, fine)
    reached = least + _EXTRA * np.count_nonzero(ordered <= threshold) / images
    return Calibration(float(threshold), float(reached), images)


def _between(ordered: np.ndarray, count: int) -> np.float32:
    """A threshold that `count` of the sorted numbers do not exceed, or fewer if there are ties."""
    if count == ordered.size:
        return np.float32((ordered[-1] + 1) / 2)
    above = ordered[count]
    below = ordered[:count][ordered[:count] < above]
    if not below.size:
        return np.nextafter(above, np.float32(-1)) if above <= 0 else np.float32(above / 2)
    middle = below[-1] + (above - below[-1]) / np.float32(2)
    return np.float32(middle if middle < above else below[-1])
