"""Evaluates a run: python eval.py --workdir=DIR [--sweep] [--budget_curve].

Or a weights file, of any format that the library reads: --weights=FILE --config=FILE. Prints a
table, then one JSON object as the last line. --model.key=value and --data.key=value change the
model or the data it is evaluated with: --model.gate=random --model.fine_share=0.3.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from msvit_jax import config, errors, evaluate, launch
from msvit_jax.inference.thresholds import CRITERIA

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's workdir.")
_CONFIG = flags.DEFINE_string("config", None, "Config of the model and data for --weights.")
_WEIGHTS = flags.DEFINE_string("weights", None, "Weights file to evaluate instead of a checkpoint.")
_WHICH = flags.DEFINE_string("which", "best", "'best', 'latest', or the step of a checkpoint.")
_SPLIT = flags.DEFINE_string("split", None, "Split to evaluate; the config's eval_split if unset.")
_BATCH = flags.DEFINE_integer(
    "batch_size", None, "Global batch size; the config's if unset.", lower_bound=1
)
_SWEEP = flags.DEFINE_bool("sweep", False, "Also draw the curve over gate thresholds.")
_THRESHOLDS = flags.DEFINE_list(
    "thresholds", [f"{t:g}" for t in np.linspace(0.1, 0.9, 9)], "Gate thresholds of --sweep."
)
_CURVE = flags.DEFINE_bool(
    "budget_curve", False, "Also draw a cascade's accuracy over compute, exits chosen by image."
)
_BUDGETS = flags.DEFINE_list(
    "budgets", [], "Mean GMACs per image of --budget_curve; ten from first to last exit if unset."
)
_CRITERION = flags.DEFINE_enum(
    "criterion", "confidence", CRITERIA, "What says how sure an exit is, for --budget_curve."
)
_FIT = flags.DEFINE_integer(
    "fit_examples", 20_000, "Training images that --budget_curve fits thresholds on.", lower_bound=1
)


def _check_weights_flags() -> None:
    if not _CONFIG.value:
        raise errors.UserError("--weights needs --config=FILE, which names the model and the data.")
    if _WORKDIR.value or _SWEEP.value or _CURVE.value:
        raise errors.UserError("--workdir, --sweep and --budget_curve are for runs, not --weights.")


def _evaluate_run(given: dict[str, Any]) -> dict[str, Any]:
    curve = {
        "budgets": errors.numbers("budgets", _BUDGETS.value),
        "criterion": _CRITERION.value,
        "fit_examples": _FIT.value,
    }
    return evaluate.evaluate_run(
        _WORKDIR.value,
        which=_WHICH.value,
        thresholds=errors.numbers("thresholds", _THRESHOLDS.value) if _SWEEP.value else (),
        curve=curve if _CURVE.value else None,
        **given,
    )


def main(argv: Sequence[str]) -> None:
    """Evaluates."""
    launch.start(argv)
    given = {"split": _SPLIT.value, "batch_size": _BATCH.value, "overrides": overrides}
    if _WEIGHTS.value:
        _check_weights_flags()
        result = evaluate.evaluate_weights(_WEIGHTS.value, _CONFIG.value, **given)
    elif _WORKDIR.value:
        result = _evaluate_run(given)
    else:
        raise errors.UserError("Give --workdir=DIR, or --weights=FILE and --config=FILE.")
    if jax.process_index() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    overrides = config.take_overrides(sys.argv, ("model", "data", "config"))
    errors.run(main)
