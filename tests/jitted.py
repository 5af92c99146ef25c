"""Models as compiled functions.

Called without `jax.jit`, every operation of a model is a program of its own: hundreds to compile,
where these are one. Starting one is the reverse: a few small programs draw the parameters of all
models, where one that draws them all takes three times as long to compile as a forward pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

STATIC = ("train", "method", "stage")  # options that choose the program; the others are its inputs


def init(model: nn.Module, *inputs: Any, seed: int = 0) -> Any:
    """Returns the variables a model starts with."""
    return pruned(model.init, jax.random.key(seed), *inputs)


def pruned(function: Callable[..., Any], *inputs: Any) -> Any:
    """Returns what a function does, computed one by one by those operations that this needs."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*inputs)
    jaxpr, used = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    kept = [x for x, is_used in zip(jax.tree.leaves(inputs), used, strict=True) if is_used]
    results = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))(*kept)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def apply(model: nn.Module, variables: Any, *inputs: Any, **options: Any) -> Any:
    """Returns `model.apply` of these; not for tests that patch what the model calls."""
    static = tuple((name, options.pop(name)) for name in STATIC if name in options)
    return _compiled(model, static)(variables, *inputs, **options)


@functools.cache
def _compiled(model: nn.Module, static: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(model.apply, **dict(static)))
