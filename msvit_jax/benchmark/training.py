"""Training steps as sides: the step that train.py runs, without its input pipeline."""

import time

import jax
import numpy as np
import optax

from msvit_jax import config as configs
from msvit_jax.benchmark.options import DENSE, Options, build, make_config
from msvit_jax.benchmark.sides import (
    Program,
    Side,
    Work,
    compiled,
    make_side,
    no_room,
    side_name,
)
from msvit_jax.benchmark.sizes import size_layout
from msvit_jax.benchmark.turns import Timed
from msvit_jax.train import optimizer, step
from msvit_jax.train.state import TrainState, state_maker

_TOTAL_STEPS, _STEPS_PER_EPOCH = 1000, 100.0  # of the learning rate's schedule: no matter


def train_sides(options: Options, work: Work) -> list[Side]:
    """The dense model's and each layout's training steps, on the same images."""
    return [_train_side(layout, options, work) for layout in (DENSE, *options.layouts)]


def _train_side(layout: str, options: Options, work: Work) -> Side:
    size = size_layout(layout, work.model, work.counts[0], options)
    name = side_name(layout, options)
    config = make_config(name, options, size.attributes)
    model, plain = configs.build_model(config), build(name, options)
    gate_loss = configs.build_gate_loss(config, model)
    key = jax.random.key(options.seed)
    maker = state_maker(plain, gate_loss, optax.identity(), with_ema=False)
    params = jax.eval_shape(maker, key, {}).params
    schedule = optimizer.schedule(config.optimizer, _TOTAL_STEPS, _STEPS_PER_EPOCH)
    update = optimizer.make_optimizer(config.optimizer, params, schedule)
    state = jax.jit(state_maker(plain, gate_loss, update, with_ema=False))(key, {})
    batch = _batch(options, work, model.image_size, config.model.num_classes)
    if layout == DENSE:
        del batch["coarse"]
    train_step = step.make_train_step(model, gate_loss, update, config)
    program = compiled(train_step, state, batch, donate=(0,))
    state, reported = program.run(state, batch)
    if not np.isfinite(reported.scalars["total_loss"]):
        raise no_room("Some images", size)
    call = _stepping(program, state, batch)
    return make_side(layout, options, work, [call], [program], [size])


def _batch(options: Options, work: Work, side: int, classes: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(options.seed)
    images = work.counts.shape[1]
    return jax.device_put(
        {
            "image": rng.integers(0, 256, (images, side, side, 3), np.uint8),
            "label": rng.integers(0, classes, images).astype(np.int32),
            "coarse": work.coarse[0],
        }
    )


def _stepping(program: Program, state: TrainState, batch: dict[str, jax.Array]) -> Timed:
    """A call that takes the next step and returns its seconds."""

    def once() -> float:
        nonlocal state
        start = time.perf_counter()
        state, reported = program.run(state, batch)
        jax.block_until_ready((state, reported))
        return time.perf_counter() - start

    return once
