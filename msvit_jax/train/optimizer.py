"""The optimizer: AdamW or SGD, how the rate falls, and what differs between parameters.

Parameters are distinguished by their path: which decay (kernels only), how fast a layer learns
(layer decay, the gate's own rate, the encoder's below a decoder) and which are frozen.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax import Array

from msvit_jax.errors import UserError
from msvit_jax.tree import flat_names, map_names

Params = Any

FIRST_LAYER = ("patch_embed", "cls_token", "dist_token", "reg_tokens", "pos_embed")


def schedule(options: Mapping[str, Any], steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Makes a linear warm-up from 0, the way to the minimum, and the minimum for the cool-down.

    The way is a cosine, or "poly": the power of what is left of it, as in segmentation's recipes.
    """
    warmup, cooldown = (
        round(options[f"{name}_epochs"] * steps_per_epoch) for name in ("warmup", "cooldown")
    )
    if warmup + cooldown >= steps > 0 and warmup + cooldown:
        raise UserError(
            f"optimizer.warmup_epochs={options['warmup_epochs']} and cooldown_epochs="
            f"{options['cooldown_epochs']} ({warmup} + {cooldown} steps) are not shorter than the "
            f"run ({steps} steps)."
        )
    peak = options["learning_rate"]
    if options["schedule"] == "poly":
        falling = optax.polynomial_schedule(
            init_value=peak,
            end_value=options["min_learning_rate"],
            power=options["power"],
            transition_steps=max(steps - cooldown - warmup, 1),
        )
        rising = optax.linear_schedule(0.0, peak, max(warmup, 1))
        return optax.join_schedules([rising, falling], [warmup]) if warmup else falling
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps - cooldown, 1),
        end_value=options["min_learning_rate"],
    )


def is_gate(name: str) -> bool:
    """Tells whether a parameter of the state's tree belongs to the gate or to the gate's loss."""
    return name.startswith(("model/gate", "gate_loss/"))


def is_encoder(name: str) -> bool:
    """Tells whether a parameter of the state's tree belongs neither to gate, head nor decoder."""
    answers = re.match(r"model/(.*/)?(decoder|head|head_dist)/", name)
    return not (is_gate(name) or answers)


def group(name: str) -> str:
    """Returns the part of the parameters that is clipped together: backbone, gate or priors."""
    if name.startswith("gate_loss/"):
        return "priors"
    return "gate" if is_gate(name) else "backbone"


def group_norms(grads: Params) -> dict[str, Array]:
    """Computes the gradient's norm in each group that exists."""
    members: dict[str, list[Array]] = {}
    for name, leaf in flat_names(grads).items():
        members.setdefault(group(name), []).append(leaf)
    return {name: optax.tree.norm(leaves) for name, leaves in members.items()}


def clip_groups(largest: float) -> optax.GradientTransformation:
    """Clips backbone, gate and priors each by their own norm.

    One norm for all would let a large gradient of the gate shrink the backbone's.
    """

    def update(updates: Params, params: Params | None = None) -> Params:
        del params
        factors = {
            name: jax.numpy.minimum(1.0, largest / jax.numpy.maximum(norm, 1e-12))
            for name, norm in group_norms(updates).items()
        }
        return map_names(lambda n, leaf: leaf * factors[group(n)].astype(leaf.dtype), updates)

    return optax.stateless(update)


def decays(name: str) -> bool:
    """Tells whether weight decay applies: only to kernels of the model."""
    return name.endswith("/kernel") and not name.startswith("gate_loss/")


def frozen(name: str, patterns: tuple[str, ...]) -> bool:
    """Tells whether a pattern matches the start of the path, with or without 'model/'."""
    short = name.removeprefix("model/")
    return any(re.match(p, short) or re.match(p, name) for p in patterns)


def check_frozen(params: Params, patterns: tuple[str, ...]) -> None:
    """Raises UserError for a pattern that matches nothing, or if nothing is left to train."""
    names = list(flat_names(params))
    for pattern in patterns:
        try:
            matched = any(frozen(name, (pattern,)) for name in names)
        except re.error as error:
            raise UserError(f"optimizer.freeze: {pattern!r} is not a regex: {error}") from error
        if not matched:
            tops = sorted({"/".join(n.removeprefix("model/").split("/")[:2]) for n in names})
            raise UserError(
                f"optimizer.freeze: {pattern!r} matches no parameter. Paths begin with: "
                + ", ".join(tops)
            )
    if names and all(frozen(name, patterns) for name in names):
        raise UserError("optimizer.freeze leaves nothing to train.")


