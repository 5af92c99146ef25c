"""Draws the parameters that a model starts with, without compiling its forward pass.

A compiled `init` holds a program of its own for every parameter, which takes longer to compile than
a forward pass. Operation by operation, parameters of one shape share a program, and so do models.
"""

import contextlib
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
    return evaluate(jax.jit(function).trace(*inputs), *inputs)


def evaluate(traced: jax.stages.Traced, *inputs: Any) -> Any:
    """Computes a traced function as `needed` does.

    Args:
      traced: Function traced for the inputs.
      *inputs: Inputs, without those that are static.
    """
    jaxpr, used = partial_eval.dce_jaxpr(
        traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.jaxpr.outvars)
    )
    kept = [x for x, is_used in zip(jax.tree.leaves(inputs), used, strict=True) if is_used]
    results = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.jaxpr.consts))(*kept)
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), results)


def on_processor() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which arrays are made by the processor, where JAX may use it.

    There many small programs are compiled faster than for an accelerator.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return contextlib.nullcontext()
