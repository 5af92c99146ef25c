"""What a model returns."""

from flax import struct
from jax import Array


@struct.dataclass
class GateOutput:
    """What a gate said of each region; regions are row-major.

    Attributes:
      logits: [B, R] float32, noise-free; the sigmoid is the probability of staying coarse.
      coarse: [B, R] float32 decisions, 1 = one coarse token, 0 = four fine ones; in training
        straight-through, so that gradient reaches the logits.
    """

    logits: Array
    coarse: Array


@struct.dataclass
class Output:
    """What every model of the library returns.

    Attributes:
      logits: [B, classes] float32; NaN for an image that does not fit.
      tokens: [B] int32, active patch tokens of each image (class and register tokens not counted).
      gate: decisions of a mixed-scale model.
      distilled_logits: [B, classes] float32 of the distillation head, in training only.
      fits: [B] bool, whether an image's tokens found room in a layout with less places than the
        grid; None in the slots layout, where all do.
      merged: after each reduction of a model that reduces tokens, [B, N] int32: the place in the
        shortened sequence, prefix included, of the token that each patch of the grid (each slot of
        a mixed-scale model) now is part of; -1 if it was dropped. None in packed layouts.
      exits: [B, stages, classes] float32, logits of every exit of a cascade; `logits` are the last.
    """

    logits: Array
    tokens: Array
    gate: GateOutput | None = None
    distilled_logits: Array | None = None
    fits: Array | None = None
    merged: tuple[Array, ...] | None = None
    exits: Array | None = None
