"""Trains a model, or resumes its training.

    msvit train --config=configs/X.py --workdir=DIR

Every key of the config can be given on the command line: --config.optimizer.learning_rate=1e-4.
On several hosts start it on each: TPU pods are detected, elsewhere give --coordinator,
--process_count and --process_index.
"""

import functools
import sys
from collections.abc import Sequence

from absl import flags

from msvit_jax import config, errors, launch
from msvit_jax.train import loop


def main(argv: Sequence[str], *, overrides: Sequence[str]) -> None:
    """Runs the command.

    Args:
      argv: Command line without flags.
      overrides: Config keys and their values, 'key=value'.
    """
    with launch.started(argv):
        loop.train(config.load(flags.FLAGS.config, overrides), flags.FLAGS.workdir)


if __name__ == "__main__":
    # Here, because flags are global and other commands have some of these names too.
    flags.DEFINE_string(
        "config", None, "Path of a config file, e.g. configs/digits_vit.py.", required=True
    )
    flags.DEFINE_string("workdir", None, "Folder for checkpoints and logs.", required=True)
    errors.run(functools.partial(main, overrides=config.take_overrides(sys.argv)))
