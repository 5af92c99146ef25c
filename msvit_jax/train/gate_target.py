"""Holds a gate to its target share by an integral correction of its last bias.

Batch shaping asks for a distribution whose share of fine regions comes out near the target but not
at it, because the task asks for more. So after every step the bias moves a little toward the value
at which the batch would have had exactly the target's share, noise-free, as evaluation decides.
This is our addition to MSViT; `loss.gate.correction=0` trains as the paper does.

Meanwhile the part of the gradient that is common to all regions is kept from the gate
(`gate.hold_level`): it would pull against the correction, and that ruined gates which had learned
well (digits_msvit from 96.7 %: 98 % of the digit regions fine after one epoch, 78 % after four,
top-1 94.2 %; held, 98 % and 97.5 %).

A correction in proportion to the missing share would be too weak for a gate that is certain, whose
logits lie far from the threshold, and too strong for one that has learned nothing. The distance in
logits is the right step for both.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import logit
from ml_collections import config_dict

from msvit_jax.models.interface import ImageModel
from msvit_jax.models.output import GateOutput
from msvit_jax.train.optimizer import frozen
from msvit_jax.tree import map_names

BIAS = "model/gate_mlp/fc4/bias"


def learns(model: ImageModel, config: config_dict.ConfigDict) -> bool:
    """Tells whether a run has a gate that learns how many regions are fine."""
    return (
        model.gate == "mlp"
        and model.has_threshold
        and not frozen(BIAS, tuple(config.optimizer.freeze))
    )


def applies(model: ImageModel, config: config_dict.ConfigDict) -> bool:
    """Tells whether a run has a gate that learns and a target to hold it to."""
    gate = config.loss.gate
    its_own = gate.kind == "bas" and gate.prior == "beta"  # the prior's mean replaces the target
    return bool(gate.correction) and gate.kind != "none" and not its_own and learns(model, config)


def measure(gate: GateOutput, threshold: float, target: float) -> dict[str, Array]:
    """Measures what the correction needs of a batch, also for the log.

    Args:
      gate: Gate's output with logits [B, R] of staying coarse, for the global batch.
      threshold: Probability of coarse above which a region is coarse.
      target: Target share of fine regions.

    Returns:
      Dict with `fine_rate`, the share of fine regions without noise, and `gate_offset`, the logits
      by which the gate is too coarse: the target's share of the regions lies below threshold +
      offset.
    """
    logits = gate.logits.astype(jnp.float32) - logit(jnp.asarray(threshold, jnp.float32))
    return {
        "fine_rate": (logits <= 0).mean(dtype=jnp.float32),
        "gate_offset": jnp.quantile(logits, jnp.asarray(target, jnp.float32)),
    }


def without_bias(grads: Any) -> Any:
    """Zeroes the last bias's gradient, which is rounding that Adam would scale to whole steps."""
    return map_names(lambda name, leaf: jnp.zeros_like(leaf) if name == BIAS else leaf, grads)


def correct(params: Any, measured: dict[str, Array], correction: float) -> Any:
    """Moves the gate's last bias by a share of its offset."""
    move = correction * measured["gate_offset"]
    return map_names(lambda name, leaf: leaf - move if name == BIAS else leaf, params)
