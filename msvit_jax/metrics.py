"""Metrics as sums that add up over batches, devices and processes, and figures of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msvit_jax.models.output import GateOutput, Output

DIGIT_SHARE = 0.05  # share of content pixels from which on a region has content


@struct.dataclass
class GateSums:
    """Sums over images of a gate's decisions.

    Attributes:
      coarse: [R], number of images in which the region stayed coarse.
      probability: [R], sum of the noise-free probabilities of staying coarse.
      content: Number of regions of which `DIGIT_SHARE` or more is content, by the segmentation
        mask.
      content_fine: Number of regions with content that are fine.
      plain: Number of all other regions.
      plain_coarse: Number of regions without content that are coarse.
    """

    coarse: Any
    probability: Any
    content: Any
    content_fine: Any
    plain: Any
    plain_coarse: Any


@struct.dataclass
class PixelSums:
    """Sums over pixels that have a class.

    Attributes:
      count: Number of the pixels.
      right: Number of those that were given their class.
    """

    count: Any
    right: Any


@struct.dataclass
class Sums:
    """Sums of metrics over examples.

    Attributes:
      count: Number of examples.
      loss: Sum of the task losses, each times its weight: 1, or for segmentation its pixels.
      top1: Number of examples whose label came first; None for segmentation.
      top5: Number of examples whose label was among the first five; None for segmentation.
      tokens: [N + 1], number of images by active patch tokens: a histogram, so that means,
        percentiles and costs are exact.
      overflow: Number of examples without an answer, because their tokens did not fit in the
        layout; loss, top1 and top5 leave them out.
      gate: Sums of the gate's decisions; None for models without a gate.
      exit_top1: [stages], number of examples whose label came first at each exit of a cascade.
      pixels: Sums over pixels, for segmentation; None otherwise.
    """

    count: Any
    loss: Any
    top1: Any
    top5: Any
    tokens: Any
    overflow: Any
    gate: GateSums | None = None
    exit_top1: Any = None
    pixels: PixelSums | None = None

    def __add__(self, other: "Sums") -> "Sums":
        """Adds two disjoint sets of examples."""
        return jax.tree.map(lambda a, b: a + b, self, other)


def batch_sums(
    output: Output,
    labels: Array | None,
    loss: Array,
    *,
    max_tokens: int,
    weights: Array | None = None,
    valid: Array | None = None,
    mask: Array | None = None,
    pixels: PixelSums | None = None,
) -> Sums:
    """Computes sums over one batch; runs under jit.

    Args:
      output: Output of the model for the batch.
      labels: [B] int32 labels; None for segmentation.
      loss: [B] float32, loss of the task.
      max_tokens: Number of patch tokens of an image on the fine grid.
      weights: [B] float32, weight of each loss; None for 1.
      valid: [B] bool, False for padding, which is not counted.
      mask: [B, H, W], segmentation mask, 0 where there is no content.
      pixels: Sums over pixels, for segmentation.
    """
    weight = jnp.ones(loss.shape, jnp.float32) if valid is None else valid.astype(jnp.float32)
    answered = jnp.where(output.answered, weight, 0.0)
    weighed = loss if weights is None else loss * weights
    rank = None if labels is None else _rank(output.logits, labels)
    histogram = jnp.zeros(max_tokens + 1, jnp.float32).at[output.tokens].add(weight)
    return Sums(
        count=weight.sum(),
        loss=jnp.sum(jnp.where(answered > 0, weighed, 0.0)),
        top1=None if rank is None else jnp.sum(jnp.where(rank < 1, answered, 0.0)),
        top5=None if rank is None else jnp.sum(jnp.where(rank < 5, answered, 0.0)),
        tokens=histogram,
        overflow=jnp.sum(weight - answered),
        gate=None if output.gate is None else _gate_sums(output.gate, weight, mask),
        exit_top1=None
        if output.exit_logits is None or labels is None
        else _exit_top1(output.exit_logits, labels, answered),
        pixels=pixels,
    )


def _rank(logits: Array, labels: Array) -> Array:
    """Counts classes before the label: [B, C], [B] -> [B]; ties and NaN count against it."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    return jnp.sum(~(logits < own), axis=1) - 1


def _exit_top1(exit_logits: Array, labels: Array, weight: Array) -> Array:
    """Counts examples whose label comes first at each exit: [B, stages, C] -> [stages]."""
    return jnp.stack(
        [
            jnp.sum(jnp.where(_rank(exit_logits[:, stage], labels) < 1, weight, 0.0))
            for stage in range(exit_logits.shape[1])
        ]
    )


def _gate_sums(gate: GateOutput, weight: Array, mask: Array | None) -> GateSums:
    coarse = (jax.lax.stop_gradient(gate.coarse) > 0.5).astype(jnp.float32)
    one = weight[:, None]
    if mask is None:
        content = plain = jnp.zeros_like(coarse)
    else:
        content = (_content_share(mask, coarse.shape[1]) >= DIGIT_SHARE).astype(jnp.float32)
        plain = 1 - content
    return GateSums(
        coarse=jnp.sum(one * coarse, axis=0),
        probability=jnp.sum(one * jax.nn.sigmoid(gate.logits), axis=0),
        content=jnp.sum(one * content),
        content_fine=jnp.sum(one * content * (1 - coarse)),
        plain=jnp.sum(one * plain),
        plain_coarse=jnp.sum(one * plain * coarse),
    )


