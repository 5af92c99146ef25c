"""Dense against dynamic, side by side: what the tokens that are saved give in time.

`run` measures; `python -m msvit_jax.benchmark --help` is the command.
"""

from msvit_jax import extras

with extras.needed("train"):
    from msvit_jax.benchmark.options import Options
    from msvit_jax.benchmark.report import run

__all__ = ["Options", "run"]
