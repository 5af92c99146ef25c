"""Watches a run's figures for signs that it went wrong, and reports each once, with a remedy."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

GROWTH = 100.0  # norm over its initial value from which on it is reported
FALL = 15.0  # points of training top-1 below its best from which on it is reported
SATURATED = 0.005  # share of deviating regions below which the gate counts as saturated
_FIRST = 10  # steps whose figures are the initial values
_WINDOW = 50  # steps whose figures are the current values


@dataclasses.dataclass
class Health:
    """Figures of a run so far, and checks of them.

    Attributes:
      batch_size: Number of images of a step.
      half_epoch: Number of steps in half an epoch.
    """

    batch_size: int
    half_epoch: int

    def __post_init__(self) -> None:
        """Starts without figures."""
        self._norms: dict[str, list[float]] = collections.defaultdict(list)
        self._recent: dict[str, collections.deque[float]] = {}
        self._top1: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._best, self._saturated = 0.0, 0
        self._told: set[str] = set()

    def to_json(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        return {
            "norms": dict(self._norms),
            "recent": {name: list(values) for name, values in self._recent.items()},
            "top1": list(self._top1),
            "best": self._best,
            "saturated": self._saturated,
            "told": sorted(self._told),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over what `to_json` returned."""
        self._norms.update(saved["norms"])
        for name, values in saved["recent"].items():
            self._recent[name] = collections.deque(values, maxlen=_WINDOW)
        self._top1.extend(saved["top1"])
        self._best, self._saturated = saved["best"], saved["saturated"]
        self._told |= set(saved["told"])

    def observe(self, scalars: Mapping[str, float], top1: float) -> list[str]:
        """Takes the figures of one step.

        Args:
          scalars: Norms (their names begin with `grad_norm`) and, if a gate learns, `fine_rate`.
          top1: Accuracy on the step's images, in percent.

        Returns:
          Warnings, each kind at most once in a run.
        """
        found = [self._fallen(top1)]
        if "fine_rate" in scalars:
            found.append(self._saturation(scalars["fine_rate"]))
        found += [self._grown(n, v) for n, v in scalars.items() if n.startswith("grad_norm")]
        new = [text for text in found if text and text.partition(":")[0] not in self._told]
        self._told |= {text.partition(":")[0] for text in new}
        return new

    def _grown(self, name: str, value: float) -> str:
        first = self._norms[name]
        if len(first) < _FIRST:
            first.append(value)
            return ""
        recent = self._recent.setdefault(name, collections.deque(maxlen=_WINDOW))
        recent.append(value)
        began, now = float(np.median(first)), float(np.median(recent))
        if len(recent) < _WINDOW or now < GROWTH * began or not began:
            return ""
        return (
            f"{name} grows: {now:.3g} over the last {_WINDOW} steps, {began:.3g} at the start. The "
            "updates are clipped to noise; lower optimizer.learning_rate or, for the gate, "
            "optimizer.gate_learning_rate, or lengthen optimizer.warmup_epochs."
        )

    def _fallen(self, top1: float) -> str:
        self._top1.append(top1)
        if len(self._top1) < _FIRST:
            return ""
        now, best = float(np.mean(self._top1)), self._best
        self._best = max(now, best)
        noise = 300.0 / math.sqrt(self.batch_size * len(self._top1))  # six standard deviations
        if now > best - max(FALL, noise):
            return ""
        return (
            f"training top-1 falls: {now:.1f} % over the last {len(self._top1)} steps, "
            f"{best:.1f} % before. What was learned is being lost; lower optimizer.learning_rate, "
            "lengthen optimizer.warmup_epochs, or let the gate start finer (model.gate_bias=-4)."
        )

    def _saturation(self, rate: float) -> str:
        saturated = rate < SATURATED or rate > 1 - SATURATED
        self._saturated = self._saturated + 1 if saturated else 0
        if self._saturated < self.half_epoch:
            return ""
        return (
            f"the gate saturates: all regions {'coarse' if rate < 0.5 else 'fine'} for "
            f"{self._saturated} steps. It does not tell images apart; take a loss.gate.kind other "
            "than 'none', raise loss.gate.correction, or lower optimizer.gate_learning_rate."
        )
