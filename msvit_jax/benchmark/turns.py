"""Interleaved measurement: cases are timed alternately and compared in pairs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Timed = Callable[[], float]  # runs once and returns its seconds


def time_interleaved(sides: Sequence[Sequence[Timed]], rounds: int, warmup: int = 2) -> np.ndarray:
    """Runs all cases interleaved, so that background load affects all equally.

    A case is a list of calls, one for each batch; all cases have the same number of calls. The
    first call of every case runs, then the second of every case, and so on. The case that runs
    first changes from round to round.

    Args:
      sides: Cases, each a list of calls that return their seconds.
      rounds: Number of measured rounds.
      warmup: Number of rounds before those, which are not counted.

    Returns:
      [rounds, cases], seconds of all calls of a case together.
    """
    times = np.zeros((rounds + warmup, len(sides)))
    for turn in range(rounds + warmup):
        for calls in zip(*sides, strict=True):
            for index in np.roll(np.arange(len(sides)), turn):
                times[turn, index] += calls[index]()
    return times[warmup:]


def spread(name: str, values: np.ndarray) -> dict[str, Any]:
    """Median, quartiles and range of values, under keys that begin with `name`."""
    least, first, middle, third, most = (float(x) for x in np.percentile(values, range(0, 101, 25)))
    return {name: middle, f"{name}_quartiles": [first, third], f"{name}_range": [least, most]}
