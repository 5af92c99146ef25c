"""Trains a model, or resumes it: python train.py --config=configs/X.py --workdir=DIR.

Every key of the config can be given on the command line: --config.optimizer.learning_rate=1e-4.
On several hosts start it on each: TPU pods are detected, elsewhere give --coordinator,
--process_count and --process_index.
"""

import sys
from collections.abc import Sequence

from absl import flags

from msvit_jax import config, errors, launch
from msvit_jax.train import loop

_CONFIG = flags.DEFINE_string("config", None, "Config file, e.g. configs/digits_vit.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and logs go.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Trains."""
    launch.start(argv)
    loop.train(config.load(_CONFIG.value, overrides), _WORKDIR.value)


if __name__ == "__main__":
    overrides = config.take_overrides(sys.argv)
    errors.run(main)
