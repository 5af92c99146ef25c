"""Evaluates a run: python eval.py --workdir=DIR [--sweep] [--budget_curve].

The same program as `msvit eval`; msvit_jax/cli/evaluate.py holds the code.
"""

import sys

from msvit_jax import cli

if __name__ == "__main__":
    cli.main(["eval", *sys.argv[1:]])
