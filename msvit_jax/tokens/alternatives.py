"""Alternatives: the tokens that regions would have if a gate had decided the other way.

A gate learns the effect of a decision from keys that are switched off (see `models.attention`), so
in training the tokens of both scales have to be present. All of them are 5 for each region of 4
cells, more than the fine grid has. With less capacity the alternatives of some regions are carried:
the four fine tokens of a coarse region, the coarse token of a fine one.
"""

import jax.numpy as jnp
from jax import Array

from msvit_jax.tokens import grid


def nearest(coarse: Array, slope: Array, room: Array) -> Array:
    """Chooses the regions whose decisions are nearest to changing.

    A region's gradient is a multiple of the derivative of its relaxed decision, which is near 0
    where the relaxed decision is nearly 0 or 1, so leaving those regions out costs little. Regions
    drawn at random, with weights that keep the mean unbiased, were tried:
    docs/results/gate_gradient.md.

    Args:
      coarse: [B, R] decisions, 1 = coarse.
      slope: [B, R], derivative of the relaxed decision by the gate's logit.
      room: [B] int32, capacity for alternatives.

    Returns:
      [B, R] float32, 1 where a region's alternatives are carried, else 0.
    """
    # Tokens of the alternative: four fine ones for a coarse region, one coarse for a fine region.
    needed = jnp.where(coarse > 0.5, grid.REGION**2, 1).astype(jnp.int32)
    order = jnp.argsort(-slope, axis=1, stable=True)
    # Total tokens of the regions up to each one by slope, then back in the regions' own order.
    filled = jnp.cumsum(jnp.take_along_axis(needed, order, axis=1), axis=1)
    filled = jnp.take_along_axis(filled, jnp.argsort(order, axis=1), axis=1)
    return (filled <= room[:, None]).astype(jnp.float32)
