"""Evaluates a run, or a weights file of any format that the library reads.

    msvit eval --workdir=DIR [--sweep] [--budget_curve]
    msvit eval --weights=FILE --config=FILE

Prints a table, then one JSON object as the last line. --model.key=value and --data.key=value change
the model or the data it is evaluated with: --model.gate=random --model.fine_share=0.3.
"""

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from msvit_jax import config, errors, evaluate, launch, peers, tree
from msvit_jax.exits.exit_thresholds import CRITERIA


def main(argv: Sequence[str], *, overrides: Sequence[str]) -> None:
    """Runs the command.

    Args:
      argv: Command line without flags.
      overrides: Config keys and their values, 'key=value'.
    """
    with launch.started(argv):
        given = flags.FLAGS.flag_values_dict()
        same = ("workdir", "config", "weights", "which", "split", "batch_size", "sweep")
        peers.agree({"overrides": list(overrides), **{name: given[name] for name in same}})
        result = _evaluate(overrides)
        if jax.process_index() == 0:
            print(json.dumps(tree.for_json(result)))


def _evaluate(overrides: Sequence[str]) -> dict[str, Any]:
    given = flags.FLAGS
    options = {"split": given.split, "batch_size": given.batch_size, "overrides": overrides}
    if given.weights:
        _check_weights_flags()
        return evaluate.evaluate_weights(given.weights, given.config, **options)
    if given.workdir:
        return _evaluate_run(options)
    raise errors.UserError("Give --workdir=DIR, or --weights=FILE and --config=FILE.")


def _check_weights_flags() -> None:
    given = flags.FLAGS
    if not given.config:
        raise errors.UserError("--weights needs --config=FILE, which names the model and the data.")
    if given.workdir or given.sweep or given.budget_curve:
        raise errors.UserError("--workdir, --sweep and --budget_curve are for runs, not --weights.")


def _evaluate_run(options: dict[str, Any]) -> dict[str, Any]:
    given = flags.FLAGS
    curve = {
        "gmacs_budgets": errors.numbers("gmacs_budgets", given.gmacs_budgets),
        "criterion": given.criterion,
        "fit_examples": given.fit_examples,
    }
    return evaluate.evaluate_run(
        given.workdir,
        which=given.which,
        thresholds=errors.numbers("thresholds", given.thresholds) if given.sweep else (),
        curve=curve if given.budget_curve else None,
        **options,
    )


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Workdir of the run to evaluate.")
    flags.DEFINE_string("config", None, "Config file that names the model and data of --weights.")
    flags.DEFINE_string("weights", None, "Weights file to evaluate instead of a run.")
    flags.DEFINE_string("which", "best", "Checkpoint to evaluate: 'best', 'latest' or a step.")
    flags.DEFINE_string("split", None, "Split to evaluate; by default the config's eval_split.")
    flags.DEFINE_integer(
        "batch_size", None, "Global batch size; by default the config's.", lower_bound=1
    )
    flags.DEFINE_bool("sweep", False, "Whether to draw the curve over gate thresholds, too.")
    flags.DEFINE_list(
        "thresholds", [f"{t:g}" for t in np.linspace(0.1, 0.9, 9)], "Gate thresholds for --sweep."
    )
    flags.DEFINE_bool(
        "budget_curve", False, "Whether to draw a cascade's accuracy over compute, too."
    )
    flags.DEFINE_list(
        "gmacs_budgets",
        [],
        "Mean GMACs per image for --budget_curve; by default ten from the first exit to the last.",
    )
    flags.DEFINE_enum(
        "criterion", "confidence", CRITERIA, "Measure of an exit's certainty for --budget_curve."
    )
    flags.DEFINE_integer(
        "fit_examples",
        20_000,
        "Number of training images that --budget_curve fits thresholds on.",
        lower_bound=1,
    )


if __name__ == "__main__":
    _define_flags()  # here, because flags are global and other commands have some of these names
    overrides = config.take_overrides(sys.argv, ("model", "data", "config"))
    errors.run(functools.partial(main, overrides=overrides))
