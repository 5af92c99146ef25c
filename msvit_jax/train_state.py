"""The training state, created on its devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import Array

from msvit_jax.errors import UserError
from msvit_jax.models.interface import ImageModel

Params = Any


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: Scalar int32, number of optimizer steps done.
      params: Dict {'model': ..., 'gate_loss': ...}; the latter are the learned priors, or empty.
      opt_state: State of the optimizer.
      ema: Moving average of params['model'], or None.
    """

    step: Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None = None


def init_params(model: ImageModel, gate_loss: nn.Module, key: Array) -> Params:
    """Initializes parameters of a model and of its gate's loss.

    Args:
      model: Model from the registry.
      gate_loss: Loss of the gate, a `losses.GateLoss`; has no parameters for a model without a
        gate.
      key: Random key.

    Raises:
      UserError: The model's sizes do not fit together.
    """
    keys = dict(zip(("params", "gate", "dropout"), jax.random.split(key, 3), strict=True))
    images = jnp.zeros((2, *model.image_shape), jnp.float32)
    try:
        output, variables = model.with_dense_layout().init_with_output(keys, images, train=False)
    except ValueError as error:
        raise UserError(f"The model cannot be built: {error}") from error
    params = {"model": variables["params"], "gate_loss": {}}
    if output.gate is not None:
        loss_variables = gate_loss.init(jax.random.fold_in(key, 1), output.gate)
        params["gate_loss"] = loss_variables.get("params", {})
    return params


# Traced once for all programs of a model.
traced_init = jax.jit(init_params, static_argnums=(0, 1))


def state_maker(
    optimizer: optax.GradientTransformation, *, with_ema: bool
) -> Callable[[Params], TrainState]:
    """Returns a function of the parameters that makes the state; jit it with out_shardings."""

    def make(params: Params) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params["model"]) if with_ema else None,
        )

    return make


def count_parameters(params: Params) -> int:
    """Counts the parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
