"""Draws the parameters that a model starts with, without compiling its forward pass.

A compiled `init` holds a program of its own for every parameter, which takes longer to compile than
a forward pass. Operation by operation, parameters of one shape share a program, and so do models.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval


def variables(model: nn.Module, key: Any, *inputs: Any) -> Any:
    """Returns the variables that a model starts with.

    Args:
      model: Model from the registry.
      key: Random key, or a dict of them.
      *inputs: Inputs of the model, of which only the shapes matter.
    """
    return needed(model.init, key, *inputs)


def needed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Returns what a function does, computed one by one by those operations that this needs."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*inputs)
    jaxpr, used = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    kept = [x for x, is_used in zip(jax.tree.leaves(inputs), used, strict=True) if is_used]
    results = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))(*kept)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)
