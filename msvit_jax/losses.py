"""Losses of the task, of the gate, and of distillation.

The gate's losses are about the share of *fine* regions: x = 1 - P(coarse), the noise-free
probability that a region gets fine tokens. Formulas are from MSViT (Havtorn et al. 2023) and Batch
Shaping (Ehteshami Bejnordi et al. 2020); where the papers leave a choice open, it is ours and
marked so.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax import Array, lax
from jax.scipy.special import betainc, logit
from jax.scipy.stats import norm

from msvit_jax.tokens.grid import center_distance
from msvit_jax.typed import AnyArray, Float, Int

if TYPE_CHECKING:
    from msvit_jax.models.output import GateOutput


_EDGE = 1e-3  # probabilities are clipped to [edge, 1 - edge] before the Beta's CDF


def smooth(labels: Int[AnyArray, "B"], classes: int, amount: float) -> Float[Array, "B classes"]:
    """Makes one-hot targets [B, classes], with `amount` of them spread evenly over all classes.

    NaN for a label outside the classes, because a loss of zero would look like success.
    """
    targets = jax.nn.one_hot(labels, classes) * (1 - amount) + amount / classes
    return jnp.where(((labels >= 0) & (labels < classes))[:, None], targets, jnp.nan)


def cross_entropy(
    logits: Float[Array, "*B C"], targets: Float[Array, "*B C"]
) -> Float[Array, "*B"]:
    """Computes cross-entropy against soft targets, in float32: [B, C], [B, C] -> [B]."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets.astype(jnp.float32))


def distillation(
    student: Float[Array, "*B C"],
    teacher: Float[Array, "*B C"],
    *,
    temperature: float = 1.0,
    kind: str = "soft",
) -> Float[Array, "*B"]:
    """Computes the distance from a teacher's predictions: [B, C], [B, C] -> [B].

    "soft": temperature**2 * KL(teacher || student) at that temperature (Hinton et al. 2015);
    "hard": cross-entropy with the teacher's label (DeiT, section 4). No gradient to the teacher.
    """
    teacher = lax.stop_gradient(teacher.astype(jnp.float32))
    student = student.astype(jnp.float32)
    if kind == "hard":
        return optax.softmax_cross_entropy_with_integer_labels(student, teacher.argmax(axis=-1))
    if kind != "soft":
        raise ValueError(f"distillation kind {kind!r} is neither 'soft' nor 'hard'.")
    log_student = jax.nn.log_softmax(student / temperature)
    log_teacher = jax.nn.log_softmax(teacher / temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
    return temperature**2 * divergence


def exits_loss(
    exit_logits: Float[Array, "B stages C"],
    targets: Float[Array, "B C"],
    *,
    distillation_weight: float = 0.0,
    temperature: float = 1.0,
) -> Float[Array, "B"]:
    """Sums all exits' losses, unweighted (DVT, section 3.1): [B, stages, C], [B, C] -> [B].

    With a weight, exits before the last also learn from the last one's predictions: (1 - weight) x
    labels + weight x `distillation` (our addition; common between the exits of multi-exit
    networks).
    """
    total, last = cross_entropy(exit_logits[:, -1], targets), exit_logits[:, -1]
    for stage in range(exit_logits.shape[1] - 1):
        loss = cross_entropy(exit_logits[:, stage], targets)
        if distillation_weight:
            distance = distillation(exit_logits[:, stage], last, temperature=temperature)
            loss = (1 - distillation_weight) * loss + distillation_weight * distance
        total = total + loss
    return total


def relaxed_bernoulli_cdf(
    logits: Float[Array, "*N"], probability: Float[Array, "*#N"], temperature: Float[Array, "*#N"]
) -> Float[Array, "*N"]:
    """Computes the relaxed Bernoulli (binary concrete) distribution's CDF at x = sigmoid(logits).

    P(x > 1/2) = probability. A function of x would have to clip x away from 0 and 1, where it would
    then have no gradient; as a function of the logits it is sigmoid(temperature * logits -
    logit(probability)).

    All arguments broadcast (equal ranks).
    """
    return jax.nn.sigmoid(temperature * logits - logit(probability))


def beta_cdf(x: Float[Array, "*N"], a: float, b: float) -> Float[Array, "*N"]:
    """Computes the Beta distribution's CDF; `x` is clipped to [1e-3, 1 - 1e-3]."""
    x = jnp.clip(x, _EDGE, 1 - _EDGE)
    return betainc(jnp.full_like(x, a), jnp.full_like(x, b), x)


def normal_cdf(x: Float[Array, "*N"], mean: float, std: float) -> Float[Array, "*N"]:
    """Computes the normal distribution's CDF."""
    return norm.cdf(x, jnp.asarray(mean, x.dtype), jnp.asarray(std, x.dtype))


def empirical_cdf_distance(cdf_of_sorted: Float[Array, "N *R"]) -> Float[Array, "*R"]:
    """Computes batch shaping's loss mean_k (k / (N + 1) - F(x_(k)))^2 along axis 0.

    Args:
      cdf_of_sorted: [N, ...], prior's CDF at the samples in ascending order.

    Returns:
      Loss [...]. At a perfect fit about 1 / (6 N) remains.
    """
    count = cdf_of_sorted.shape[0]
    rank = jnp.arange(1, count + 1, dtype=cdf_of_sorted.dtype) / (count + 1)
    rank = rank.reshape((count,) + (1,) * (cdf_of_sorted.ndim - 1))
    return ((rank - cdf_of_sorted) ** 2).mean(axis=0)


def global_batch(x: Array, axis_name: str | None) -> Array:
    """Gathers the rows of all devices, [B, ...], in pmap or shard_map; under jit returns `x`.

    Gradients agree with those of the whole batch after the customary mean over devices.
    """
    return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)


