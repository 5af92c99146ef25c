"""Starts from other parameters: another run's, or those of a weights file.

Parameters are matched by name. A dense model's fit a mixed-scale one below `backbone/`, and every
stage of a cascade; position embeddings are resized to the model's grid, kernels of patch embeddings
to its patches; a head for other classes keeps its fresh parameters. The weights come from
`weights.read` for a file.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msvit_jax.errors import UserError, nearest
from msvit_jax.models.interface import ImageModel
from msvit_jax.tokens import grid
from msvit_jax.tree import flat_names, map_names

Flat = dict[str, np.ndarray]
Grid = tuple[int, int]  # rows and columns
HEADS = ("head/", "head_dist/", "decoder/head/", "decoder/class_embed", "decoder/mask_norm/")
# Layers on the pixels of square patches or regions, whose size may change.
PATCH_KERNELS = ("patch_embed/proj/kernel", "coarse_embed/proj/kernel", "gate_mlp/fc1/kernel")
_MOST_BEFORE = 2  # positions before those of the patches: class and distillation token
# Parts that may be missing in the source; they start fresh.
OWN_PARTS = ("gate", "coarse_embed", "scale_", "residual", "reuse_", "decoder/")


@dataclasses.dataclass(frozen=True)
class Report:
    """Lists what happened to each parameter.

    Attributes:
      matched: Names of parameters taken over as they are.
      resized: Position and patch embeddings that were resized, with old and new shape.
      widened: Layers that also see a cascade's reused features, with old and new shape.
      fresh: Parameters that keep their fresh values, with the reason.
      unused: Names in the source that are not in the model.
      notes: Further remarks: what was chosen, followed, or looks wrong.
    """

    matched: list[str]
    resized: list[str]
    widened: list[str]
    fresh: list[str]
    unused: list[str]
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        """Summarizes the report, one part per kind."""
        lines = [f"{len(self.matched)} parameters matched"]
        for title in ("resized", "widened", "fresh", "unused"):
            names: list[str] = getattr(self, title)
            if names:
                shown = ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "")
                lines.append(f"{title}: {shown}")
        return "; ".join([*lines, *self.notes])


def adapt_weights(
    weights: Mapping[str, np.ndarray],
    params: Any,
    *,
    pos_resize: str = "timm",
    source_grid: Grid | None = None,
    patch_grid: Grid | None = None,
) -> tuple[Flat, Report]:
    """Fits weights to a model's parameters.

    Args:
      weights: Arrays by name, as from `weights.read`.
      params: Tree of the model's parameters, arrays or shapes.
      pos_resize: Method that resizes position embeddings, one of `grid.RESIZINGS`; those of a gate
        are always resized by our own method.
      source_grid: (rows, columns) of the patches that the weights were trained with; None if that
        is not known, and then they are taken for a square, or for the model's if as many.
      patch_grid: (rows, columns) of the model's patches; None for a square.

    Returns:
      Arrays by the model's names, for those that are taken over, and a report on each parameter.

    Raises:
      UserError: Something other than a head has another shape or is missing; all are listed.
    """
    wanted = flat_names(params)
    weights = _for_stages(_below_backbone(weights, wanted), wanted)
    weights = _with_coarse_embedding(weights, wanted)
    taken: Flat = {}
    report = Report([], [], [], [], [n for n in weights if n not in wanted])
    misfits: list[str] = []
    for name, leaf in wanted.items():
        short = re.sub(r"^(backbone|stage_\d+)/", "", name)
        value = weights.get(name)
        grids = _grids(name, value, leaf, source_grid, patch_grid)
        if value is not None and grids is not None:
            report.resized.append(f"{name} {tuple(value.shape)} -> {tuple(leaf.shape)}")
            taken[name] = _resize(np.asarray(value, np.float32), *grids, pos_resize)
        elif value is not None and tuple(value.shape) == tuple(leaf.shape):
            report.matched.append(name)
            taken[name] = np.asarray(value, leaf.dtype)
        elif value is not None and short in PATCH_KERNELS and _squares(value, leaf):
            report.resized.append(f"{name} {tuple(value.shape)} -> {tuple(leaf.shape)}")
            kernel = grid.resize_kernel(np.asarray(value, np.float64), leaf.shape[0])
            taken[name] = kernel.astype(leaf.dtype)
        elif value is not None and _widenable(name, value, leaf):
            report.widened.append(f"{name} {tuple(value.shape)} -> {tuple(leaf.shape)}")
            taken[name] = _widen(name, np.asarray(value, leaf.dtype), tuple(leaf.shape))
        elif short.startswith(HEADS) and value is not None:
            axis = 0 if short.endswith("class_embed") else -1
            classes = f"{value.shape[axis]} classes in the source, {leaf.shape[axis]} here"
            report.fresh.append(f"{name} ({classes})")
        elif value is not None:
            misfits.append(f"{name}: {tuple(value.shape)} in the source, {tuple(leaf.shape)} here")
        elif short.startswith((*HEADS, *OWN_PARTS)):
            report.fresh.append(f"{name} (not in the source)")
        else:
            misfits.append(f"{name}: not in the source.{nearest(name, report.unused)}")
    if misfits or not taken:
        raise UserError(
            "The weights do not fit the model:\n  "
            + "\n  ".join(misfits)
            + "\nUnused in the source: "
            + (", ".join(report.unused[:20]) or "nothing")
        )
    return taken, report


def model_shapes(model: ImageModel) -> Any:
    """Returns the shapes of a model's parameters.

    Raises:
      UserError: The model's sizes do not fit together.
    """
    images = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    try:
        return jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    except ValueError as error:
        raise UserError(f"The model cannot be built: {error}") from error


def params_for(
    model: ImageModel,
    weights: Any,
    *,
    pos_resize: str = "timm",
    source_grid: Grid | None = None,
) -> tuple[Any, Report]:
    """Fits a tree or flat dict of weights, which must hold all of a model's parameters, to it.

    The other arguments are those of `adapt_weights`.

    Returns:
      Parameters of the model, and a report on each.

    Raises:
      UserError: Some are missing or have another shape.
    """
    shapes = model_shapes(model)
    taken, report = adapt_weights(
        flat_names(weights),
        shapes,
        pos_resize=pos_resize,
        source_grid=source_grid,
        patch_grid=model.patch_grid,
    )
    if report.fresh:
        heads = all(re.search(r"(^|/)head(_dist)?/", name) for name in report.fresh)
        remedy = "; without a head they give features alone (num_classes=0)." if heads else ""
        raise UserError(
            "The weights lack parameters of the model: " + ", ".join(report.fresh) + remedy
        )
    return map_names(lambda name, _: taken[name], shapes), report


def _below_backbone(weights: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Moves a plain model's names below 'backbone/' for a model that has one, or the reverse.

    What the model has beside its backbone, such as a gate or a decoder, keeps its name.
    """
    prefix = "backbone/"
    has, needs = (any(n.startswith(prefix) for n in names) for names in (weights, wanted))
    if needs and not has:
        beside = {name.split("/")[0] for name in wanted}
        return {
            name if name.split("/")[0] in beside else prefix + name: value
            for name, value in weights.items()
        }
    if has and not needs:
        return {name.removeprefix(prefix): value for name, value in weights.items()}
    return dict(weights)


