"""Mixup and cutmix on the device, over the whole global batch, inside the jitted train step.

Operates on global arrays: under jit with a sharded batch the result is the same as on one device.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from msvit_jax.errors import UserError
from msvit_jax.typed import Float


class Mixed(NamedTuple):
    """A mixed batch: `images` [B, H, W, 3] and `targets` [B, C]."""

    images: jax.Array
    targets: jax.Array


def mix(
    key: jax.Array,
    images: Float[jax.Array, "B H W 3"],
    targets: Float[jax.Array, "B C"],
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
) -> Mixed:
    """Applies mixup (Zhang et al. 2017) or cutmix (Yun et al. 2019) with the reversed batch.

    As in timm's "batch" mode, the whole batch shares one random draw: whether to mix, which of the
    two to apply, and the share lam ~ Beta(alpha, alpha) of each image that is kept.

    Args:
        key: PRNG key of the step.
        images: [B, H, W, 3] floating point, images of the global batch.
        targets: [B, C], target distributions; each row sums to 1.
        mixup: Alpha of mixup's Beta distribution; 0 turns mixup off.
        cutmix: Alpha of cutmix's Beta distribution; 0 turns cutmix off.
        prob: Probability of mixing this batch.
        switch_prob: Probability of cutmix if both are on.

    Raises:
        UserError: An alpha is negative, or a probability is outside [0, 1].
    """
    if min(mixup, cutmix) < 0 or not (0 <= prob <= 1 and 0 <= switch_prob <= 1):
        raise UserError(
            f"data.mixup={mixup} and data.cutmix={cutmix} must not be negative, and "
            f"data.mix_prob={prob} and data.mix_switch_prob={switch_prob} must be in 0 to 1."
        )
    if not mixup and not cutmix:
        return Mixed(images, targets)
    draw = _draw(key, mixup, cutmix, prob, switch_prob)
    kept = jnp.where(draw.use_cutmix, 1.0, draw.lam).astype(images.dtype)
    blended = kept * images + (1 - kept) * images[::-1]
    box = _box(draw, images.shape[1], images.shape[2])
    pasted = jnp.where(box[:, :, None], images[::-1], blended)
    # The rectangle has whole pixels and ends at the border, so lam is the share actually kept.
    lam = jnp.where(draw.use_cutmix, 1.0 - jnp.mean(box, dtype=jnp.float32), draw.lam)
    lam = lam.astype(targets.dtype)
    return Mixed(pasted, lam * targets + (1 - lam) * targets[::-1])


@dataclasses.dataclass(frozen=True)
class _Draw:
    lam: jax.Array
    use_cutmix: jax.Array
    center: jax.Array


def _draw(key: jax.Array, mixup: float, cutmix: float, prob: float, switch_prob: float) -> _Draw:
    """Draws the random numbers for one batch; lam = 1 leaves the batch unchanged."""
    on, switch, mixup_key, cutmix_key, center_key = jax.random.split(key, 5)
    if mixup and cutmix:
        use_cutmix = jax.random.bernoulli(switch, switch_prob)
    else:
        use_cutmix = jnp.asarray(bool(cutmix))
    # One sampler for both: it is most of what mixing takes to compile.
    alpha = jnp.where(use_cutmix, jnp.float32(cutmix or 1.0), jnp.float32(mixup or 1.0))
    chosen = jnp.where(use_cutmix, cutmix_key, mixup_key)
    lam = jax.random.beta(chosen, alpha, alpha, dtype=jnp.float32)
    lam = jnp.where(jax.random.bernoulli(on, prob), lam, 1.0)
    return _Draw(lam, use_cutmix, jax.random.uniform(center_key, (2,), dtype=jnp.float32))


def _box(draw: _Draw, height: int, width: int) -> jax.Array:
    """Returns bool [H, W]: cutmix's rectangle of area 1 - lam, clipped at the border."""
    size = jnp.sqrt(1.0 - draw.lam) * draw.use_cutmix.astype(jnp.float32)
    rows = _span(draw.center[0], size, height)
    columns = _span(draw.center[1], size, width)
    return rows[:, None] & columns[None, :]


def _span(center: jax.Array, size: jax.Array, length: int) -> jax.Array:
    """Returns bool [length]: the pixels of an interval of `size * length` around a center."""
    middle = jnp.floor(center * length).astype(jnp.int32)
    cut = jnp.floor(size * length).astype(jnp.int32)
    position = lax.iota(jnp.int32, length)
    start = middle - cut // 2
    return (position >= start) & (position < start + cut)
