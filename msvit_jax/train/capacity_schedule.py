"""Schedule of the trimmed layout: capacities that follow the running token counts.

MSViT trims every batch to its largest count ("adaptive trimming"). Under jit a new length needs a
new compilation, so here capacities change rarely, to what the counts of many steps ask for: our
reconstruction. The alternatives that a gate learns from cost capacity (see `tokens.alternatives`),
so they are carried in one step of several, whose gradient counts for all of those steps.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from ml_collections import config_dict

from msvit_jax.tokens.grid import REGION
from msvit_jax.tokens.layout_sizes import round_up

# A bucket's capacity also covers images that exceed its share by this many standard deviations,
# because batches differ.
_DEVIATIONS = 1.0
_STEP = 8  # capacities are multiples of this, or the whole grid


def bucket_capacities(
    histogram: np.ndarray,
    *,
    smallest: int,
    parts: int,
    images: int,
    multiple: int = _STEP,
) -> tuple[int, ...]:
    """Chooses capacities for length buckets, equal parts of a batch sorted by token count.

    Args:
      histogram: [N + 1], number of images by count of active patch tokens, 0 to N.
      smallest: Least number of tokens that an image has.
      parts: Number of length buckets.
      images: Number of images of a batch that is packed together; the fewer, the more batches
        differ.
      multiple: Number that capacities are rounded up to multiples of; none is larger than N.

    Returns:
      Ascending capacities.
    """
    below = np.cumsum(histogram) / max(histogram.sum(), 1)
    share = np.arange(1, parts + 1) / parts
    share = np.minimum(1.0, share + _DEVIATIONS * np.sqrt(share * (1 - share) / images))
    counts = np.searchsorted(below, share - 1e-9)
    rounded = [round_up(max(int(count), smallest), multiple) for count in counts]
    return tuple(min(capacity, len(histogram) - 1) for capacity in rounded)


@dataclasses.dataclass(frozen=True)
class StepCapacity:
    """Capacities of a training step and the tokens they are for.

    Attributes:
      capacities: Capacities of the length buckets, the model's `MSViT.token_capacity`.
      gate_gradient: Factor of the task's gradient to the gate, the model's `MSViT.gate_gradient`.
    """

    capacities: tuple[int, ...]
    gate_gradient: float


@dataclasses.dataclass
class CapacitySchedule:
    """Capacities of a run, and the counts that decide on the next ones.

    Attributes:
      options: Section `capacity` of the config.
      regions: Number of regions of an image, which has at least as many tokens.
      images: Number of images of a batch that is packed together.
      parts: Number of length buckets of those images, each with its own capacity.
      capacities: Capacities in use, for active tokens alone.
      histogram: [N + 1], number of images by count of active patch tokens since the last look.
      overflow: Number of images since then that did not fit.
      changes: Number of changes of the capacities so far.
    """

    options: config_dict.ConfigDict
    regions: int
    images: int
    parts: int
    capacities: tuple[int, ...]
    histogram: np.ndarray
    overflow: float = 0.0
    changes: int = 0

    @classmethod
    def start(
        cls, options: config_dict.ConfigDict, *, regions: int, images: int
    ) -> "CapacitySchedule":
        """Starts with capacity for all tokens of both scales.

        Args:
          options: Section `capacity` of the config.
          regions: Number of regions of an image.
          images: Number of images of a batch that is packed together.
        """
        parts = math.gcd(images, options.num_buckets)  # so that buckets are equal
        counts = np.zeros(REGION**2 * regions + 1)
        made = cls(options, regions, images, parts, (), counts)
        made.capacities = (made._everything,)
        return made

    @property
    def _everything(self) -> int:
        """Number of tokens of both scales of an image."""
        return (REGION**2 + 1) * self.regions

    def at(self, step: int) -> StepCapacity:
        """Returns the capacities of step number `step` + 1."""
        every = self.options.alternatives_every
        if self.capacities == (self._everything,):
            return StepCapacity(self.capacities, 1.0)
        if step % every:
            return StepCapacity(self.capacities, 0.0)
        room = round_up(self.options.alternatives * REGION**2 * self.regions, _STEP)
        capacities = tuple(min(b + room, self._everything) for b in self.capacities)
        return StepCapacity(capacities, float(every))

    def observe(self, histogram: np.ndarray, overflow: float) -> None:
        """Takes the token counts of a step, and the number of images that did not fit."""
        self.histogram = self.histogram + histogram
        self.overflow += float(overflow)

    def due(self, step: int) -> bool:
        """Tells whether to look after this step; often, because a gate can move in few steps."""
        every = self.options.every_steps
        return step % every == 0 or step % max(1, every // 8) == 0

    def look(self, step: int) -> str | None:
        """Decides on capacities by the counts since the last look.

        Returns:
          Description of the change, for the log; None if nothing changed.
        """
        seen, overflow = self.histogram.sum(), self.overflow
        wanted = self._wanted()
        self.histogram, self.overflow = np.zeros_like(self.histogram), 0.0
        if seen == 0 or wanted == self.capacities:
            return None
        share = overflow / seen
        saves = 1 - np.mean(wanted) / np.mean(self.capacities)
        may_shrink = step % self.options.every_steps == 0
        if share <= self.options.max_overflow and not (
            may_shrink and saves >= self.options.min_saving
        ):
            return None
        old, self.capacities, self.changes = self.capacities, wanted, self.changes + 1
        return (
            f"capacities {_text(old)} -> {_text(wanted)} tokens, {np.mean(wanted):.4g} on average "
            f"(change {self.changes} of {self.options.max_recompiles}; {share:.2%} of the images "
            "exceeded theirs): compiling"
        )

    def _wanted(self) -> tuple[int, ...]:
        if self.changes >= self.options.max_recompiles:
            # No more compilations are allowed: keep the capacities, or make every image fit.
            enough = self.overflow <= self.options.max_overflow * self.histogram.sum()
            return self.capacities if enough else (self._everything,)
        return bucket_capacities(
            self.histogram,
            smallest=self.regions,
            parts=self.parts,
            images=self.images,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, so that a resumed run has the same capacities."""
        return {
            "budgets": list(self.capacities),
            "histogram": self.histogram.tolist(),
            "unfit": self.overflow,
            "changes": self.changes,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Restores what `to_json` returned."""
        self.capacities = tuple(kept["budgets"])
        self.histogram = np.asarray(kept["histogram"], np.float64)
        self.overflow, self.changes = float(kept["unfit"]), int(kept["changes"])


def _text(capacities: tuple[int, ...]) -> str:
    return "/".join(map(str, capacities))
