"""One optimizer step: a pure function of (state, batch, seed) for jit on any mesh.

Random numbers are a function of (seed, step) alone. The batch arrives as bytes and is normalized on
the device. Nothing here depends on the kind of model: what concerns a gate applies where the
model's output has one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import Array
from ml_collections import config_dict

from msvit_jax import losses, metrics, pixels, tasks
from msvit_jax.errors import UserError
from msvit_jax.models.interface import ImageModel
from msvit_jax.models.output import Output
from msvit_jax.train import gate_target
from msvit_jax.train.optimizer import group_norms, stop_frozen, update_ema
from msvit_jax.train_state import TrainState

Batch = dict[str, Array]


@struct.dataclass
class StepMetrics:
    """Results that a step reports.

    Attributes:
      sums: Sums of metrics over the global batch.
      scalars: Total loss, its terms and the gradient's norms, by name.
    """

    sums: metrics.Sums
    scalars: dict[str, Array]


@struct.dataclass
class Teacher:
    """A dense model to distill from; `variables` are an argument of the step, never a constant."""

    model: ImageModel = struct.field(pytree_node=False)
    variables: Any


def make_train_step(
    model: ImageModel,
    gate_loss: nn.Module,
    optimizer: optax.GradientTransformation,
    config: config_dict.ConfigDict,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Builds step(state, batch, teacher) -> (state, metrics).

    With `optimizer.accum_steps` = k the gradient is the mean over k microbatches of the batch,
    computed
    one after the other: less memory, the same step. A gate's loss then sees the order statistics of
    a microbatch, not of the whole batch.
    """
    microbatches = config.optimizer.accum_steps
    patterns = tuple(config.optimizer.freeze)
    corrected = gate_target.applies(model, config)
    if corrected:
        model = model.clone(hold_level=True)
    objective = _make_objective(model, gate_loss, config)

    def loss_of(params: Any, *rest: Any) -> tuple[Array, StepMetrics]:
        return objective(stop_frozen(params, patterns), *rest)

    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def step(
        state: TrainState, batch: Batch, teacher: Teacher | None = None
    ) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if microbatches == 1:
            (_, reported), grads = gradient(state.params, batch, key, teacher)
        else:
            grads, reported = _accumulate(gradient, state.params, batch, key, teacher, microbatches)
        if corrected:
            grads = gate_target.without_bias(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if corrected:
            params = gate_target.correct(params, reported.scalars, config.loss.gate.correction)
        ema = state.ema
        if ema is not None:
            ema = update_ema(ema, params["model"], config.ema_decay, state.step)
        scalars = {**reported.scalars, **_norms(grads)}
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return state, dataclasses.replace(reported, scalars=scalars)

    return step


def _norms(grads: Any) -> dict[str, Array]:
    """Returns the gradient's norm, and those of the groups that are clipped apart, if several."""
    norms = group_norms(grads)
    parts = {f"grad_norm_{name}": norm for name, norm in norms.items()} if len(norms) > 1 else {}
    return {"grad_norm": optax.tree.norm(list(norms.values())), **parts}


def _accumulate(
    gradient: Callable[..., Any],
    params: Any,
    batch: Batch,
    key: Array,
    teacher: Teacher | None,
    microbatches: int,
) -> tuple[Any, StepMetrics]:
    """Averages the gradient over k microbatches of a batch.

    Piece j has every k-th row, so that rows stay on their device.
    """
    split = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

    def one(index: Array) -> tuple[Any, StepMetrics]:
        microbatch = jax.tree.map(lambda x: x[index], split)
        (_, reported), grads = gradient(params, microbatch, jax.random.fold_in(key, index), teacher)
        return grads, reported

    def add(carry: Any, index: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one(index)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
    (grads, reported), _ = jax.lax.scan(add, zeros, jnp.arange(microbatches))
    mean = lambda tree: jax.tree.map(lambda x: x / microbatches, tree)  # noqa: E731
    return mean(grads), dataclasses.replace(reported, scalars=mean(reported.scalars))


def _make_objective(
    model: ImageModel, gate_loss: nn.Module, config: config_dict.ConfigDict
) -> Callable[..., tuple[Array, StepMetrics]]:
    """Builds objective(params, batch, key, teacher) -> (total loss, metrics)."""
    watched, task = gate_target.learns(model, config), tasks.task_of(model)

    def objective(
        params: Any, batch: Batch, key: Array, teacher: Teacher | None
    ) -> tuple[Array, StepMetrics]:
        mix_key, gate_key, dropout_key = jax.random.split(key, 3)
        images = pixels.normalize(batch["image"], model.mean, model.std)
        images, targets = task.targets(mix_key, images, batch, model.num_classes, config)
        rngs = {"gate": gate_key, "dropout": dropout_key}
        rngs["reducer"] = jax.random.fold_in(dropout_key, 1)
        # Decisions in a batch are used instead of the gate's (by msvit_jax.benchmark).
        forced = {"coarse": batch["coarse"]} if "coarse" in batch else {}
        output = model.apply({"params": params["model"]}, images, train=True, rngs=rngs, **forced)
        smoothing = config.loss.label_smoothing
        judged = task.judge(output, targets, images.shape[1:3], model, smoothing=smoothing)
        total, scalars = judged.mean(), {}
        if output.exit_logits is not None:
            exits = config.loss.exits
            total = losses.exits_loss(
                output.exit_logits,
                targets,
                distillation_weight=exits.distillation,
                temperature=exits.temperature,
            ).mean()
        if teacher is not None:
            shown = pixels.renormalize(images, model, teacher.model)
            total = _with_teacher(total, output, shown, teacher, config.loss.distillation)
        elif output.distilled_logits is not None:
            # Without a teacher both heads learn the labels, as in DeiT's fine-tuning.
            distilled = losses.cross_entropy(output.distilled_logits, targets)
            total = (total + _mean(distilled, output.within_capacity)) / 2
        if output.gate is not None:
            shaped = gate_loss.apply({"params": params["gate_loss"]}, output.gate)
            scalars = {"gate_loss": shaped.loss, **shaped.terms}
            total = total + config.loss.gate.weight * shaped.loss
            if watched:
                scalars |= gate_target.measure(
                    output.gate, model.threshold, config.loss.gate.target
                )
        sums = metrics.batch_sums(
            output,
            task.labels(batch),
            judged.losses,
            max_tokens=model.max_tokens,
            weights=judged.weights,
            pixels=judged.pixels,
        )
        return total, StepMetrics(sums=sums, scalars={"total_loss": total, **scalars})

    return objective


def _mean(values: Array, answered: Array | None) -> Array:
    """Averages over the images of a batch that have an answer; 0 if none has."""
    if answered is None:
        return values.mean()
    total = jnp.where(answered, values, 0.0).sum()
    return total / jnp.maximum(answered.sum(), 1).astype(values.dtype)


def _with_teacher(
    total: Array, output: Output, images: Array, teacher: Teacher, options: config_dict.ConfigDict
) -> Array:
    """Adds distillation (Touvron et al. 2021): (1 - weight) x labels + weight x teacher."""
    theirs = teacher.model.apply(teacher.variables, images, train=False).logits
    ours = [output.logits if output.distilled_logits is None else output.distilled_logits]
    if output.exit_logits is not None:
        ours = [output.exit_logits[:, stage] for stage in range(output.exit_logits.shape[1])]
    how = {"temperature": options.temperature, "kind": options.kind}
    if theirs.ndim != ours[0].ndim:
        raise UserError("The teacher answers another question: one classifies images, one pixels.")
    distance = sum(losses.distillation(logits, theirs, **how) for logits in ours)
    distance = jnp.asarray(distance).reshape(theirs.shape[0], -1).mean(axis=1)  # over patches
    return (1 - options.weight) * total + options.weight * _mean(distance, output.within_capacity)
