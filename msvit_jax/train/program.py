"""The compiled parts of a training run, its state and step, for a config and a mesh.

The loop runs them; `msvit_jax.aot` compiles them for devices that are not present.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import config_dict

from msvit_jax import config as configs
from msvit_jax import drawing, sharding, tasks, tree
from msvit_jax.errors import UserError
from msvit_jax.models import layout as layouts
from msvit_jax.models.interface import ImageModel
from msvit_jax.train import optimizer
from msvit_jax.train.capacity_schedule import StepCapacity
from msvit_jax.train.keep_rate_schedule import Rates, with_rates
from msvit_jax.train.step import make_train_step
from msvit_jax.train_state import Params, TrainState, state_maker, traced_init


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """A run's model, state and step.

    Attributes:
      config: Resolved config (`config.resolve`).
      mesh: Mesh of devices that holds all arrays.
      model: Model from the registry.
      gate_loss: Loss of the gate, a `losses.GateLoss`.
      init: Traced function of a key that draws the parameters.
      params: Shapes of {'model': ..., 'gate_loss': ...}.
      optimizer: Optimizer of the parameters.
      make_state: Function that makes the state of parameters, from `train_state.state_maker`.
      abstract_state: Shapes of the state with their shardings.
    """

    config: config_dict.ConfigDict
    mesh: Mesh
    model: ImageModel
    gate_loss: nn.Module
    init: jax.stages.Traced
    params: Params
    optimizer: optax.GradientTransformation
    make_state: Callable[[Params], TrainState]
    abstract_state: TrainState

    @classmethod
    def from_config(
        cls, config: config_dict.ConfigDict, mesh: Mesh, schedule: optax.Schedule
    ) -> "TrainProgram":
        """Works out all shapes and shardings; computes nothing.

        Raises:
          UserError: The config's model or optimizer cannot be built.
        """
        model = configs.build_model(config)
        tasks.check_target(model, config.data)
        model = _grouped(model, config, mesh)
        gate_loss = configs.build_gate_loss(config, model)
        init = traced_init.trace(model, gate_loss, jax.random.key(config.seed))
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init.out_info)
        update = optimizer.make_optimizer(config.optimizer, params, schedule)
        make = state_maker(update, with_ema=config.ema_decay > 0)
        shapes = jax.eval_shape(make, params)
        abstract_state = jax.tree.map(
            lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split),
            shapes,
            sharding.tree_sharding(mesh, shapes),
        )
        return cls(config, mesh, model, gate_loss, init, params, update, make, abstract_state)

    @property
    def shardings(self) -> Any:
        """Sharding of each leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def fresh_state(self, loaded: Mapping[str, Any]) -> TrainState:
        """Makes the state on its devices; `loaded` parameters replace the fresh ones by name."""
        with drawing.on_processor():
            key = jax.random.key(self.config.seed)
            fresh = jax.device_get(drawing.evaluate(self.init, key))
        params = tree.map_names(lambda name, leaf: loaded.get(name, leaf), fresh)
        params = jax.tree.map(sharding.put, params, self.shardings.params)
        return jax.jit(self.make_state, out_shardings=self.shardings)(params)

    def jit_step(
        self, capacity: StepCapacity | None = None, rates: Rates | None = None
    ) -> jax.stages.Wrapped:
        """Jits the step (state, batch, teacher) -> (state, metrics); the state is donated.

        Args:
          capacity: Capacities of the trimmed layout and factor of the gate's gradient; None for the
            model's own.
          rates: Keep rates; None for the model's own.
        """
        model = self.model
        if capacity is not None:
            model = model.clone(
                token_capacity=capacity.capacities, gate_gradient=capacity.gate_gradient
            )
        model = model if rates is None else with_rates(model, rates)
        return jax.jit(
            make_train_step(model, self.gate_loss, self.optimizer, self.config),
            donate_argnums=0,
            out_shardings=(self.shardings, sharding.replicated(self.mesh)),
        )


def _grouped(model: ImageModel, config: config_dict.ConfigDict, mesh: Mesh) -> ImageModel:
    """Returns the model with a layout, if it has one, that packs each device's images apart.

    Raises:
      UserError: The layout cannot train this model, or the batch cannot be cut for it.
    """
    kind = model.layout
    if kind == "slots":
        return model
    if kind != "trimmed" and model.gate == "mlp" and not _gate_frozen(config):
        raise UserError(
            f"model.layout={kind!r} gives the gate no gradient from the task. Train a gate with "
            "model.layout=slots or trimmed, or freeze it: optimizer.freeze=gate"
        )
    model = model if model.row_groups > 1 else model.clone(row_groups=mesh.size)
    images = config.batch_size // config.optimizer.accum_steps
    try:
        model.check_layout()
        layouts.images_per_group(images, model.packing_layout)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model


def _gate_frozen(config: config_dict.ConfigDict) -> bool:
    return optimizer.frozen("model/gate_mlp/fc1/kernel", tuple(config.optimizer.freeze))
