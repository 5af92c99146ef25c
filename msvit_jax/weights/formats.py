"""Weights by our names from a run or a file of any format, and the reverse.

A model over a backbone (MSViT, Mergence) takes and gives the plain transformer below `backbone/`.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from msvit_jax import checkpoint
from msvit_jax.errors import UserError, nearest
from msvit_jax.train import init_from
from msvit_jax.train.optimizer import flat_names
from msvit_jax.weights import big_vision, dvt, entries, files, huggingface, ours, timm
from msvit_jax.weights.entries import ADAPTABLE, Entry, Flat, State

BACKBONE = "backbone/"
_SCANNED = "blocks/"
# Where transformers keeps the weights in a model's directory.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_IN_DIRECTORY = (*_WHOLE, *(name + files.INDEX for name in _WHOLE))


class Format(Protocol):
    """A module for one format."""

    NAME: str

    def fits(self, names: Iterable[str]) -> bool:
        """Whether a file with these names is in this format."""

    def table(self, model: Any) -> list[Entry]:
        """All parameters of a model in both formats."""

    def canonical(self, state: State, model: Any) -> tuple[Flat, list[str]]:
        """Brings variants to the table's names; also says what the model has no use for."""


FORMATS: dict[str, Any] = {f.NAME: f for f in (timm, huggingface, big_vision, dvt)}


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights as they were found.

    Attributes:
      flat: by our names; heads may be missing, and heads, positions and patch kernels may have
        other shapes than the model's: see `init_from.fit`.
      format: 'ours' or one of `FORMATS`.
      unused: names in the source that the model has no use for.
    """

    flat: Flat
    format: str
    unused: tuple[str, ...] = ()


def read(source: str | pathlib.Path, model: Any) -> Flat:
    """Weights by our names; see `load`."""
    return load(source, model).flat


def load(source: str | pathlib.Path, model: Any) -> Source:
    """Reads a run or a file of any format; which one is told by the names in it.

    Args:
      source: a run's workdir (its best checkpoint), a file (see `files`), or a directory that
        transformers wrote.
      model: that they are for.

    Raises:
      UserError: nothing there, not readable, of no known format, or of another model.
    """
    file = file_of(source)
    if file is not None:
        return convert(files.read(file), model, where=str(source))
    if pathlib.Path(source).is_dir():
        return Source(flat_names(checkpoint.load_params(source)), ours.NAME)
    raise UserError(f"{str(source)!r} is neither a workdir nor a weights file.")


def load_params(source: str | pathlib.Path, model: Any) -> tuple[Any, init_from.Report]:
    """All parameters of a model, fitted to it, and what became of each.

    Args:
      source: see `load`.
      model: that they are for.

    Raises:
      UserError: see `load` and `init_from.params_for`.
    """
    found = load(source, model)
    try:
        params, report = init_from.params_for(model, found.flat)
    except UserError as error:
        raise UserError(f"{str(source)!r} (format {found.format}): {error}") from error
    report.unused.extend(found.unused)
    return params, report


def file_of(source: str | pathlib.Path) -> pathlib.Path | None:
    """The weights file that a path names, or that transformers put there; None if there is none."""
    path = pathlib.Path(source)
    candidates = [path, *(path / name for name in _IN_DIRECTORY)]
    return next((file for file in candidates if file.is_file()), None)


def convert(state: State, model: Any, *, where: str = "The source") -> Source:
    """Weights of any format by our names.

    Args:
      state: arrays by name.
      model: that they are for.
      where: they come from, for messages.

    Raises:
      UserError: they are of no known format, or of another model.
    """
    name = detect(state)
    if name is None:
        known = ", ".join([ours.NAME, *FORMATS])
        first = ", ".join(sorted(state)[:3]) or "nothing"
        raise UserError(f"{where!r} holds weights of none of the formats {known}: {first}, ...")
    if name == ours.NAME:
        return Source(_by_slashes(state), name)
    try:
        return _foreign(state, model, name)
    except UserError as error:
        raise UserError(f"{where!r} (format {name}): {error}") from error


def detect(names: Iterable[str]) -> str | None:
    """The format of a file with these names; None if it is none."""
    names = list(names)
    found = next((name for name, form in FORMATS.items() if form.fits(names)), None)
    if found is not None:
        return found
    return ours.NAME if ours.fits(names) else None


def _by_slashes(state: State) -> Flat:
    return {name.replace(".", "/").removeprefix("params/"): x for name, x in state.items()}


def _foreign(state: State, model: Any, name: str) -> Source:
    form, trunk, prefix = FORMATS[name], *trunk_of(model, name)
    unscanned = trunk.clone(scan_layers=False) if _scanned(trunk) else trunk
    shapes = flat_names(init_from.model_shapes(unscanned))
    table = form.table(unscanned)
    named, unused = form.canonical(state, unscanned)
    flat = entries.to_ours(named, table, shapes, adaptable=ADAPTABLE)
    if _scanned(trunk):
        flat = _stack(flat, trunk.depth)
    return Source({prefix + key: x for key, x in flat.items()}, name, tuple(unused))


def to_theirs(format_name: str, flat: Mapping[str, np.ndarray], model: Any) -> Flat:
    """Weights by another format's names.

    Args:
      format_name: one of `FORMATS`.
      flat: by our names; what lies outside the backbone of a model that has one is left out.
      model: that they are of.

    Raises:
      UserError: an unknown format, one that cannot express the model, or missing parameters.
    """
    if format_name not in FORMATS:
        raise UserError(
            f"There is no format {format_name!r}.{nearest(format_name, FORMATS)} "
            f"Known are {', '.join(FORMATS)}."
        )
    trunk, prefix = trunk_of(model, format_name)
    inner = {n.removeprefix(prefix): x for n, x in flat.items() if n.startswith(prefix)}
    if _scanned(trunk):
        inner = unstack(inner)
    return entries.to_theirs(inner, FORMATS[format_name].table(trunk))


def trunk_of(model: Any, format_name: str) -> tuple[Any, str]:
    """What of a model a format expresses, and where in its parameters that lies.

    Raises:
      UserError: a cascade and a format of plain models, or the reverse.
    """
    cascade = hasattr(model, "exit_tokens")
    if cascade != (format_name == dvt.NAME):
        what = "a cascade" if cascade else "no cascade"
        raise UserError(f"The format {format_name} does not fit: this model is {what}.")
    if cascade or not hasattr(model, "backbone"):
        return model, ""
    return model.backbone, BACKBONE


def _scanned(trunk: Any) -> bool:
    return getattr(trunk, "scan_layers", False)


def _stack(flat: Flat, depth: int) -> Flat:
    """One array over all layers of each kind, as `scan_layers` has them."""
    stacked = {name: x for name, x in flat.items() if not name.startswith("blocks_")}
    for name in (n for n in flat if n.startswith("blocks_0/")):
        rest = name.removeprefix("blocks_0/")
        stacked[_SCANNED + rest] = np.stack([flat[f"blocks_{i}/{rest}"] for i in range(depth)])
    return stacked


def unstack(flat: Flat) -> Flat:
    """Undoes `_stack`, also of parameters below a prefix ('backbone/blocks/...')."""
    apart: Flat = {}
    for name, x in flat.items():
        prefix, stacked, rest = name.partition(_SCANNED)
        if stacked:
            apart |= {f"{prefix}blocks_{layer}/{rest}": part for layer, part in enumerate(x)}
        else:
            apart[name] = x
    return apart
