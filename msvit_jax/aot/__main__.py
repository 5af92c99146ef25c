"""Estimates a run's memory and time on a TPU, without a TPU.

    python -m msvit_jax.aot --config=configs/imagenet/msvit_deit_small.py --topology=v5e:16x16

Compiles the step that train.py runs (--what=train) or the forward pass (--what=predict), prints a
table and then one JSON object. Needs no data set. Config keys are set by --config.key=value.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from msvit_jax import config as configs
from msvit_jax import errors
from msvit_jax.aot import compiling, report, topology, variants
from msvit_jax.data import sources

_CONFIG = flags.DEFINE_string(
    "config", None, "Path of a config file, e.g. configs/digits_msvit.py.", required=True
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips to compile for, e.g. v5e:2x2, v4:2x2x4.", required=True
)
_WHAT = flags.DEFINE_enum(
    "what", "train", compiling.WHAT, "Program to compile: a training step or prediction."
)
_LAYOUTS = flags.DEFINE_list(
    "layouts",
    None,
    "Layouts to compile, any of dense, reduced, cascade, slots, budget, trimmed, alternatives, "
    "rows and ladder; the others are compared with the first.",
)
_TOKENS = flags.DEFINE_integer("tokens", 128, "Mean number of active patch tokens per image.")
_SPREAD = flags.DEFINE_float(
    "spread", 30.0, "Standard deviation of that number, for rows and ladder."
)
_LARGEST = flags.DEFINE_bool(
    "largest_batch", False, "Whether to find the largest batch that fits; compiles several times."
)
_WIDTH = flags.DEFINE_integer(
    "row_width", None, "Number of tokens of a row; by default a whole number of TPU tiles."
)

DOES_NOT_FIT = 3  # the exit code
CLASSES = 1000  # if neither config nor data set states the number


def main(argv: Sequence[str]) -> None:
    """Compiles all requested variants and prints the results."""
    errors.refuse_arguments(argv, "keys are written --config.key=value")
    topology.without_a_tpu()
    chips = topology.find(_TOPOLOGY.value)
    config = _config()
    sizes = variants.Sizes(_TOKENS.value, _SPREAD.value, _WIDTH.value)
    batch_size, key = compiling.batch_of(config, _WHAT.value)

    @functools.cache
    def record(name: str, size: int) -> dict[str, Any]:
        made = config.copy_and_resolve_references()
        configs.set_key(made, key, size)
        count = len(chips.devices)
        variant = variants.variant(made, name, batch_size=size, chips=count, sizes=sizes)
        return compiling.compile_variant(variant, _WHAT.value, chips)

    records = []
    for name in _LAYOUTS.value or variants.default_names(config):
        size = batch_size
        if _LARGEST.value:
            unit = len(chips.devices) * config.optimizer.accum_steps
            fits = lambda size, name=name: record(name, size)["fits"]  # noqa: E731
            size = compiling.largest_batch(fits, unit, size) or unit
        records.append(record(name, size))
    if not report.show(records, chips):
        sys.exit(DOES_NOT_FIT)


def _config() -> Any:
    """The config with the data set's number of classes; a number that is assumed is printed."""
    config = configs.load(_CONFIG.value, overrides)
    classes = sources.prepared_classes(config.data.name, config.data.data_dir)
    if classes is None and "num_classes" not in config.model:
        print(
            f"Data set {config.data.name!r} is not there: {CLASSES} classes taken "
            "(--config.model.num_classes=N says otherwise).",
            flush=True,
        )
    return configs.resolve(config, classes or config.model.get("num_classes", CLASSES))


if __name__ == "__main__":
    overrides = configs.take_overrides(sys.argv)
    errors.run(main)