@struct.dataclass
class GateLossOutput:
    """Loss of the gate and its terms.

    Attributes:
      loss: Scalar to be weighted and added to the task's loss.
      terms: Scalars for the log, by name.
    """

    loss: Array
    terms: dict[str, Array]


class GateLoss(nn.Module):
    """Pulls a gate toward a share of fine regions.

    * "none": nothing.
    * "rate": (mean probability of fine - target)^2 over the whole batch.
    * "l0": the excess of the mean probability of fine over the target, 0 below it (a one-sided
      rate).
    * "bas": batch shaping of every position toward one fixed prior.
    * "gbas": generalized batch shaping: every position has its own learned relaxed-Bernoulli prior,
      whose means are themselves shaped toward Normal(target, sigma).

    Batch shaping sees the whole batch's order statistics: under jit whatever the sharding, under
    pmap or shard_map with `axis_name`.

    Attributes:
      kind: Kind of the loss, one of the above.
      target: Target share of fine regions (g* of the hyperprior).
      sigma: Standard deviation of the hyperprior, by which positions may differ ("gbas").
      prior: Prior of the decisions, "relaxed_bernoulli" or "beta" ("bas").
      temperature: Temperature of the relaxed Bernoulli prior, its initial value for "gbas" (value:
        unverified recollection).
      beta: Parameters of the Beta prior ("bas"); their mean replaces `target`.
      clip: Distance from 0 and 1 within which probabilities get no gradient from the relaxed
        Bernoulli prior: 1e-3 as in the published batch shaping, 0 (our choice) for gradient
        everywhere.
      start: Initialization of the means ("gbas"): "center", falling with the distance from the
        image's center around `target`, or "uniform" at `target`.
      region_grid: (rows, columns) of regions, for "gbas".
    """

    kind: str = "gbas"
    target: float = 0.25
    sigma: float = 0.1
    prior: str = "relaxed_bernoulli"
    temperature: float = 0.3
    beta: tuple[float, float] = (0.6, 0.4)
    clip: float = 0.0
    start: str = "center"
    region_grid: tuple[int, int] = (7, 7)

    @nn.compact
    def __call__(self, gate: "GateOutput", *, axis_name: str | None = None) -> GateLossOutput:
        """Computes the loss of the decisions on one batch; gate.logits is [B, R]."""
        if not 0 < self.target < 1:
            raise ValueError(f"The gate's target share is {self.target}; it lies between 0 and 1.")
        logits = global_batch(-gate.logits.astype(jnp.float32), axis_name)
        fine = jax.nn.sigmoid(logits)
        terms = {"fine_probability": fine.mean()}
        if self.kind == "none":
            return GateLossOutput(jnp.zeros(()), terms)
        if self.kind == "rate":
            return GateLossOutput((fine.mean() - self.target) ** 2, terms)
        if self.kind == "l0":
            return GateLossOutput(jax.nn.relu(fine.mean() - self.target), terms)
        if self.kind == "bas":
            return GateLossOutput(self._batch_shaping(logits), terms)
        if self.kind == "gbas":
            return self._generalized(logits, terms)
        raise ValueError(f"gate loss {self.kind!r} is not one of none, rate, l0, bas, gbas.")

    def _sorted(self, logits: Array) -> Array:
        """Sorts each position's logits of fine in ascending order, within the clip."""
        if self.clip:
            edge = float(np.log((1 - self.clip) / self.clip))
            logits = jnp.clip(logits, -edge, edge)
        return jnp.sort(logits, axis=0)

    def _batch_shaping(self, logits: Array) -> Array:
        if self.prior == "beta":
            x = jnp.sort(jax.nn.sigmoid(logits), axis=0)
            return empirical_cdf_distance(beta_cdf(x, *self.beta)).mean()
        if self.prior != "relaxed_bernoulli":
            raise ValueError(f"prior {self.prior!r} is neither 'relaxed_bernoulli' nor 'beta'.")
        x = self._sorted(logits)
        mean = jnp.full_like(x, self.target)
        cdf = relaxed_bernoulli_cdf(x, mean, jnp.full_like(x, self.temperature))
        return empirical_cdf_distance(cdf).mean()

    def _generalized(self, logits: Array, terms: dict[str, Array]) -> GateLossOutput:
        if logits.shape[1] != self.region_grid[0] * self.region_grid[1]:
            raise ValueError(
                f"{logits.shape[1]} regions do not fit the priors' {self.region_grid}."
            )
        logit_mean = self.param("logit_mean", lambda _: logit(jnp.asarray(self._first_means())))
        log_temperature = self.param(
            "log_temperature", nn.initializers.constant(np.log(self.temperature)), logits.shape[1:]
        )
        mean = jax.nn.sigmoid(logit_mean)
        temperature = jnp.exp(log_temperature)
        cdf = relaxed_bernoulli_cdf(self._sorted(logits), mean[None], temperature[None])
        shaping = empirical_cdf_distance(cdf).mean()
        hyper = empirical_cdf_distance(normal_cdf(jnp.sort(mean), self.target, self.sigma))
        terms = terms | {"shaping": shaping, "hyperprior": hyper, "prior_mean": mean.mean()}
        return GateLossOutput(shaping + hyper, terms)

    def _first_means(self) -> np.ndarray:
        if self.start == "uniform":
            return np.full(self.region_grid[0] * self.region_grid[1], self.target, np.float32)
        if self.start != "center":
            raise ValueError(f"start={self.start!r} is neither 'center' nor 'uniform'.")
        nearness = 1 - center_distance(self.region_grid)
        if not nearness.any():  # a grid of corners only, 2 x 2: all equally near
            nearness = np.ones_like(nearness)
        means = self.target * nearness / nearness.mean()
        # Farther away the hyperprior's density, and with it its gradient, is practically zero.
        reach = 3.5 * self.sigma
        low, high = max(0.02, self.target - reach), min(0.98, self.target + reach)
        return np.clip(means, low, high).astype(np.float32)
