"""Converts weights between our names and those of other formats.

For a model over a backbone (MSViT, Mergence), other formats hold the plain transformer, which is
below `backbone/` here; a segmenter's decoder is beside it, below `decoder/`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from msvit_jax.errors import UserError, nearest
from msvit_jax.image_size import is_square, shown
from msvit_jax.models.interface import SEGMENTATION
from msvit_jax.tree import flat_names
from msvit_jax.weights import (
    adapt,
    big_vision,
    dvt,
    entries,
    huggingface,
    segmenter,
    timm,
)
from msvit_jax.weights.entries import ADAPTABLE, Entry, Flat, State

BACKBONE = "backbone/"
_SCANNED = "blocks/"
_HEAD = re.compile(r"(^|/)head(_dist)?/(kernel|bias)$")
HEAD_KERNEL = re.compile(r"(^|/)head(_dist)?/kernel$")


class Format(Protocol):
    """A module for one format."""

    NAME: str

    def table(self, model: Any) -> list[Entry]:
        """All parameters of a model in both formats."""

    def canonical(self, state: State, model: Any) -> tuple[Flat, list[str]]:
        """Renames variants to the table's names; also returns names that the model does not use."""


FORMATS: dict[str, Any] = {f.NAME: f for f in (timm, huggingface, big_vision, dvt, segmenter)}


@dataclasses.dataclass(frozen=True)
class LoadedWeights:
    """Weights as read from a source, not yet fitted to a model.

    Attributes:
      flat: Arrays by our names. Heads may be missing; heads, positions and patch kernels may have
        other shapes than the model's, see `fit`.
      format: Format of the source, 'ours' or one of `FORMATS`.
      unused: Names in the source that the model does not use.
      notes: Remarks on choices made, settings adopted, and suspicious values.
      pos_resize: Method of the source's own code for resizing positions, one of `grid.RESIZINGS`.
      patch_grid: (rows, columns) of the source's patches; None if it is not known.
    """

    flat: Flat
    format: str
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pos_resize: str = "timm"
    patch_grid: adapt.Grid | None = None

    def adapt_to(
        self, params: Any, patch_grid: adapt.Grid | None = None
    ) -> tuple[Flat, adapt.Report]:
        """Fits the weights to a model's parameters and patches; see `adapt.adapt_weights`."""
        taken, report = adapt.adapt_weights(
            self.flat,
            params,
            pos_resize=self.pos_resize,
            source_grid=self.patch_grid,
            patch_grid=patch_grid,
        )
        return taken, self._completed(report)

    def params_for(self, model: Any) -> tuple[Any, adapt.Report]:
        """Returns all parameters of a model; see `adapt.params_for`."""
        params, report = adapt.params_for(
            model, self.flat, pos_resize=self.pos_resize, source_grid=self.patch_grid
        )
        return params, self._completed(report)

    def _completed(self, report: adapt.Report) -> adapt.Report:
        report.unused.extend(self.unused)
        report.notes.extend(self.notes)
        return report


def from_theirs(state: State, model: Any, name: str) -> LoadedWeights:
    """Converts weights of another format to our names.

    A plain transformer's weights are for every stage of a cascade, see `adapt.adapt_weights`.

    Args:
      state: Arrays by the format's names.
      model: Model that the weights are for.
      name: One of `FORMATS`.

    Raises:
      UserError: The weights are of another model or are not real numbers.
    """
    if model.is_cascade and name != dvt.NAME:
        model = model.backbone  # whose patches fill the image, as those of a stage may not
    form, trunk, prefix = FORMATS[name], *trunk_of(model, name)
    headless = trunk.num_classes == 0
    # The table needs a head to recognize the source's.
    plain = trunk.clone(num_classes=1) if headless else trunk
    plain = plain.clone(scan_layers=False) if _scanned(plain) else plain
    if not is_square(plain.image_size):  # as all of the format's images are
        plain = plain.clone(image_size=min(plain.image_shape[:2]))
    shapes = flat_names(adapt.model_shapes(plain))
    table = form.table(plain)
    named, unused = form.canonical(state, plain)
    named, extras = _parameters(named, table)
    flat = entries.to_ours(named, table, shapes, adaptable=ADAPTABLE)
    if headless:
        heads = [key for key in flat if _HEAD.search(key)]
        unused += [f"{key} (the model has no head)" for key in heads]
        flat = {key: x for key, x in flat.items() if key not in heads}
    if _scanned(trunk):
        flat = _stack(flat, trunk.backbone.depth)
    inside = {
        key if key.startswith(segmenter.DECODER) else prefix + key: x for key, x in flat.items()
    }
    return LoadedWeights(
        inside,
        name,
        (*unused, *extras),
        pos_resize=_pos_resize(name, state),
        patch_grid=_square_grid(flat, plain.backbone),
    )


