"""What a Predictor answers: one object of plain arrays for all images of a call."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from msvit_jax.errors import UserError
from msvit_jax.models.output import Features


def check_finite(*answers: Any) -> None:
    """Raises UserError for answers that are NaN or infinite: they would be taken for classes."""
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(answers)):
        raise UserError(
            "The model's answers are not finite, so they mean nothing: its weights are damaged or "
            "far too large, its pixels are normalized by a std near 0, or dtype=float16 is too "
            "small for it. Take an earlier checkpoint, or dtype=float32."
        )


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Answers for N images, in the order of the images.

    Attributes:
      logits: [N, classes] float32, NaN for files that were skipped; [N, h, w, classes] for windows
        of a segmenter.
      tokens: [N] int32, number of active patch tokens computed for each image.
      coarse: [N, rows, columns] bool, True for regions with one coarse token instead of four fine
        ones; None for a model without a gate.
      coarse_probability: [N, rows, columns] float32, the gate's probability that a region stays
        coarse; None for a model without a gate.
      exit_index: [N] int32, the exit (from 0) at which each image left a cascade; None for other
        models.
      merge_maps: [N, stages, rows, columns] int16, the merge target of each patch after each
        reduction: the index, row by row, of the patch that represents the token this patch is part
        of. It is the patch itself if it was not merged into another, and -1 if it was dropped. A
        coarse token is represented by the first of its four patches. The same in every layout; None
        for models that do not reduce tokens.
      class_names: Names of the classes; empty if they are not known.
      failed: The reason why each skipped file could not be read, by the file's index. Its logits
        are NaN, its label is -1 and its name empty.
      features: Class token and patches of a model without a head, as NumPy arrays; None for models
        with one. A model without a head has no logits, labels or probabilities.
    """

    logits: np.ndarray
    tokens: np.ndarray
    coarse: np.ndarray | None = None
    coarse_probability: np.ndarray | None = None
    exit_index: np.ndarray | None = None
    merge_maps: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    failed: Mapping[int, str] = dataclasses.field(default_factory=dict)
    features: Features | None = None

    def __len__(self) -> int:
        return len(self.logits)

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """[N, classes] float32, the softmax of the logits."""
        self._check_head()
        exponentials = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    @property
    def labels(self) -> np.ndarray:
        """[N], the most probable class of each image; -1 for a file that was skipped."""
        self._check_head()
        labels = self.logits.argmax(axis=1)
        labels[list(self.failed)] = -1
        return labels

    def _check_head(self) -> None:
        if self.features is not None:
            raise UserError("These weights have no head, so there are no classes; see .features.")

    @property
    def names(self) -> list[str]:
        """Class names of the labels; class numbers if the classes have no names."""
        return [self.class_name(label) for label in self.labels]

    def class_name(self, label: int) -> str:
        """The name of a class by its number; empty for -1, the label of a skipped file."""
        if label < 0:
            return ""
        return self.class_names[label] if self.class_names else str(label)

    def take(self, numbers: Sequence[int]) -> "Predictions":
        """Selects the answers for some of the images, none of which may have been skipped.

        Args:
          numbers: Indices of the images.
        """
        index = np.asarray(numbers, int)
        arrays = ("logits", "tokens", "coarse", "coarse_probability", "exit_index", "merge_maps")
        given = {name: getattr(self, name) for name in arrays}
        taken: dict[str, Any] = {n: None if x is None else x[index] for n, x in given.items()}
        features = jax.tree.map(lambda x: x[index], self.features)
        return dataclasses.replace(self, **taken, features=features, failed={})
