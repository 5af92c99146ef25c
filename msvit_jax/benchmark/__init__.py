"""Compares the speed of a model with dynamic token counts and of its dense counterpart.

The function is `run`; the commands are `python -m msvit_jax.benchmark`, `.exits` for cascades and
`.input` for the input pipeline.
"""

from msvit_jax import extras

with extras.needed("train"):
    from msvit_jax.benchmark.options import Options
    from msvit_jax.benchmark.report import run

__all__ = ["Options", "run"]
