"""Masks: which values of their pixels mean which class."""

import dataclasses

import numpy as np

IGNORED = 255  # class number of pixels that count nowhere; so there are at most 255 classes


@dataclasses.dataclass(frozen=True)
class MaskClasses:
    """The classes of a data set's masks.

    Attributes:
      names: Names of the classes, in the order of their numbers.
      first: Value of the first class's pixels; the others follow.
      ignored: Value of pixels without a class.
    """

    names: tuple[str, ...]
    first: int = 0
    ignored: int = IGNORED

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= IGNORED:
            raise ValueError(f"{len(self.names)} classes of masks; there can be 1 to {IGNORED}.")
        if self.first <= self.ignored < self.first + len(self.names):
            raise ValueError(
                f"The ignored value {self.ignored} is a class's: classes are {self.first} to "
                f"{self.first + len(self.names) - 1}."
            )


def to_classes(values: np.ndarray, classes: MaskClasses) -> np.ndarray:
    """Turns the values of a mask's pixels into class numbers: [H, W] -> [H, W] uint8.

    Pixels without a class become `IGNORED`.

    Raises:
      ValueError: A value is neither a class's nor the ignored one; the message has no file name.
    """
    table = np.full(65536, -1, np.int16)
    table[classes.first : classes.first + len(classes.names)] = np.arange(len(classes.names))
    table[classes.ignored] = IGNORED
    found = table[values]
    if (found < 0).any():
        wrong = np.unique(values[found < 0])
        raise ValueError(
            f"its pixels have the value {', '.join(map(str, wrong[:5]))}"
            f"{', ...' if len(wrong) > 5 else ''}; the {len(classes.names)} classes are "
            f"{classes.first} to {classes.first + len(classes.names) - 1}, and {classes.ignored} "
            "is ignored"
        )
    return found.astype(np.uint8)