def _square_grid(flat: Flat, vit: Any) -> adapt.Grid | None:
    """The square grid of a plain transformer's positions; None for a cascade's stages."""
    cells = len(flat.get("pos_embed", ())) - vit.positioned_prefix
    side = math.isqrt(max(cells, 0))
    return (side, side) if side and side**2 == cells else None


def _parameters(state: State, table: Sequence[Entry]) -> tuple[Flat, list[str]]:
    """Separates parameters from counters and indices, which our models do not have.

    Raises:
      UserError: A parameter is not real-valued, as in quantized files.
    """
    names = {name for entry in table for name in entry.theirs}
    real = {name: np.asarray(x).dtype.kind == "f" for name, x in state.items()}
    wrong = [name for name in state if name in names and not real[name]]
    if wrong:
        raise UserError(
            f"{wrong[0]} is of {np.asarray(state[wrong[0]]).dtype}: weights are real numbers "
            "here; save the model before it was quantized."
        )
    extras = [n for n, x in state.items() if n not in names and not (real[n] and np.ndim(x))]
    return {n: np.asarray(x) for n, x in state.items() if n not in extras}, extras


def _pos_resize(form: str, state: State) -> str:
    """Method by which a file's own code resizes positions, inferred from the file's names."""
    if form == huggingface.NAME:
        registers = any(name.endswith("embeddings.register_tokens") for name in state)
        return "timm" if registers else "transformers"
    # Only DINOv2's own files keep the mask token.
    own = form == timm.NAME and "mask_token" in state and "register_tokens" not in state
    return "dinov2" if own else "timm"


def to_theirs(format_name: str, flat: Mapping[str, np.ndarray], model: Any) -> Flat:
    """Converts weights to another format's names.

    Args:
      format_name: One of `FORMATS`.
      flat: Arrays by our names; for a model over a backbone, those outside of it are left out.
      model: Model that the weights are of.

    Raises:
      UserError: The format is unknown or cannot express the model, or parameters are missing.
    """
    if not is_square(model.image_size):
        raise UserError(
            f"Images of {shown(model.image_size)} make a grid of patches that is no square, which "
            f"{format_name} cannot tell from its arrays; use our own format (--format=safetensors)."
        )
    if format_name not in FORMATS:
        raise UserError(
            f"There is no format {format_name!r}.{nearest(format_name, FORMATS)} "
            f"The formats are {', '.join(FORMATS)}."
        )
    trunk, prefix = trunk_of(model, format_name)
    inner = {n.removeprefix(prefix): flat[n] for n in trunk_names(flat, prefix, format_name)}
    if _scanned(trunk):
        inner = unstack(inner)
    return entries.to_theirs(inner, FORMATS[format_name].table(trunk))


def trunk_of(model: Any, format_name: str) -> tuple[Any, str]:
    """The part of a model that a format can express, and the prefix of its parameters.

    Raises:
      UserError: The model is a cascade or segmenter and the format is for others, or the reverse.
    """
    cascade = model.is_cascade
    if cascade != (format_name == dvt.NAME):
        what = "a cascade" if cascade else "not a cascade"
        raise UserError(f"The format {format_name} does not fit: this model is {what}.")
    segments = model.task == SEGMENTATION
    if format_name == segmenter.NAME:
        if not segments:
            raise UserError(f"The format {format_name} does not fit: this model has no decoder.")
        plain = model.encoder.backbone is model.encoder
        return model.clone(encoder=model.backbone), "" if plain else BACKBONE
    if segments:
        model = model.encoder  # formats of classifiers have no decoder
    if cascade or model.backbone is model:
        return model, ""
    return model.backbone, BACKBONE


def trunk_names(names: Iterable[str], prefix: str, format_name: str) -> list[str]:
    """Lists our names of the part that a format can express; `prefix` is from `trunk_of`."""
    decodes = format_name == segmenter.NAME
    return [
        n for n in names if (decodes if n.startswith(segmenter.DECODER) else n.startswith(prefix))
    ]


def _scanned(trunk: Any) -> bool:
    return trunk.backbone.scan_layers


def _stack(flat: Flat, depth: int) -> Flat:
    """Stacks each parameter over all layers, as `scan_layers` stores them."""
    stacked = {name: x for name, x in flat.items() if not name.startswith("blocks_")}
    for name in (n for n in flat if n.startswith("blocks_0/")):
        rest = name.removeprefix("blocks_0/")
        stacked[_SCANNED + rest] = np.stack([flat[f"blocks_{i}/{rest}"] for i in range(depth)])
    return stacked


def unstack(flat: Flat) -> Flat:
    """The inverse of `_stack`, also for parameters below a prefix ('backbone/blocks/...')."""
    apart: Flat = {}
    for name, x in flat.items():
        prefix, stacked, rest = name.partition(_SCANNED)
        if stacked:
            apart |= {f"{prefix}blocks_{layer}/{rest}": part for layer, part in enumerate(x)}
        else:
            apart[name] = x
    return apart
