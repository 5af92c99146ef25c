"""Models as compiled functions.

Called without `jax.jit`, every operation of a model is a program of its own: hundreds to compile,
where these are one. Starting one is the reverse, see `msvit_jax.drawing`.
"""

import functools
from typing import Any

import jax
from flax import linen as nn

from msvit_jax import drawing

STATIC = ("train", "method", "stage")  # options that choose the program; the others are its inputs


def init(model: nn.Module, *inputs: Any, seed: int = 0) -> Any:
    """Returns the variables a model starts with."""
    return drawing.variables(model, jax.random.key(seed), *inputs)


def apply(model: nn.Module, variables: Any, *inputs: Any, **options: Any) -> Any:
    """Returns `model.apply` of these; not for tests that patch what the model calls."""
    static = tuple((name, options.pop(name)) for name in STATIC if name in options)
    return _compiled(model, static)(variables, *inputs, **options)


@functools.cache
def _compiled(model: nn.Module, static: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(model.apply, **dict(static)))
