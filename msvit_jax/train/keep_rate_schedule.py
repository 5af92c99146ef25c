"""Schedule of keep rates for training from scratch: all tokens first, then fewer and fewer.

EViT (Liang et al. 2022) keeps all tokens for 10 epochs and lowers the rate along a cosine over the
next 100. Under jit a new rate needs a new compilation, so here it falls in a few steps. The rate is
a function of the training step alone, so a resumed run continues where it was.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from msvit_jax.errors import UserError
from msvit_jax.models.interface import ImageModel

Rates = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class KeepRateSchedule:
    """Keep rates by training step.

    Attributes:
      target: Final keep rate of each reducing layer.
      hold: Number of steps with all tokens.
      steps: Number of steps in which the rates fall.
      num_rates: Number of different rates.
    """

    target: Rates
    hold: float
    steps: float
    num_rates: int

    @classmethod
    def from_config(
        cls, options: Mapping[str, Any], model: ImageModel, steps_per_epoch: float
    ) -> "KeepRateSchedule | None":
        """Makes the schedule that a config asks for; None if it asks for none.

        Raises:
          UserError: The model has no keep rates, or the schedule's values are not possible.
        """
        if not options["epochs"] and not options["hold_epochs"]:
            return None
        specs = model.reductions
        if not specs or any(spec.make().remove for spec in specs.values()):
            raise UserError(
                "keep_rate.epochs is for models that keep a share of their tokens (model.reducer "
                "and model.keep); this one does not. Set keep_rate.epochs=0 and "
                "keep_rate.hold_epochs=0."
            )
        if options["hold_epochs"] < 0 or options["epochs"] < 0 or options["num_rates"] < 1:
            raise UserError(
                f"keep_rate.hold_epochs={options['hold_epochs']}, "
                f"keep_rate.epochs={options['epochs']} and "
                f"keep_rate.num_rates={options['num_rates']}: epochs are not negative, and there "
                "is at least one rate."
            )
        return cls(
            target=tuple(spec.make().keep for _, spec in sorted(specs.items())),
            hold=options["hold_epochs"] * steps_per_epoch,
            steps=options["epochs"] * steps_per_epoch,
            num_rates=options["num_rates"],
        )

    def at(self, step: int) -> Rates:
        """Returns the rates of a step, counted from 0: 1 at first, `target` at last."""
        done = (step - self.hold) / self.steps if self.steps else float(step >= self.hold)
        part = min(max(math.floor(done * self.num_rates), 0), self.num_rates) / self.num_rates
        left = (1 + math.cos(math.pi * part)) / 2
        return tuple(round(rate + (1 - rate) * left, 6) for rate in self.target)


def with_rates(model: ImageModel, rates: Rates) -> ImageModel:
    """Returns the same model, for the same parameters, with other keep rates."""
    return model.with_backbone(keep=rates)
