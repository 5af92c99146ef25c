"""The gate of MSViT, which decides for each coarse region: one coarse token or four fine ones.

Source: MSViT (Havtorn et al. 2023), section 3, and facts derived from its published costs: a
four-layer MLP on the raw pixels of the region, as wide as the backbone. Every gate here gives
*logits* whose sigmoid is the probability of staying coarse; `threshold_decisions` turns them into
decisions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array, lax

from msvit_jax import flops
from msvit_jax.models.block import gelu, init_weights
from msvit_jax.tokens import grid

GATES = ("mlp", "random", "center", "entropy", "fine", "coarse")
_CERTAIN = 20.0  # a logit whose probability is as good as 1 or 0 in float32
_ENTROPY_BINS = 32


class GateMLP(nn.Module):
    """Four linear layers on a region's pixels, with a position embedding after the first.

    Attributes:
      hidden: Width of the three hidden layers.
      region_grid: (rows, columns) of regions in a training image.
      bias: Initial value of the last bias; above 0 the gate starts out coarse, below 0 fine.
      dtype: Compute dtype of the hidden layers.
    """

    hidden: int
    region_grid: tuple[int, int]
    bias: float = 2.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, regions: Array) -> Array:
        """Maps pixels of the regions [B, h, w, S, S, 3] to logits [B, h * w] float32."""
        dense = {"dtype": self.dtype}
        x = nn.DenseGeneral(self.hidden, axis=(-3, -2, -1), name="fc1", **dense)(
            regions.astype(self.dtype)
        )
        positions = self.param("pos_embed", init_weights, (*self.region_grid, self.hidden))
        positions = grid.resize_positions(positions, (x.shape[1], x.shape[2]))
        x = gelu(x + positions.astype(x.dtype)[None])
        x = gelu(nn.Dense(self.hidden, name="fc2", **dense)(x))
        x = gelu(nn.Dense(self.hidden, name="fc3", **dense)(x))
        start = nn.initializers.constant(self.bias)
        x = nn.Dense(1, bias_init=start, name="fc4")(x.astype(jnp.float32))
        return x.reshape(x.shape[0], -1)


def mlp_macs(regions: int, region_size: int, hidden: int) -> float:
    """Counts multiply-accumulates of `GateMLP` on one image."""
    layers = ((3 * region_size**2, hidden), (hidden, hidden), (hidden, hidden), (hidden, 1))
    return sum(float(flops.dense(regions, *layer)) for layer in layers)


def untrained_logits(kind: str, pixels: Array) -> Array:
    """Computes logits of the gates that learn nothing, to compare a learned one with.

    * "random": a uniform probability for each region, a function of the image's content alone.
    * "center": the region's distance from the image's center, 0 there and 1 in the corners.
    * "entropy": 1 - H / log2(32), H the entropy of the region's gray levels in 32 bins (APT's
      criterion, on 32 instead of 512 bins).
    * "fine", "coarse": the same decision for every region.

    Args:
      kind: Name of the gate, one of the above.
      pixels: [B, h, w, S, S, 3], pixels of the regions on the scale of 0 to 1.

    Returns:
      Logits [B, h * w] float32.
    """
    batch, rows, columns = pixels.shape[:3]
    if kind in ("fine", "coarse"):
        sign = 1.0 if kind == "coarse" else -1.0
        return jnp.full((batch, rows * columns), sign * _CERTAIN, jnp.float32)
    if kind == "center":
        probability = jnp.asarray(grid.center_distance((rows, columns)), jnp.float32)
        probability = jnp.broadcast_to(probability[None], (batch, rows * columns))
    elif kind == "random":
        probability = _random_probability(pixels)
    elif kind == "entropy":
        probability = 1 - _entropy(pixels) / np.float32(np.log2(_ENTROPY_BINS))
    else:
        raise ValueError(f"gate={kind!r} is not one of {', '.join(GATES)}.")
    edge = 1e-6
    return jax.scipy.special.logit(jnp.clip(probability, edge, 1 - edge))


def _random_probability(pixels: Array) -> Array:
    """Draws uniform numbers with a key made of the image's own bits, independent of its batch."""
    bits = lax.bitcast_convert_type(pixels.astype(jnp.float32), jnp.uint32)
    seeds = bits.sum(axis=tuple(range(1, pixels.ndim)), dtype=jnp.uint32)
    count = pixels.shape[1] * pixels.shape[2]
    draw = lambda seed: jax.random.uniform(jax.random.key(seed), (count,), jnp.float32)  # noqa: E731
    return jax.vmap(draw)(seeds)


