"""Alternatives: the tokens that regions would have if a gate had decided the other way.

A gate learns what a decision does from keys that are switched off (see `models.attention`), so in
training the tokens of both scales have to be there. All of them are 5 for each region of 4 cells,
more than the fine grid has. In fewer places the alternatives of some regions are carried: four fine
tokens of a coarse region, the coarse token of a fine one.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msvit_jax.tokens import grid

CHOICES = ("nearest", "random")


@struct.dataclass
class Carried:
    """Which regions' alternatives are carried.

    Attributes:
      regions: [B, R] bool.
      weight: [B, R] float32, factor of their gradient: 1 over the probability of being carried,
        which makes the mean over draws that of all regions; 0 for the others.
    """

    regions: Array
    weight: Array


def count(coarse: Array) -> Array:
    """Places that the alternatives of each region take: [B, R] decisions -> [B, R] int32."""
    return jnp.where(coarse > 0.5, grid.REGION**2, 1).astype(jnp.int32)


def nearest(coarse: Array, slope: Array, room: Array) -> Carried:
    """Carries the regions whose decision can move most.

    A region's gradient is a multiple of the derivative of its relaxed decision, which is close to
    nothing for the regions that the gate is certain of: leaving those out costs little.

    Args:
      coarse: [B, R] decisions, 1 = coarse.
      slope: [B, R], derivative of the relaxed decision by the gate's logit.
      room: [B] int32, places for alternatives.
    """
    order = jnp.argsort(-slope, axis=1, stable=True)
    filled = jnp.cumsum(jnp.take_along_axis(count(coarse), order, axis=1), axis=1)
    carried = jnp.take_along_axis(filled, jnp.argsort(order, axis=1), axis=1) <= room[:, None]
    return Carried(carried, carried.astype(jnp.float32))


def random(coarse: Array, key: Array, room: Array) -> Carried:
    """Carries regions by chance, each with a known probability.

    First coarse tokens of fine regions, which take one place each; what is left goes to coarse
    regions, by fours.

    Args:
      coarse: [B, R] decisions, 1 = coarse.
      key: random key.
      room: [B] int32, places for alternatives.
    """
    is_coarse = coarse > 0.5
    draw = jax.random.uniform(key, coarse.shape)
    of_fine, of_coarse = (~is_coarse).sum(axis=1), is_coarse.sum(axis=1)
    singles = jnp.clip(room, 0, of_fine)
    fours = jnp.clip((room - singles) // grid.REGION**2, 0, of_coarse)
    carried, weight = jnp.zeros_like(is_coarse), jnp.zeros(coarse.shape, jnp.float32)
    for chosen, total, taken in ((~is_coarse, of_fine, singles), (is_coarse, of_coarse, fours)):
        rank = jnp.argsort(jnp.argsort(jnp.where(chosen, draw, 2.0), axis=1), axis=1)
        mine = chosen & (rank < taken[:, None])
        factor = total.astype(jnp.float32) / jnp.maximum(taken, 1).astype(jnp.float32)
        carried, weight = carried | mine, jnp.where(mine, factor[:, None], weight)
    return Carried(carried, weight)