def _content_share(mask: Array, regions: int) -> Array:
    """Computes the share of each region's pixels with content: [B, H, W] mask -> [B, R]."""
    batch, height, width = mask.shape
    size = round((height * width / regions) ** 0.5)
    squares = (mask > 0).reshape(batch, height // size, size, width // size, size)
    return squares.mean(axis=(2, 4), dtype=jnp.float32).reshape(batch, regions)


def to_host(sums: Sums) -> Sums:
    """Fetches sums as float64, in which counts of any data set add up exactly."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))


def summarize(
    sums: Sums, macs: np.ndarray | None = None, layer_tokens: np.ndarray | None = None
) -> dict[str, Any]:
    """Computes figures for people and logs.

    Args:
      sums: Sums on the CPU, from `to_host`.
      macs: [N + 1], multiply-accumulates of an image by its number of active patch tokens.
      layer_tokens: [depth, N + 1], patch tokens that enter each layer's MLP, by the image's number
        of active patch tokens.

    Returns:
      Dict with examples, top1 and top5 (for segmentation pixel_accuracy) in percent, loss,
      tokens_mean / p5 / p95 / variance; overflow, the share of examples without an answer, if there
      are any; with `macs` gmacs_mean, the mean over images; with `layer_tokens` layer_tokens_mean,
      the mean over images; for a cascade exits_top1, a list; and the gate's figures
      (`gate_figures`).
    """
    count, images = float(sums.count), np.asarray(sums.tokens)
    grid = np.arange(len(images))
    mean = float(images @ grid / count)
    answered, pixels = max(count - float(sums.overflow), 1), sums.pixels
    figures: dict[str, Any] = {
        "examples": round(count),
        **_accuracies(sums, answered),
        "loss": float(sums.loss) / (answered if pixels is None else max(float(pixels.count), 1)),
        "tokens_mean": mean,
        "tokens_p5": percentile(images, 5),
        "tokens_p95": percentile(images, 95),
        "tokens_variance": float(images @ (grid - mean) ** 2 / count),
    }
    if sums.overflow:
        figures["overflow"] = float(sums.overflow) / count
    if macs is not None:
        figures["gmacs_mean"] = float(images @ macs / count / 1e9)
    if layer_tokens is not None:
        figures["layer_tokens_mean"] = (layer_tokens @ images / count).tolist()
    if sums.exit_top1 is not None:
        figures["exits_top1"] = (100 * np.asarray(sums.exit_top1) / answered).tolist()
    if sums.gate is not None:
        figures.update(gate_figures(sums.gate, count))
    return figures


def _accuracies(sums: Sums, answered: float) -> dict[str, float]:
    if sums.pixels is not None:
        return {"pixel_accuracy": accuracy(sums)}
    return {
        "top1": 100 * float(sums.top1) / answered,
        "top5": 100 * float(sums.top5) / answered,
    }


def accuracy(sums: Sums) -> float:
    """Returns the share of examples, or of pixels, that were given their class, in percent."""
    if sums.pixels is not None:
        return 100 * float(sums.pixels.right) / max(float(sums.pixels.count), 1)
    return 100 * float(sums.top1) / max(float(sums.count - sums.overflow), 1)


def percentile(histogram: np.ndarray, percent: float) -> float:
    """Finds the smallest value that at least `percent` of the examples do not exceed.

    Args:
      histogram: [N + 1], number of examples by value 0..N.
      percent: Percentage, 0 to 100.
    """
    below = np.cumsum(histogram)
    return float(np.searchsorted(below, percent / 100 * below[-1]))


def gate_figures(gate: GateSums, count: float) -> dict[str, float]:
    """Describes a gate's decisions, and whether they depend on the image at all.

    * fine_share: share of regions that are fine.
    * decision_variance: variance over images of each position's decision, mean over positions; 0
      for a fixed pattern, at most 0.25.
    * agreement: share of positions in which two different images agree, mean over pairs; 1 for a
      fixed pattern.
    * content_fine, with a segmentation mask: share of the regions with content that is fine.
    * plain_coarse, with a segmentation mask: share of the other regions that is coarse.
    * fine_per_content, with a segmentation mask: fine regions divided by regions with content.
    """
    rate = gate.coarse / count
    fine = gate.content_fine + gate.plain - gate.plain_coarse
    figures = {
        "fine_share": float(1 - rate.mean()),
        "decision_variance": float((rate * (1 - rate)).mean()),
        "agreement": _agreement(gate.coarse, count),
    }
    if gate.content > 0:
        figures["content_fine"] = float(gate.content_fine / gate.content)
        figures["plain_coarse"] = float(gate.plain_coarse / max(gate.plain, 1))
        figures["fine_per_content"] = float(fine / gate.content)
    return figures


def _agreement(coarse: np.ndarray, count: float) -> float:
    if count < 2:
        return 1.0
    fine = count - coarse
    pairs = coarse * (coarse - 1) + fine * (fine - 1)
    return float(pairs.mean() / (count * (count - 1)))


def coarse_rates(sums: Sums) -> np.ndarray | None:
    """Share of images in which each region stayed coarse: [R]; None without a gate."""
    return None if sums.gate is None else np.asarray(sums.gate.coarse) / float(sums.count)
