"""What a model is trained and judged for: classes of images, or classes of their pixels.

Everything that depends on the task is here; the step, the loop and the evaluation ask `task_of`.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from msvit_jax import losses, metrics
from msvit_jax.data import mix
from msvit_jax.errors import UserError
from msvit_jax.models.interface import SEGMENTATION, ImageModel
from msvit_jax.models.output import Output
from msvit_jax.segmentation import IGNORED, upsample_logits

Batch: TypeAlias = Mapping[str, Array]


@struct.dataclass
class Judged:
    """How good the answers to a batch are.

    Attributes:
      losses: [B] float32, loss of each example.
      weights: [B] float32, weight of each loss in the mean, 0 for examples without an answer; None
        for equal weights.
      pixels: Sums over pixels, for segmentation.
    """

    losses: Array
    weights: Array | None = None
    pixels: metrics.PixelSums | None = None

    def mean(self) -> Array:
        """Averages the losses; 0 if all weights are."""
        if self.weights is None:
            return self.losses.mean()
        total = jnp.where(self.weights > 0, self.losses * self.weights, 0.0).sum()
        return total / jnp.maximum(self.weights.sum(), 1.0)


class Task(Protocol):
    """What the step, the loop and the evaluation ask a task.

    Attributes:
      target: What the data have to give, a value of `data.target`.
      best_by: Figure of an evaluation by which the best checkpoint is chosen, in percent.
    """

    target: str
    best_by: str

    def targets(
        self, key: Array, images: Array, batch: Batch, classes: int, config: Any
    ) -> tuple[Array, Array]:
        """Returns a training batch's images, mixed where the config says so, and their targets."""

    def judge(
        self,
        output: Output,
        targets: Array,
        size: tuple[int, int],
        model: ImageModel,
        *,
        smoothing: float = 0.0,
        valid: Array | None = None,
    ) -> Judged:
        """Compares answers with targets.

        Args:
          output: The model's output for images of `size`.
          targets: Targets, from `targets` or `plain_targets`.
          size: (H, W) of the images in px.
          model: The model.
          smoothing: Label smoothing that is not in the targets.
          valid: [B] bool, False for padding.
        """

    def plain_targets(self, batch: Batch, classes: int) -> Array:
        """Returns the targets of an evaluation's batch."""

    def labels(self, batch: Batch) -> Array | None:
        """Returns the labels [B] that ranks are counted by; None if there are none."""

    def content(self, batch: Batch) -> Array | None:
        """Returns the mask of content [B, H, W], 0 where there is none; None without masks."""


class Classification:
    """One class for each image."""

    target = "label"
    best_by = "top1"

    def targets(
        self, key: Array, images: Array, batch: Batch, classes: int, config: Any
    ) -> tuple[Array, Array]:
        """Returns mixed images and soft targets [B, classes]."""
        soft = losses.smooth(batch["label"], classes, config.loss.label_smoothing)
        data = config.data
        if not (data.mixup or data.cutmix):
            return images, soft
        mixed = mix.mix(
            key,
            images,
            soft,
            mixup=data.mixup,
            cutmix=data.cutmix,
            prob=data.mix_prob,
            switch_prob=data.mix_switch_prob,
        )
        return mixed.images, mixed.targets

    def plain_targets(self, batch: Batch, classes: int) -> Array:
        """Returns one-hot targets [B, classes]."""
        return losses.smooth(batch["label"], classes, 0.0)

    def judge(
        self,
        output: Output,
        targets: Array,
        size: tuple[int, int],
        model: ImageModel,
        *,
        smoothing: float = 0.0,
        valid: Array | None = None,
    ) -> Judged:
        """Computes the cross-entropy of every image; smoothing is in its targets already."""
        fits = output.within_capacity
        weights = None if fits is None else fits.astype(jnp.float32)
        return Judged(losses.cross_entropy(output.logits, targets), weights)

    def labels(self, batch: Batch) -> Array | None:
        """Returns the labels."""
        return batch["label"]

    def content(self, batch: Batch) -> Array | None:
        """Returns the masks, if the data set has any."""
        return batch.get("segmentation_mask")


class Segmentation:
    """A class for each pixel; pixels without one count nowhere."""

    target = "segmentation_mask"
    best_by = "miou"

    def targets(
        self, key: Array, images: Array, batch: Batch, classes: int, config: Any
    ) -> tuple[Array, Array]:
        """Returns the images and the classes of their pixels, [B, H, W] uint8."""
        return images, batch["segmentation_mask"]

    def plain_targets(self, batch: Batch, classes: int) -> Array:
        """Returns the classes of the pixels, [B, H, W] uint8."""
        return batch["segmentation_mask"]

    def judge(
        self,
        output: Output,
        targets: Array,
        size: tuple[int, int],
        model: ImageModel,
        *,
        smoothing: float = 0.0,
        valid: Array | None = None,
    ) -> Judged:
        """Averages the cross-entropy of each image's pixels, at the size of the image.

        An image weighs as much as it has pixels with a class, so that the mean is one over pixels.
        """
        logits = output.logits
        fits = output.answered if valid is None else output.answered & valid
        # NaN of images without an answer would pass the products of upsampling's gradient.
        logits = jnp.where(fits[:, None, None, None], logits, jnp.zeros_like(logits))
        logits = upsample_logits(logits, size, model.patch_size)
        counted = (targets != IGNORED) & fits[:, None, None]
        classes = jnp.where(counted, targets, 0).astype(jnp.int32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
        if smoothing:
            even = -jax.nn.log_softmax(logits).mean(axis=-1)
            loss = (1 - smoothing) * loss + smoothing * even
        weights = counted.sum(axis=(1, 2)).astype(jnp.float32)
        of_image = jnp.where(counted, loss, 0.0).sum(axis=(1, 2)) / jnp.maximum(weights, 1.0)
        right = (counted & (logits.argmax(axis=-1) == classes)).sum().astype(jnp.float32)
        return Judged(of_image, weights, metrics.PixelSums(weights.sum(), right))

    def labels(self, batch: Batch) -> Array | None:
        """Returns nothing: images have no labels."""
        return None

    def content(self, batch: Batch) -> Array | None:
        """Returns the masks; what is ignored is no content."""
        mask = batch["segmentation_mask"]
        return jnp.where(mask == IGNORED, jnp.zeros_like(mask), mask)


def task_of(model: ImageModel) -> Task:
    """Returns what a model is for."""
    return Segmentation() if model.task == SEGMENTATION else Classification()


def check_target(model: ImageModel, data_config: Any) -> None:
    """Checks that the data give what the model learns.

    Raises:
      UserError: They give something else; the message says which key to set.
    """
    wanted = task_of(model).target
    if data_config.target != wanted:
        raise UserError(
            f"The model does {model.task}, and data.target={data_config.target}; set "
            f"data.target={wanted}, or choose another model."
        )
