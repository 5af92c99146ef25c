"""Alternatives: the tokens that regions would have if a gate had decided the other way.

A gate learns what a decision does from keys that are switched off (see `models.attention`), so in
training the tokens of both scales have to be there. All of them are 5 for each region of 4 cells,
more than the fine grid has. In fewer places the alternatives of some regions are carried: four fine
tokens of a coarse region, the coarse token of a fine one.
"""

import jax.numpy as jnp
from flax import struct
from jax import Array

from msvit_jax.tokens import grid


@struct.dataclass
class Carried:
    """Which regions' alternatives are carried.

    Attributes:
      regions: [B, R] bool.
      weight: [B, R] float32, factor of their gradient; 0 for regions that are not carried.
    """

    regions: Array
    weight: Array


def count(coarse: Array) -> Array:
    """Places that the alternatives of each region take: [B, R] decisions -> [B, R] int32."""
    return jnp.where(coarse > 0.5, grid.REGION**2, 1).astype(jnp.int32)


def nearest(coarse: Array, slope: Array, room: Array) -> Carried:
    """Carries the regions whose decision can move most.

    A region's gradient is a multiple of the derivative of its relaxed decision, close to nothing
    where that is nearly 0 or 1: leaving those regions out costs little. Regions drawn by chance,
    with weights that keep the mean unbiased, were tried: docs/results/gate_gradient.md.

    Args:
      coarse: [B, R] decisions, 1 = coarse.
      slope: [B, R], derivative of the relaxed decision by the gate's logit.
      room: [B] int32, places for alternatives.
    """
    order = jnp.argsort(-slope, axis=1, stable=True)
    filled = jnp.cumsum(jnp.take_along_axis(count(coarse), order, axis=1), axis=1)
    carried = jnp.take_along_axis(filled, jnp.argsort(order, axis=1), axis=1) <= room[:, None]
    return Carried(carried, carried.astype(jnp.float32))