def _entropy(pixels: Array) -> Array:
    """Entropy in bits of the gray levels of each region: [B, h, w, S, S, 3] -> [B, h * w]."""
    luminance = jnp.asarray([0.299, 0.587, 0.114], jnp.float32)
    gray = jnp.einsum("...c,c->...", pixels.astype(jnp.float32), luminance)
    gray = gray.reshape(*gray.shape[:3], -1)
    level = jnp.clip(jnp.floor(gray * _ENTROPY_BINS), 0, _ENTROPY_BINS - 1).astype(jnp.int32)
    share = jnp.stack([(level == k).mean(axis=-1) for k in range(_ENTROPY_BINS)], axis=-1)
    entropy = -(share * jnp.log2(jnp.maximum(share, 1e-12))).sum(axis=-1)
    return entropy.reshape(entropy.shape[0], -1)


def straight_through(hard: Array, soft: Array) -> Array:
    """Returns the value of `hard` with the gradient of `soft`."""
    return lax.stop_gradient(hard - soft) + soft


def scaled_gradient(x: Array, factor: Array) -> Array:
    """Returns the value of x, with `factor` times its gradient."""
    still = lax.stop_gradient(x)
    return still + factor * (x - still)


@jax.custom_vjp
def hold_level(logits: Array) -> Array:
    """Returns the logits [B, R]; their gradient cannot move the batch's mean probability.

    For a trainer that sets the share of fine regions itself, by the last bias. Losses that want
    another share would push all weights in the same direction, step after step, while the bias is
    pushed back, until the gate no longer tells regions apart. So the part of the gradient that all
    regions share is removed: with g the gradient and s = p (1 - p) the slope of the probability, g
    - s sum(g) / sum(s) is passed on. Its sum is zero; it is the gradient of a loss that charges
    each fine region the price at which the share stays constant.
    """
    return logits


def _hold_level_forward(logits: Array) -> tuple[Array, Array]:
    return logits, logits


def _hold_level_backward(logits: Array, cotangent: Array) -> tuple[Array]:
    slope = _slope(jax.nn.sigmoid(logits))
    # Where every region is certain, all slopes are about 0 and no gradient moves the share.
    price = cotangent.sum() / jnp.maximum(slope.sum(), 1e-6)
    return (cotangent - price * slope,)


hold_level.defvjp(_hold_level_forward, _hold_level_backward)


@struct.dataclass
class Decisions:
    """Decisions on the regions of a batch.

    Attributes:
      coarse: [B, R], 1 = one coarse token, 0 = four fine ones; straight-through in training.
      slope: [B, R], derivative of the relaxed decision by the gate's logit, without gradient.
    """

    coarse: Array
    slope: Array


def threshold_decisions(logits: Array, *, threshold: float | Array) -> Decisions:
    """Decides without noise: 1 (coarse) where the probability of coarse exceeds the threshold."""
    coarse = (jax.nn.sigmoid(logits) > threshold).astype(jnp.float32)
    return Decisions(coarse, jnp.zeros_like(logits))


def given(coarse: Array, logits: Array) -> Decisions:
    """Wraps decisions made elsewhere; gradient reaches them and the gate's probability."""
    soft = jax.nn.sigmoid(logits)
    return Decisions(coarse + (soft - lax.stop_gradient(soft)), _slope(soft))


def _slope(probability: Array) -> Array:
    return lax.stop_gradient(probability * (1 - probability))


def sample(logits: Array, key: Array, temperature: float) -> Decisions:
    """Samples Gumbel-sigmoid decisions with straight-through gradient (MSViT, section 3).

    A region is coarse with probability sigmoid(logit); gradient flows as through the relaxed
    decision sigmoid((logit + logistic noise) / temperature).
    """
    noise = jax.random.logistic(key, logits.shape, logits.dtype)
    soft = jax.nn.sigmoid((logits + noise) / temperature)
    coarse = straight_through((soft > 0.5).astype(soft.dtype), soft)
    return Decisions(coarse, lax.stop_gradient(soft * (1 - soft) / temperature))


def finest(logits: Array, share: float) -> Decisions:
    """Makes the same share of every image fine: the regions with the lowest coarse logits.

    Straight-through to the probabilities, so that a gate can also be trained with a fixed share.

    Args:
      logits: [B, R], logits of staying coarse.
      share: Share of the regions that get fine tokens, rounded to whole regions.
    """
    count = round(share * logits.shape[1])
    rank = jnp.argsort(jnp.argsort(logits, axis=1), axis=1)  # 0 for the finest region
    hard, soft = (rank >= count).astype(jnp.float32), jax.nn.sigmoid(logits)
    return Decisions(straight_through(hard, soft), _slope(soft))
