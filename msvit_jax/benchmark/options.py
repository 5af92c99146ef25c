"""Options of a benchmark, and the models that it measures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn
from ml_collections import config_dict

from msvit_jax import config as configs
from msvit_jax.errors import UserError, check_choice, nearest
from msvit_jax.models import registry
from msvit_jax.models.registry import MIXED_SCALE, SEGMENTERS, model_options

DENSE = "dense"
REDUCED = "reduced"  # for a model without a gate whose layers reduce tokens
LAYOUTS = {
    "forward": ("slots", "budget", "rows"),
    "train": ("slots", "trimmed", "budget", "rows"),
}
# In training these layouts give the gate no gradient, so it must be frozen.
FROZEN_GATE = ("budget", "rows")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      model: Name of a model with a gate or with layers that reduce tokens; its plain model is the
        dense case.
      batches: Batch sizes.
      layouts: Layouts of the dynamic cases; only "reduced" for a model without a gate.
      train: Whether training steps are measured instead of forward passes.
      dtype: Type of the computation.
      tokens: Mean of the forced numbers of active patch tokens.
      spread: Standard deviation of these numbers.
      rounds: Number of measured rounds.
      overrides: Attributes of both models, as 'key=value'. The dense model takes those that it has,
        except those that reduce tokens.
      token_capacity: Bucket capacities for "budget" and "trimmed"; None: chosen from the token
        counts.
      rows: Number of rows for "rows"; None: chosen from the token counts.
      row_width: Tokens per row for "rows"; None: the cheapest.
      seed: Seed of token counts and decisions.

    Raises:
      UserError: A value is not possible.
    """

    model: str
    batches: tuple[int, ...] = (1, 32, 128)
    layouts: tuple[str, ...] = ("slots",)
    train: bool = False
    dtype: str = "float32"
    tokens: float = 128.0
    spread: float = 30.0
    rounds: int = 10
    overrides: tuple[str, ...] = ()
    token_capacity: tuple[int, ...] | None = None
    rows: int | None = None
    row_width: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        model_options(self.model)
        if self.model in registry.CASCADES:
            raise UserError(
                f"{self.model!r} is a cascade; python -m msvit_jax.benchmark.exits "
                f"--model={self.model} measures it."
            )
        if not self.gated and not build(self).reductions:
            raise UserError(
                f"{self.model!r} is dense: nothing to compare. Give a model with a gate or with "
                "merging (msvit_..., mergence_...), or --set=reducer=mergence."
            )
        if self.gated and self.dense == self.model:
            raise UserError(
                f"{self.model!r} with this encoder has no dense model to be compared with; give a "
                "name that has one, such as msvit_seg_vit_small_mask, and sizes by --set=."
            )
        known = LAYOUTS[self.what] if self.gated else (REDUCED,)
        for layout in self.layouts:
            if layout not in known:
                raise UserError(
                    f"Unknown layout {layout!r} of {self.what}; choose one of {', '.join(known)}."
                    f"{nearest(layout, known)}"
                )
        check_choice("dtype", self.dtype, DTYPES)
        if not self.batches or min(self.batches) < 1 or self.rounds < 1:
            raise UserError("batch and rounds must be 1 or more.")

    @property
    def what(self) -> str:
        """What is measured: 'forward' or 'train'."""
        return "train" if self.train else "forward"

    @property
    def dense(self) -> str:
        """Name of the dense model."""
        return registry.dense_model(self.model)

    @property
    def gated(self) -> bool:
        """Whether the model has a gate, and therefore layouts."""
        return mixed_scale(self.model, self.overrides)


def mixed_scale(model: str, overrides: Sequence[str]) -> bool:
    """Tells whether a model, with attributes as 'key=value', has a gate."""
    given = dict(map(configs.split_override, overrides))
    encoder = given.get("encoder", SEGMENTERS.get(model, model))
    return encoder in MIXED_SCALE


def make_config(
    options: Options, attributes: Mapping[str, Any] | None = None, *, dense: bool = False
) -> config_dict.ConfigDict:
    """The training config of a case; forward passes use its model as well.

    Args:
      options: Options of the benchmark.
      attributes: Model attributes of the layout.
      dense: Whether the config is for the dense case.
    """
    config = configs.base()
    config.model = {"name": options.dense if dense else options.model}
    taken = registry.dense_options(options.model) if dense else None
    config.dtype = options.dtype
    for key, value in map(configs.split_override, options.overrides):
        if taken is None or key in taken:
            configs.set_key(config, f"model.{key}", value)
    attributes = attributes or {}
    config.model.update(attributes)
    usual_size, usual_classes = 224, 1000
    if config.model.name in SEGMENTERS:
        usual = registry.create_model(config.model.name)
        usual_size, usual_classes = usual.image_size, usual.num_classes
        config.data.target = "segmentation_mask"
    config.data.image_size = config.model.get("image_size", usual_size)
    learned = config.model.get("gate", "mlp") == "mlp"
    if learned and attributes.get("layout") in FROZEN_GATE:
        config.optimizer.freeze = ("gate_mlp/",)
    elif options.gated and not dense:
        config.loss.gate.kind = "gbas"
    return configs.resolve(config, config.model.get("num_classes", usual_classes))


def build(
    options: Options, attributes: Mapping[str, Any] | None = None, *, dense: bool = False
) -> nn.Module:
    """Builds the model of a case; `attributes` are those of its layout."""
    return configs.build_model(make_config(options, attributes, dense=dense))