def layer_scales(params: Params, decay: float, depth: int) -> Params:
    """Computes learning-rate factors of layer decay: 1 at the head, times `decay` per layer below.

    Embeddings are layer 0, block i is layer i + 1, norm and head come after the last block. A
    stacked tree of blocks gets one factor per layer. The gate is outside the layers, with factor 1.
    """

    def scale(name: str, leaf: Any) -> Any:
        parts = name.split("/")
        if is_gate(name):
            return 1.0
        if "blocks" in parts:
            factors = decay ** (depth - jax.numpy.arange(depth, dtype=jax.numpy.float32))
            return factors.reshape((depth,) + (1,) * (leaf.ndim - 1))
        return decay ** (depth + 1 - _layer(parts, depth))

    return map_names(scale, params)


def depth_of(params: Params) -> int:
    """Counts the transformer blocks in a tree of parameters, separate or stacked."""
    depth = 0
    for name, leaf in flat_names(params).items():
        for part in name.split("/"):
            if part == "blocks":
                depth = max(depth, leaf.shape[0])
            elif match := re.fullmatch(r"blocks_(\d+)", part):
                depth = max(depth, int(match[1]) + 1)
    return depth


def _layer(parts: list[str], depth: int) -> int:
    for part in parts:
        if part in FIRST_LAYER or part.startswith("scale_"):
            return 0
        if match := re.fullmatch(r"blocks_(\d+)", part):
            return int(match[1]) + 1
    return depth + 1


def make_optimizer(
    options: Mapping[str, Any], params: Params, rate: optax.Schedule
) -> optax.GradientTransformation:
    """Builds the optimizer for a state's parameters.

    Args:
      options: Config's `optimizer` section.
      params: Dict {'model': ..., 'gate_loss': ...}, arrays or shapes.
      rate: Learning rate by step.

    Returns:
      Chain of clipping, group by group -> Adam -> decay of kernels -> learning rate by layer and
      group; for SGD decay comes before momentum, as in PyTorch's. Frozen parameters have no
      optimizer state.
    """
    patterns = tuple(options["freeze"])
    check_frozen(params, patterns)
    clip = options["clip_norm"]
    train = optax.chain(
        clip_groups(clip) if clip else optax.identity(),
        *_direction(options),
        _scale_by(options, depth_of(params)),
        optax.scale_by_learning_rate(rate),
    )
    labels = map_names(lambda n, _: "frozen" if frozen(n, patterns) else "train", params)
    return _promoting(
        optax.multi_transform({"train": train, "frozen": optax.set_to_zero()}, labels)
    )


def _direction(options: Mapping[str, Any]) -> list[optax.GradientTransformation]:
    """Returns the transformations that make a step's direction of gradients, with weight decay."""
    decayed = optax.add_decayed_weights(
        options["weight_decay"], mask=lambda tree: map_names(lambda n, _: decays(n), tree)
    )
    if options["name"] == "sgd":
        return [decayed, optax.trace(decay=options["momentum"])]
    return [optax.scale_by_adam(b1=options["b1"], b2=options["b2"]), decayed]


def _promoting(made: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets Optax mix its integer counts with floats where JAX is set to strict promotion."""

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return made.update(grads, state, params)

    return optax.GradientTransformation(made.init, update)


def _scale_by(options: Mapping[str, Any], depth: int) -> optax.GradientTransformation:
    """Multiplies updates by layer decay and by the group's rate relative to the common one."""
    common = options["learning_rate"]
    gate_rate, encoder_rate = options["gate_learning_rate"], options["encoder_learning_rate"]

    def factor(name: str) -> float:
        own = gate_rate if is_gate(name) else encoder_rate if is_encoder(name) else None
        return 1.0 if own is None else own / common

    def update(updates: Params, params: Params | None = None) -> Params:
        layers = layer_scales(updates, options["layer_decay"], depth)
        groups = map_names(lambda n, _: factor(n), updates)
        return jax.tree.map(lambda u, a, b: u * (a * b), updates, layers, groups)

    return optax.stateless(update)


def stop_frozen(params: Params, patterns: tuple[str, ...]) -> Params:
    """Cuts the gradient of frozen parameters, so that their backward pass is never computed."""
    if not patterns:
        return params
    return map_names(
        lambda n, leaf: jax.lax.stop_gradient(leaf) if frozen(n, patterns) else leaf, params
    )


def update_ema(ema: Params, params: Params, decay: float, step: Array) -> Params:
    """Does one step of an exponential moving average.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that short runs do not stay close
    to their random initialization.
    """
    count = step.astype(jax.numpy.float32)
    rate = jax.numpy.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(lambda e, p: e + (1 - rate) * (p - e), ema, params)