def _for_stages(weights: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a plain model's weights to every stage of a cascade."""
    stages = sorted({name.split("/")[0] for name in wanted if name.startswith("stage_")})
    if not stages or any(name.startswith("stage_") for name in weights):
        return dict(weights)
    return {f"{stage}/{name}": value for stage in stages for name, value in weights.items()}


def _with_coarse_embedding(weights: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Gives MSViT's separate embedding of coarse patches the weights that equal the shared one.

    The patch embedding of the image pooled over 2x2 pixels is that of the whole image with each
    weight spread over the four pixels.
    """
    ours, theirs = "coarse_embed/proj/", "backbone/patch_embed/proj/"
    found = dict(weights)
    if ours + "kernel" in wanted and ours + "kernel" not in found and theirs + "kernel" in found:
        kernel = np.asarray(found[theirs + "kernel"])
        side = wanted[ours + "kernel"].shape[0] // grid.REGION
        if kernel.shape[0] != side:
            kernel = grid.resize_kernel(kernel.astype(np.float64), side)
        spread = np.repeat(np.repeat(kernel, grid.REGION, axis=0), grid.REGION, axis=1)
        found[ours + "kernel"] = (spread / grid.REGION**2).astype(np.float32)
        found[ours + "bias"] = np.asarray(found[theirs + "bias"])
    return found


def _squares(value: Any, leaf: Any) -> bool:
    """Tells whether two kernels [p, p, C, D] differ only in the size of their patches."""
    same = tuple(value.shape[2:]) == tuple(leaf.shape[2:])
    return same and all(len(x.shape) == 4 and x.shape[0] == x.shape[1] for x in (value, leaf))


def _widenable(name: str, value: Any, leaf: Any) -> bool:
    """Tells whether a later stage's layer is a plain one with more input channels (DVT, 3.2)."""
    grown = value.ndim == len(leaf.shape) and value.shape[0] < leaf.shape[0]
    later = re.match(r"stage_[1-9]\d*/blocks_\d+/(norm2/|mlp/fc1/kernel)", name)
    return bool(later) and grown and value.shape[1:] == tuple(leaf.shape[1:])


def _widen(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Makes the norm pass on the new channels, and the layer behind it ignore them at first."""
    start = 1 if name.endswith("norm2/scale") else 0
    wide = np.full(shape, start, value.dtype)
    wide[: len(value)] = value
    return wide


def _grids(
    name: str, value: Any, leaf: Any, source_grid: Grid | None, patch_grid: Grid | None
) -> tuple[Grid, Grid] | None:
    """Old and new grid of position embeddings that are to be resized, and can be; else None."""
    if value is None or not name.endswith("pos_embed"):
        return None
    if source_grid is None and tuple(value.shape) == tuple(leaf.shape):
        return None
    if len(value.shape) != len(leaf.shape) or value.shape[-1] != leaf.shape[-1]:
        return None
    if len(value.shape) == 3:  # of a gate, [rows, columns, D]
        source_grid, patch_grid = tuple(value.shape[:2]), tuple(leaf.shape[:2])
    counts = [math.prod(x.shape[:-1]) for x in (value, leaf)]
    old, new = _grid(counts[0], source_grid), _grid(counts[1], patch_grid)
    if old is None or new is None or old == new:
        return None
    same_prefix = counts[0] - math.prod(old) == counts[1] - math.prod(new)
    return (old, new) if same_prefix else None


def _grid(count: int, known: Grid | None) -> Grid | None:
    """The grid among `count` positions, behind 0, 1 or 2 others: the known one, or a square."""
    if known is not None and 0 <= count - math.prod(known) <= _MOST_BEFORE:
        return known
    sides = ((math.isqrt(count - p), count - p) for p in range(_MOST_BEFORE + 1))
    return next(((side, side) for side, cells in sides if side**2 == cells), None)


def _resize(value: np.ndarray, old: Grid, new: Grid, method: str) -> np.ndarray:
    if value.ndim == 3:
        return np.asarray(grid.resize_positions(jnp.asarray(value), new))
    prefix, width = len(value) - math.prod(old), value.shape[1]
    cells = jnp.asarray(value[prefix:].reshape(*old, width))
    resized = np.asarray(grid.resize_positions(cells, new, method)).reshape(-1, width)
    return np.concatenate([value[:prefix], resized])
