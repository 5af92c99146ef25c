"""Variants of a config to compare: its dense model, and layouts of given sizes."""

import dataclasses
import statistics
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from msvit_jax import config as configs
from msvit_jax.errors import UserError, nearest
from msvit_jax.models import registry
from msvit_jax.models.interface import ImageModel
from msvit_jax.models.layout import LAYOUTS
from msvit_jax.tokens import packing
from msvit_jax.train.capacity_schedule import CapacitySchedule, StepCapacity

DENSE = "dense"
LADDER = "ladder"
REDUCED = "reduced"
CASCADE = "cascade"
ALTERNATIVES = "alternatives"
_SCHEDULED = ("trimmed", ALTERNATIVES)  # two kinds of steps of one run
KNOWN = (DENSE, REDUCED, CASCADE, *LAYOUTS, ALTERNATIVES, LADDER)
_STEPS = 8  # most bucket capacities of the variant "ladder"
_TILE = 128  # lanes of a TPU's registers
_SIZES = ("layout", "token_capacity", "rows", "row_width", "row_groups")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of tokens that the layouts are sized for.

    Attributes:
      tokens: Mean number of active patch tokens of an image.
      spread: Standard deviation of this number, for "rows" and "ladder"; other layouts give every
        image the mean.
      row_width: Tokens per row, prefix included; None: the smallest multiple of a TPU tile (128)
        that holds any image.
    """

    tokens: int = 128
    spread: float = 30.0
    row_width: int | None = None


@dataclasses.dataclass(frozen=True)
class Variant:
    """A config to compile.

    Attributes:
      name: One of `KNOWN`.
      tokens: Description of the token capacities, for display.
      config: The config.
      capacity: Capacity of the training step, if a schedule determines it; else None.
    """

    name: str
    tokens: str
    config: config_dict.ConfigDict
    capacity: StepCapacity | None = None


def default_names(config: config_dict.ConfigDict) -> list[str]:
    """Names of the default variants: dense, and what the config describes."""
    model = configs.build_model(config)
    if model.is_cascade:
        return [DENSE, CASCADE]
    if not model.has_gate:
        return [DENSE, REDUCED] if model.reductions else [DENSE]
    return [DENSE, config.model.get("layout", "slots")]


def variant(
    config: config_dict.ConfigDict, name: str, *, batch_size: int, chips: int, sizes: Sizes
) -> Variant:
    """Returns a config's variant by name; the layout that the config itself has is left unchanged.

    Args:
      config: Resolved config.
      name: 'dense' (the plain model), 'reduced' (a model without a gate that reduces tokens),
        'cascade' (all exits of one), one of `LAYOUTS`, 'ladder' (several bucket capacities), or
        'alternatives' (the training step of the trimmed layout that computes what the gate learns
        from; 'trimmed' is one of the other steps).
      batch_size: Global batch size.
      chips: Number of chips that the batch is spread over.
      sizes: Numbers of tokens to size the layouts for.

    Raises:
      UserError: The name is unknown, or the model has no layouts.
    """
    if name not in KNOWN:
        raise UserError(
            f"Unknown layout {name!r}.{nearest(name, KNOWN)} The layouts are {', '.join(KNOWN)}."
        )
    model = configs.build_model(config)
    if name == CASCADE and model.is_cascade:
        return Variant(name, " and ".join(map(str, model.exit_tokens)), config)
    if name == REDUCED and not model.has_gate and model.reductions:
        return Variant(name, "layer by layer fewer", config)
    if not model.has_gate and name != DENSE:
        raise UserError(
            f"{config.model.name} has no gate and so no layout {name!r}; give a config of a "
            "mixed-scale model, e.g. configs/imagenet/msvit_deit_small.py, or "
            f"--layouts={','.join(default_names(config))}."
        )
    made = config.copy_and_resolve_references()
    with made.unlocked():
        if name == DENSE:
            return Variant(name, _to_dense(made), made)
        scheduled = name in _SCHEDULED and "token_capacity" not in config.model
        if name == config.model.get("layout", "slots") and not scheduled:
            return Variant(name, "as configured", made)
        _forget_layout(made)
        made.model.layout = {LADDER: "budget", ALTERNATIVES: "trimmed"}.get(name, name)
        if name != "slots":
            made.model.row_groups = chips
        described = _size(made, name, batch_size // chips, chips, sizes)
    if name in _SCHEDULED:
        return _scheduled(made, name, sizes)
    return Variant(name, described, made if name == "slots" else with_frozen_gate(made))


def _scheduled(config: config_dict.ConfigDict, name: str, sizes: Sizes) -> Variant:
    """One of the two kinds of training steps of a run, with settled capacities."""
    regions = configs.build_model(config).num_regions
    schedule = CapacitySchedule.start(config.capacity, regions=regions, images=1)
    schedule.capacities = (sizes.tokens,)
    every = config.capacity.alternatives_every
    capacity = schedule.at(0 if name == ALTERNATIVES else 1)
    how_often = "one step" if name == ALTERNATIVES else f"{every - 1} steps"
    return Variant(name, f"{capacity.capacities[0]} each, {how_often} of {every}", config, capacity)


def with_frozen_gate(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """Returns a copy that freezes a learned gate, which "budget" and "rows" cannot train."""
    made = config.copy_and_resolve_references()
    learned = configs.build_model(config).gate == "mlp"
    if learned and "gate" not in made.optimizer.freeze:
        with made.unlocked():
            made.optimizer.freeze = (*made.optimizer.freeze, "gate")
    return made


def _to_dense(config: config_dict.ConfigDict) -> str:
    """Turns a config into that of the dense model; returns a description of its tokens."""
    model = configs.build_model(config)
    taken = {"name"} | registry.dense_options(config.model.name)
    config.model.name = registry.dense_model(config.model.name)
    for key in set(config.model) - taken:
        del config.model[key]
    side, tokens = model.image_shape[0], model.patch_grid[0]
    if model.is_cascade and side % tokens == 0:
        config.model.patch_size = side // tokens  # the last stage's tokens
    return "whole grid"


def _size(config: config_dict.ConfigDict, name: str, images: int, chips: int, sizes: Sizes) -> str:
    """Sets a layout's sizes for `images` images per chip; returns a description of them."""
    options = config.model
    if name == "slots":
        return "whole grid"
    if name in ("budget", *_SCHEDULED):
        options.token_capacity = sizes.tokens
        return f"{sizes.tokens} each"
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        _forget_layout(plain)
    model = configs.build_model(plain)
    counts = draw_counts(model, images, sizes)
    if name == LADDER:
        steps = max(s for s in range(1, _STEPS + 1) if images % s == 0)
        options.token_capacity = tuple(int(c) for c in counts.reshape(steps, -1).max(axis=1))
        return "/".join(map(str, options.token_capacity))
    prefix, num_slots = model.backbone.prefix_length, model.max_tokens
    options.row_width = sizes.row_width or -(-(num_slots + prefix) // _TILE) * _TILE
    rows = rows_needed(counts + prefix, options.row_width)
    options.rows = rows * chips
    return f"{rows} x {options.row_width} a chip"


def _forget_layout(config: config_dict.ConfigDict) -> None:
    for key in set(config.model) & set(_SIZES):
        del config.model[key]


def draw_counts(model: ImageModel, images: int, sizes: Sizes) -> np.ndarray:
    """Active patch tokens of a batch of images, in ascending order: normal quantiles."""
    regions = model.num_regions
    normal = statistics.NormalDist(sizes.tokens, max(sizes.spread, 1e-9))
    drawn = [normal.inv_cdf((i + 0.5) / images) for i in range(images)]
    fine = np.clip(np.round((np.asarray(drawn) - regions) / 3), 0, regions)
    return (regions + 3 * fine).astype(np.int32)


def rows_needed(lengths: Sequence[int] | np.ndarray, width: int) -> int:
    """Number of rows of a given width that images of given lengths are packed into."""
    count = len(lengths)
    runs = packing.rows(jnp.asarray(lengths)[None], count, width)
    return int(jnp.where(runs.within_capacity, runs.start // width, 0).max()) + 1
