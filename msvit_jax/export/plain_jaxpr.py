"""Flattens a function into one list of elementary operations, for converters to other formats.

Calls are inlined, constant expressions are evaluated, and operations that converters do not support
in every form are expressed by others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.extend import core


def flatten(call: Callable[..., Any], params: Any, inputs: Any) -> tuple[Any, Any]:
    """Traces a function.

    Args:
      call: Function of the parameters and the inputs; returns any tree.
      params: Arrays, which become constants.
      inputs: Sequence of trees of `jax.ShapeDtypeStruct`, whose sizes may be symbolic.

    Returns:
      The closed jaxpr, a function of the inputs' leaves, and the tree of its outputs.
    """
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    traced, outputs = jax.make_jaxpr(call, return_shape=True)(abstract, *inputs)
    constants = jax.tree.leaves(params)

    def flat(*leaves: Array) -> list[Any]:
        return evaluate(traced.jaxpr, traced.consts, [*constants, *leaves], _rewritten)

    return jax.make_jaxpr(flat)(*jax.tree.leaves(inputs)), outputs


def evaluate(
    jaxpr: Any,
    constants: Sequence[Any],
    arguments: Sequence[Any],
    apply: Callable[[Any, list[Any]], list[Any]],
) -> list[Any]:
    """Runs a jaxpr, equation by equation, each by `apply(equation, inputs)`."""
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        results = apply(equation, [read(v) for v in equation.invars])
        values |= zip(equation.outvars, results, strict=True)
    return [read(v) for v in jaxpr.outvars]


def bind(equation: Any, inputs: list[Any]) -> list[Any]:
    """Applies an equation's own operation."""
    results = equation.primitive.bind(*inputs, **equation.params)
    return list(results) if equation.primitive.multiple_results else [results]


def _rewritten(equation: Any, inputs: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "platform_index":  # take the branch for any platform
        return [np.int32(params["platforms"].index(None))]
    if name == "cond":
        chosen = params["branches"][int(inputs[0])]
        return evaluate(chosen.jaxpr, chosen.consts, inputs[1:], _rewritten)
    inner = params.get("call_jaxpr", params.get("jaxpr"))
    if inner is not None and name != "scan":
        jaxpr, constants = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        return evaluate(jaxpr, constants, inputs, _rewritten)
    fixed = all(isinstance(size, int) for v in equation.outvars for size in v.aval.shape)
    if fixed and not any(isinstance(x, jax.core.Tracer) for x in inputs):
        with jax.ensure_compile_time_eval():
            return bind(equation, inputs)
    if name in _REWRITES:
        return [_REWRITES[name](*inputs, **params)]
    return bind(equation, inputs)


def _pad(x: Array, value: Array, *, padding_config: Sequence[tuple[int, int, int]]) -> Array:
    """Padding expressed by concatenation, and cropping (negative padding) by slices."""
    for axis, (low, high, interior) in enumerate(padding_config):
        if interior:
            raise NotImplementedError("padding between elements")
        start, end = max(-low, 0), x.shape[axis] - max(-high, 0)
        if start or max(-high, 0):
            x = lax.slice_in_dim(x, start, end, axis=axis)
        parts = [x]
        if low > 0:
            parts.insert(0, lax.broadcast(value, (*x.shape[:axis], low, *x.shape[axis + 1 :])))
        if high > 0:
            parts.append(lax.broadcast(value, (*x.shape[:axis], high, *x.shape[axis + 1 :])))
        x = lax.concatenate(parts, axis) if len(parts) > 1 else x
    return x


def _rem(x: Array, y: Array) -> Array:
    """The remainder of truncating division."""
    return lax.sub(x, lax.mul(lax.div(x, y), y))


def _gather(x: Array, indices: Array, *, mode: Any, fill_value: Any, **params: Any) -> Array:
    """A gather with clamped indices; results for indices out of bounds are filled afterwards."""
    modes = lax.GatherScatterMode
    if mode not in (modes.FILL_OR_DROP, modes.CLIP):
        return lax.gather_p.bind(x, indices, mode=mode, fill_value=fill_value, **params)
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    last = np.asarray([x.shape[d] - sizes[d] for d in numbers.start_index_map], indices.dtype)
    if not isinstance(indices, jax.core.Tracer):
        known = np.asarray(indices)
        if np.all((known >= 0) & (known <= last)):
            mode = modes.PROMISE_IN_BOUNDS
            return lax.gather_p.bind(x, indices, mode=mode, fill_value=None, **params)
    largest = lax.broadcast_in_dim(last, indices.shape, (indices.ndim - 1,))
    clamped = lax.max(lax.min(indices, largest), lax.full_like(indices, 0))
    taken = lax.gather_p.bind(
        x, clamped, mode=modes.PROMISE_IN_BOUNDS, fill_value=fill_value, **params
    )
    if mode == modes.CLIP:
        return taken
    same = lax.eq(indices, clamped)
    inside = lax.index_in_dim(same, 0, -1, keepdims=False)
    for i in range(1, len(last)):
        inside = lax.bitwise_and(inside, lax.index_in_dim(same, i, -1, keepdims=False))
    axes = [axis for axis in range(taken.ndim) if axis not in numbers.offset_dims]
    inside = lax.broadcast_in_dim(inside, taken.shape, axes)
    return lax.select(inside, taken, lax.full_like(taken, _fill(taken.dtype, fill_value)))


def _fill(dtype: Any, value: Any) -> Any:
    """The fill value, or JAX's default for the type if none is given."""
    if value is not None:
        return value
    if np.issubdtype(dtype, np.inexact):
        return np.nan
    if np.issubdtype(dtype, np.signedinteger):
        return np.iinfo(dtype).min
    return True if np.issubdtype(dtype, np.bool_) else np.iinfo(dtype).max


_REWRITES: dict[str, Callable[..., Array]] = {"gather": _gather, "pad": _pad, "rem": _rem}
