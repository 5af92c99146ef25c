"""Exact counts of which class was taken for which, and the figures that follow from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from msvit_jax.segmentation.masks import IGNORED


class Confusion:
    """A confusion matrix that images are added to.

    Attributes:
      counts: [classes, classes] int64, number of pixels by their class (rows) and by the class they
        were given (columns). Ignored pixels are not counted.
    """

    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((classes, classes), np.int64)

    def add(self, predicted: np.ndarray, classes: np.ndarray) -> None:
        """Adds an image.

        Args:
          predicted: [H, W] integers, the class that each pixel was given.
          classes: [H, W] integers, the class of each pixel; `IGNORED` for none.
        """
        count = len(self.counts)
        counted = classes != IGNORED
        pairs = classes[counted].astype(np.int64) * count + predicted[counted]
        self.counts += np.bincount(pairs, minlength=count**2).reshape(count, count)

    def figures(self, names: Sequence[str] = ()) -> dict[str, Any]:
        """Computes figures, all in percent.

        Args:
          names: Names of the classes; empty for their numbers.

        Returns:
          Dict with miou, the mean over classes of intersection over union; mean_accuracy, the mean
          of the classes' shares of right pixels; pixel_accuracy, the share of right pixels; and
          iou, a dict by class. A class that is neither in the masks nor in the answers has no IoU
          (None) and does not count in the mean; without any counted pixel all means are NaN.
        """
        counts = self.counts.astype(np.float64)
        right, actual = np.diag(counts), counts.sum(axis=1)
        union = actual + counts.sum(axis=0) - right
        iou = np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)
        recall = np.divide(right, actual, out=np.full(len(right), np.nan), where=actual > 0)
        names = names or [str(number) for number in range(len(right))]
        return {
            "miou": _mean(iou),
            "mean_accuracy": _mean(recall),
            "pixel_accuracy": 100 * right.sum() / actual.sum() if actual.sum() else float("nan"),
            "iou": {
                name: None if np.isnan(x) else 100 * float(x)
                for name, x in zip(names, iou, strict=True)
            },
        }


def _mean(shares: np.ndarray) -> float:
    known = shares[~np.isnan(shares)]
    return 100 * float(known.mean()) if len(known) else float("nan")
