"""Taking turns: sides are measured in alternation, and compared pair by pair."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Timed = Callable[[], float]  # runs once and returns its seconds


def time_interleaved(sides: Sequence[Sequence[Timed]], rounds: int, warmup: int = 2) -> np.ndarray:
    """Runs all sides in alternation, so that what the machine does besides meets all alike.

    A side is a list of calls, one for each batch; all sides have as many. Each call of one side is
    followed by that call of the next; which side begins changes from round to round.

    Args:
      sides: calls that return their seconds.
      rounds: how often everything is run.
      warmup: rounds before those, not counted.

    Returns:
      [rounds, sides] seconds, all calls of a side together.
    """
    times = np.zeros((rounds + warmup, len(sides)))
    for turn in range(rounds + warmup):
        for calls in zip(*sides, strict=True):
            for index in np.roll(np.arange(len(sides)), turn):
                times[turn, index] += calls[index]()
    return times[warmup:]


def spread(name: str, values: np.ndarray) -> dict[str, Any]:
    """Median, quartiles and range, named after what they are of."""
    least, first, middle, third, most = (float(x) for x in np.percentile(values, range(0, 101, 25)))
    return {name: middle, f"{name}_quartiles": [first, third], f"{name}_range": [least, most]}
