"""Training steps as sides: the step that train.py runs, without its input pipeline."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from msvit_jax import config as configs
from msvit_jax import sharding
from msvit_jax.benchmark.options import DENSE, Options, make_config
from msvit_jax.benchmark.sides import Side, Work, compiled, make_side, no_room
from msvit_jax.benchmark.sizes import size_layout
from msvit_jax.benchmark.turns import Timed
from msvit_jax.train import optimizer
from msvit_jax.train.program import Program
from msvit_jax.train.state import TrainState

_STEPS, _STEPS_PER_EPOCH = 1000, 100.0  # of the learning rate's schedule: no matter


def train_sides(options: Options, work: Work) -> list[Side]:
    """The dense model's and each layout's training steps, on the same images and one device."""
    mesh = jax.make_mesh(
        (1, 1),
        sharding.BATCH_AXES,
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:1],
    )
    with jax.set_mesh(mesh):
        return [_train_side(layout, options, work, mesh) for layout in (DENSE, *options.layouts)]


def _train_side(layout: str, options: Options, work: Work, mesh: Mesh) -> Side:
    size = size_layout(layout, work.model, work.counts[0], options)
    config = make_config(options, size.attributes, dense=layout == DENSE)
    config.batch_size = work.counts.shape[1]
    schedule = optimizer.schedule(config.optimizer, _STEPS, _STEPS_PER_EPOCH)
    program = Program.of(config, mesh, schedule)
    state = program.fresh_state({})
    batch = _batch(options, work, configs.build_model(config).num_classes)
    if layout != DENSE and work.coarse is not None:
        batch["coarse"] = work.coarse[0]
    batch = sharding.shard_batch(mesh, batch)
    step = compiled(program.jit_step(), state, batch)
    state, reported = step.run(state, batch)
    unfit = float(reported.sums.unfit) / batch["label"].size
    if unfit and (options.budget or layout != "trimmed"):
        raise no_room(f"{unfit:.0%} of the images", size)
    call = _stepping(step.run, state, batch)
    return make_side(layout, options, work, [call], [step], [size], unfit=unfit)


def _batch(options: Options, work: Work, classes: int) -> dict[str, Any]:
    rng = np.random.default_rng(options.seed)
    images, side = work.counts.shape[1], work.model.image_size
    return {
        "image": rng.integers(0, 256, (images, side, side, 3), np.uint8),
        "label": rng.integers(0, classes, images).astype(np.int32),
    }


def _stepping(step: Callable[..., Any], state: TrainState, batch: dict[str, jax.Array]) -> Timed:
    """A call that takes the next step and returns its seconds."""

    def once() -> float:
        nonlocal state
        start = time.perf_counter()
        state, reported = step(state, batch)
        jax.block_until_ready((state, reported))
        return time.perf_counter() - start

    return once
