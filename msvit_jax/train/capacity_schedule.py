"""The schedule of the trimmed layout: budgets that follow the running token counts.

MSViT trims every batch to its largest count ("adaptive trimming"). Under jit a new length is a new
program, so here the budgets change rarely, to what the counts of many steps ask for: our
reconstruction. The alternatives that a gate learns from cost places (see `tokens.alternatives`), so
they are carried in one step of several, whose gradient counts for all of those.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from ml_collections import config_dict

from msvit_jax.tokens.grid import REGION
from msvit_jax.tokens.plan import round_up

# A part's budget covers the count that this many standard deviations more images than the part's
# share would need: batches differ.
_DEVIATIONS = 1.0
_STEP = 8  # budgets are multiples of this, or the whole grid


def default_config() -> dict[str, Any]:
    """The config's `capacity` section."""
    return {
        "num_buckets": 8,  # of a device's share of the batch, each with its own budget
        "alternatives": 0.25,  # places for alternatives of regions, as a share of the grid's
        "alternatives_every": 4,  # steps: one of them carries alternatives, with their gradient
        "every_steps": 200,  # between changes to smaller budgets; to larger ones, an eighth of it
        "min_saving": 0.08,  # places that new budgets must save to be worth a compilation
        "max_overflow": 0.02,  # share of images without places above which budgets grow
        "max_recompiles": 8,  # of the budgets in a run, each a compilation; then the whole grid
    }


def bucket_capacities(
    histogram: np.ndarray,
    *,
    smallest: int,
    parts: int,
    images: int,
    multiple: int = _STEP,
) -> tuple[int, ...]:
    """Budgets for equal parts of a batch, sorted by token count.

    Args:
      histogram: [N + 1], number of images by count of active patch tokens, 0 to N.
      smallest: tokens that every image has at least.
      parts: how many.
      images: of a batch that is packed together; the fewer, the more batches differ.
      multiple: what budgets are rounded up to; none is larger than N.

    Returns:
      Ascending budgets.
    """
    below = np.cumsum(histogram) / max(histogram.sum(), 1)
    share = np.arange(1, parts + 1) / parts
    share = np.minimum(1.0, share + _DEVIATIONS * np.sqrt(share * (1 - share) / images))
    counts = np.searchsorted(below, share - 1e-9)
    rounded = [round_up(max(int(count), smallest), multiple) for count in counts]
    return tuple(min(budget, len(histogram) - 1) for budget in rounded)


@dataclasses.dataclass(frozen=True)
class StepCapacity:
    """What a training step has places for.

    Attributes:
      budgets: see `MSViT.budget`.
      gate_gradient: see `MSViT.gate_gradient`.
    """

    budgets: tuple[int, ...]
    gate_gradient: float

    @property
    def attributes(self) -> dict[str, Any]:
        """The model's attributes."""
        return {"budget": self.budgets, "gate_gradient": self.gate_gradient}


@dataclasses.dataclass
class CapacitySchedule:
    """Budgets of a run and the counts that decide on the next ones.

    Attributes:
      options: see `default_config`.
      regions: of an image; it has at least as many tokens.
      images: of a batch that is packed together.
      parts: of those images, each with its own budget.
      budgets: for active tokens alone, in use now.
      histogram: [N + 1], counts since the last look.
      unfit: images without places since then.
      changes: of the budgets so far.
    """

    options: config_dict.ConfigDict
    regions: int
    images: int
    parts: int
    budgets: tuple[int, ...]
    histogram: np.ndarray
    unfit: float = 0.0
    changes: int = 0

    @classmethod
    def start(
        cls, options: config_dict.ConfigDict, *, regions: int, images: int
    ) -> "CapacitySchedule":
        """Starts with places for all tokens of both scales.

        Args:
          options: see `default_config`.
          regions: of an image.
          images: of a batch that is packed together.
        """
        parts = math.gcd(images, options.num_buckets)  # equal ones
        counts = np.zeros(REGION**2 * regions + 1)
        made = cls(options, regions, images, parts, (), counts)
        made.budgets = (made._everything,)
        return made

    @property
    def _everything(self) -> int:
        """Tokens of both scales of an image."""
        return (REGION**2 + 1) * self.regions

    def at(self, step: int) -> StepCapacity:
        """What step number `step` + 1 has places for."""
        every = self.options.alternatives_every
        if self.budgets == (self._everything,):
            return StepCapacity(self.budgets, 1.0)
        if step % every:
            return StepCapacity(self.budgets, 0.0)
        room = round_up(self.options.alternatives * REGION**2 * self.regions, _STEP)
        budgets = tuple(min(b + room, self._everything) for b in self.budgets)
        return StepCapacity(budgets, float(every))

    def observe(self, histogram: np.ndarray, unfit: float) -> None:
        """Takes the counts of a step, and how many images found no places."""
        self.histogram = self.histogram + histogram
        self.unfit += float(unfit)

    def due(self, step: int) -> bool:
        """Whether to look after this step: often, because a gate can move within few steps."""
        every = self.options.every_steps
        return step % every == 0 or step % max(1, every // 8) == 0

    def look(self, step: int) -> str | None:
        """Decides on budgets by the counts since the last look.

        Returns:
          What changed, for the log; None if nothing did.
        """
        seen, unfit = self.histogram.sum(), self.unfit
        wanted = self._wanted()
        self.histogram, self.unfit = np.zeros_like(self.histogram), 0.0
        if seen == 0 or wanted == self.budgets:
            return None
        share = unfit / seen
        saves = 1 - np.mean(wanted) / np.mean(self.budgets)
        may_shrink = step % self.options.every_steps == 0
        if share <= self.options.max_overflow and not (
            may_shrink and saves >= self.options.min_saving
        ):
            return None
        old, self.budgets, self.changes = self.budgets, wanted, self.changes + 1
        return (
            f"budgets {_text(old)} -> {_text(wanted)} tokens, {np.mean(wanted):.4g} on average "
            f"(change {self.changes} of {self.options.max_recompiles}; {share:.2%} of the images "
            "had no places): compiling"
        )

    def _wanted(self) -> tuple[int, ...]:
        if self.changes >= self.options.max_recompiles:
            # No more compilations than promised: stay, or give every image its places.
            enough = self.unfit <= self.options.max_overflow * self.histogram.sum()
            return self.budgets if enough else (self._everything,)
        return bucket_capacities(
            self.histogram,
            smallest=self.regions,
            parts=self.parts,
            images=self.images,
        )

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run goes on with the same budgets."""
        return {
            "budgets": list(self.budgets),
            "histogram": self.histogram.tolist(),
            "unfit": self.unfit,
            "changes": self.changes,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Takes over what `to_json` gave."""
        self.budgets = tuple(kept["budgets"])
        self.histogram = np.asarray(kept["histogram"], np.float64)
        self.unfit, self.changes = float(kept["unfit"]), int(kept["changes"])


def _text(budgets: tuple[int, ...]) -> str:
    return "/".join(map(str, budgets))
