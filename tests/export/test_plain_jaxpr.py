"""Flat operation lists compute what the functions compute that they were made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from msvit_jax.export import plain_jaxpr

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
INDEX = np.asarray([[0, 2, 3], [-1, 4, 1]], np.int32)


@jax.custom_vjp
def _twice(x):
    return jnp.where(x > 1, 2 * x, x)


_twice.defvjp(lambda x: (_twice(x), None), lambda _, g: (g,))

CALLS = {
    "take, zeros outside": lambda p, x: jnp.take_along_axis(
        x, INDEX[:, :, None], axis=1, mode="fill", fill_value=0
    ),
    "take, not a number outside": lambda p, x: x.at[:, INDEX[1]].get(mode="fill"),
    "take, integers outside": lambda p, x: x.astype(jnp.int32).at[0, INDEX].get(mode="fill"),
    "take by two axes": lambda p, x: x.at[INDEX, INDEX[::-1]].get(mode="fill", fill_value=7),
    "take, clipped": lambda p, x: jnp.take(x, INDEX, axis=2, mode="clip"),
    "take, row by row": lambda p, x: jax.vmap(lambda v, i: v.at[i].get(mode="fill", fill_value=5))(
        x, jnp.asarray(INDEX)
    ),
    "pad and cut": lambda p, x: lax.pad(x, jnp.float32(9), ((0, 0, 0), (1, 2, 0), (-1, 1, 0))),
    "remainder": lambda p, x: x.astype(jnp.int32) % 5 - lax.rem(-x.astype(jnp.int32), 3),
    "calls": lambda p, x: jax.jit(_twice)(x) @ jax.nn.gelu(p["kernel"]),
    "platforms": lambda p, x: lax.platform_dependent(
        x, tpu=lambda x: x - 1, default=lambda x: x + 1
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_list_computes_what_the_function_computes(name):
    call, params = CALLS[name], {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)}
    kind = jax.ShapeDtypeStruct(X.shape, X.dtype)
    flat, _ = plain_jaxpr.flatten(call, params, [kind])
    names = {equation.primitive.name for equation in flat.jaxpr.eqns}
    assert not names & {"jit", "pjit", "custom_vjp_call", "cond", "platform_index", "pad", "rem"}
    got = plain_jaxpr.evaluate(flat.jaxpr, flat.consts, [X], plain_jaxpr.bind)
    np.testing.assert_array_equal(got[0], call(params, jnp.asarray(X)))


def test_what_depends_on_no_input_is_computed():
    params = {"kernel": np.eye(4, dtype=np.float32)}
    (batch,) = export.symbolic_shape("b")
    kind = jax.ShapeDtypeStruct((batch, 4), np.float32)
    flat, outputs = plain_jaxpr.flatten(
        lambda p, x: {"y": x @ (jnp.tanh(p["kernel"]) * 2)}, params, [kind]
    )
    assert [equation.primitive.name for equation in flat.jaxpr.eqns] == ["dot_general"]
    assert outputs["y"].shape == (batch, 4)
