"""Trains a model, or resumes its training: python train.py --config=configs/X.py --workdir=DIR.

The same program as `msvit train`; msvit_jax/cli/train.py holds the code.
"""

import sys

from msvit_jax import cli

if __name__ == "__main__":
    cli.main(["train", *sys.argv[1:]])
