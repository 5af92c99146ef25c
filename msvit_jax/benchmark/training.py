"""Training steps as cases: the step that train.py runs, without its input pipeline."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from msvit_jax import config as configs
from msvit_jax import sharding
from msvit_jax.benchmark.options import DENSE, Options, make_config
from msvit_jax.benchmark.sides import Case, Work, compiled, make_side, no_room
from msvit_jax.benchmark.sizes import schedule, size_layout
from msvit_jax.benchmark.turns import Timed
from msvit_jax.models.interface import SEGMENTATION
from msvit_jax.train import optimizer
from msvit_jax.train.capacity_schedule import StepCapacity
from msvit_jax.train.program import TrainProgram
from msvit_jax.train_state import TrainState

# Of the learning rate's schedule; they do not affect the timing.
_STEPS, _STEPS_PER_EPOCH = 1000, 100.0


def train_sides(options: Options, work: Work) -> list[Case]:
    """The dense model's and each layout's training steps, on the same images and one device."""
    mesh = jax.make_mesh(
        (1, 1),
        sharding.BATCH_AXES,
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:1],
    )

    def side(layout: str) -> Case:
        with jax.set_mesh(mesh):
            return _train_side(layout, options, work, mesh)

    # On CPU compilers side by side would only share the cores, and the memory.
    compilers = 1 if jax.default_backend() == "cpu" else len(options.layouts) + 1
    with concurrent.futures.ThreadPoolExecutor(compilers) as pool:
        return list(pool.map(side, (DENSE, *options.layouts)))


def _train_side(layout: str, options: Options, work: Work, mesh: Mesh) -> Case:
    size = size_layout(layout, work.model, work.counts[0], options)
    config = make_config(options, size.attributes, dense=layout == DENSE)
    config.batch_size = work.counts.shape[1]
    rate = optimizer.schedule(config.optimizer, _STEPS, _STEPS_PER_EPOCH)
    program = TrainProgram.from_config(config, mesh, rate)
    state = program.fresh_state({})
    batch = _batch(options, work, configs.build_model(config).num_classes)
    if layout != DENSE and work.coarse is not None:
        batch["coarse"] = work.coarse[0]
    batch = sharding.shard_batch(mesh, batch)
    capacities: list[StepCapacity | None] = [None]
    if layout == "trimmed" and not options.token_capacity:
        trainers = schedule(work.model, config.batch_size, options)
        capacities = [trainers.at(step) for step in range(trainers.options.alternatives_every)]
        computed = config.batch_size * np.mean([np.mean(c.capacities) for c in capacities if c])
        size = dataclasses.replace(size, computed=round(computed))
    steps = {c: compiled(program.jit_step(c), state, batch) for c in dict.fromkeys(capacities)}
    cycle = [steps[capacity].run for capacity in capacities]
    overflow = []
    for step in cycle:
        state, reported = step(state, batch)
        overflow.append(float(reported.sums.overflow) / len(batch["image"]))
    if any(overflow) and (options.token_capacity or layout != "trimmed"):
        raise no_room(f"{max(overflow):.0%} of the images", size)
    call = _stepping(cycle, state, batch)
    programs = list(steps.values())
    return make_side(
        layout, options, work, [call], programs, [size], overflow=float(np.mean(overflow))
    )


def _batch(options: Options, work: Work, classes: int) -> dict[str, Any]:
    rng = np.random.default_rng(options.seed)
    images = work.counts.shape[1]
    pixels = rng.integers(0, 256, (images, *work.model.image_shape), np.uint8)
    if work.model.task == SEGMENTATION:
        mask = rng.integers(0, classes, pixels.shape[:3]).astype(np.uint8)
        return {"image": pixels, "segmentation_mask": mask}
    return {"image": pixels, "label": rng.integers(0, classes, images).astype(np.int32)}


def _stepping(
    cycle: Sequence[Callable[..., Any]], state: TrainState, batch: dict[str, jax.Array]
) -> Timed:
    """Returns a call that runs the next steps, one of each kind, and returns their mean seconds."""

    def once() -> float:
        nonlocal state
        start = time.perf_counter()
        for step in cycle:
            state, reported = step(state, batch)
        jax.block_until_ready((state, reported))
        return (time.perf_counter() - start) / len(cycle)

    return once
