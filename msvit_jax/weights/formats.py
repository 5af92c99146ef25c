"""Reads weights from a run or a file of any format into our names, and converts them back.

For a model over a backbone (MSViT, Mergence), other formats hold the plain transformer, which is
below `backbone/` here.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from msvit_jax import paths
from msvit_jax.errors import UserError, nearest
from msvit_jax.models.interface import SEGMENTATION
from msvit_jax.models.registry import create_model
from msvit_jax.models.vit import ViT
from msvit_jax.tree import flat_names
from msvit_jax.weights import (
    adapt,
    big_vision,
    declared,
    dvt,
    entries,
    files,
    huggingface,
    ours,
    timm,
    wrappers,
)
from msvit_jax.weights.declared import FREE, UNSEEN, Declared, same
from msvit_jax.weights.entries import ADAPTABLE, Entry, Flat, State

BACKBONE = "backbone/"
_SCANNED = "blocks/"
# Files that transformers keeps the weights in, within a model's directory.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_IN_DIRECTORY = (*_WHOLE, *(name + files.INDEX for name in _WHOLE))
_HEAD = re.compile(r"(^|/)head(_dist)?/(kernel|bias)$")
_LISTED = 8  # most members of a folder listed in a message
_HEAD_KERNEL = re.compile(r"(^|/)head(_dist)?/kernel$")
# Attributes that affect what a model computes but cannot be inferred from its arrays.
FUNCTION = tuple(key for key in UNSEEN if key not in FREE)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ViT)}


class Format(Protocol):
    """A module for one format."""

    NAME: str

    def table(self, model: Any) -> list[Entry]:
        """All parameters of a model in both formats."""

    def canonical(self, state: State, model: Any) -> tuple[Flat, list[str]]:
        """Renames variants to the table's names; also returns names that the model does not use."""


FORMATS: dict[str, Any] = {f.NAME: f for f in (timm, huggingface, big_vision, dvt)}
# Functions that infer a model's attributes from its arrays, for sources that state the others.
_SEEN = {timm.NAME: timm.seen, huggingface.NAME: huggingface.seen}


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
    """

    flat: Flat
    format: str
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pos_resize: str = "timm"

    def adapt_to(self, params: Any) -> tuple[Flat, adapt.Report]:
        """Fits the weights to a model's parameters; see `adapt.adapt_weights`."""
        taken, report = adapt.adapt_weights(self.flat, params, pos_resize=self.pos_resize)
        return taken, self._completed(report)

    def params_for(self, model: Any) -> tuple[Any, adapt.Report]:
        """Returns all parameters of a model; see `adapt.params_for`."""
        params, report = adapt.params_for(model, self.flat, pos_resize=self.pos_resize)
        return params, self._completed(report)

    def _completed(self, report: adapt.Report) -> adapt.Report:
        report.unused.extend(self.unused)
        report.notes.extend(self.notes)
        return report


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its parameters, ready to use.

    Attributes:
      model: The model, with the options that the source states.
      params: Parameters of the model.
      report: Report on how each parameter was used and which options were adopted.
      class_names: Names of the classes, in the order of the labels; empty if the source has none.
      crop: Share of an image's short side used in evaluation; None if the source does not state it.
      exif_orientation: Whether images are rotated upright by their EXIF data; None if the source
        does not state it.
    """

    model: Any
    params: Any
    report: adapt.Report
    class_names: tuple[str, ...] = ()
    crop: float | None = None
    exif_orientation: bool | None = None


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source whose arrays have been read and whose model has been found."""

    path: str
    arrays: Flat
    format: str
    declared: Declared
    about: dict[str, Any]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def check(self, model: Any, keys: Sequence[str]) -> None:
        """Raises UserError if no model of ours can express the source's, or `model` differs."""
        if self.declared.problems:
            raise UserError(
                f"{self.path!r} cannot be followed: {'; '.join(self.declared.problems)}."
            )
        seen = _SEEN[self.format](self.arrays) if self.format in _SEEN else {}
        if not seen.get("num_classes"):
            seen.pop("num_classes", None)  # a missing head is reported elsewhere
        contradicted = self.declared.contradictions(seen)
        if contradicted:
            raise UserError(
                f"{self.path!r} does not hold what it says: {'; '.join(contradicted)}. The arrays "
                "are not all there, or the description is another model's."
            )
        wrong = {} if model is None else self.declared.differences(model, keys)
        if not wrong:
            return
        trunk = model.backbone
        where = self.declared.where
        told = "; ".join(
            f"{where[key]} says {key}={value!r}, the model has {getattr(trunk, key)!r}"
            for key, value in wrong.items()
        )
        options = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        raise UserError(
            f"{self.path!r} is of another model, though the shapes fit: {told}. Make the model "
            f"with {options} (--config.model.KEY=VALUE of a config), or give its name alone where "
            "one is taken (model=NAME): then the source is followed."
        )

    def source_for(self, model: Any, keys: Sequence[str] = FUNCTION) -> LoadedWeights:
        """The weights for a model, which must agree with what the source states."""
        self.check(model, keys)
        notes = list(self.notes) + self.declared.notes
        if model is not None:
            there = self.declared.differences(model, FREE)
            notes += [
                f"{key}{'' if key == 'pool' else ' of the pixels'} is {value} in "
                f"{self.declared.where[key]}, another here"
                for key, value in there.items()
            ]
        if self.format == ours.NAME:
            found = LoadedWeights(_by_slashes(self.arrays), self.format)
        else:
            try:
                found = _foreign(self.arrays, model, self.format)
            except UserError as error:
                raise UserError(f"{self.path!r} (format {self.format}): {error}") from error
        notes += [
            f"{name} is all zeros: every class gets the same answer"
            for name, x in found.flat.items()
            if _HEAD_KERNEL.search(name) and x.size and not x.any()
        ]
        return dataclasses.replace(
            found,
            unused=(*found.unused, *self.unused),
            notes=tuple(notes),
            pos_resize=self.declared.model.get("pos_resize", found.pos_resize),
        )


def read(source: str | pathlib.Path, model: Any) -> Flat:
    """Reads weights by our names; see `load`."""
    return load(source, model).flat


def load(source: str | pathlib.Path, model: Any) -> LoadedWeights:
    """Reads a run or a file of any format; the format is recognized by the names in it.

    Args:
      source: Workdir of a run (its best checkpoint is read), a file (see `files`), or a directory
        that transformers or timm wrote.
      model: Model that the weights are for.

    Raises:
      UserError: The source is missing, unreadable, of an unknown format, has NaN or infinite
        values, or belongs to another model, by its arrays or by the heads, epsilon and activation
        that it states.
    """
    return _open(source).source_for(model)


def load_params(source: str | pathlib.Path, model: Any) -> tuple[Any, adapt.Report]:
    """Reads all parameters of a model, fitted to it, with a report on how each was used.

    Args:
      source: Source of the weights, as in `load`.
      model: Model that the weights are for.

    Raises:
      UserError: The weights cannot be loaded or do not fit, see `load` and `adapt.params_for`.
    """
    return _params(str(source), load(source, model), model)


def load_model(source: str | pathlib.Path, model: Any = None) -> Loaded:
    """Loads a model with its parameters and the options that the source states.

    The heads, epsilon, activation, and mean and std of the pixels that a source states are adopted
    unless `model` sets them. A name of the registry sets none of them, nor the number of classes; a
    module sets those that differ from the defaults of `ViT`. A source that contradicts these is an
    error.

    Args:
      source: Source of the weights, as in `load`.
      model: A name of the registry or a module; None: the model that the source describes.

    Raises:
      UserError: The weights cannot be loaded or do not fit, see `load_params`, or the source does
        not describe its model.
    """
    opened = _open(source)
    opened.check(None, ())
    followed: dict[str, Any] = {}
    if model is None:
        model = _described(opened)
        followed = {key: x for key, x in opened.declared.model.items() if key in UNSEEN}
    elif isinstance(model, str):
        plain = create_model(model)
        followed = opened.declared.differences(plain)
        classes = _classes(opened.source_for(plain, ()).flat)
        model = create_model(model, **followed, num_classes=classes)
    else:
        wrong = opened.declared.differences(model)
        trunk = model.backbone
        followed = {k: x for k, x in wrong.items() if same(getattr(trunk, k), _DEFAULTS[k])}
        model = _changed(model, followed)
    found = opened.source_for(model, UNSEEN)
    if model.backbone.pos_resize != found.pos_resize:
        model = _changed(model, {"pos_resize": found.pos_resize})
    params, report = _params(opened.path, found, model)
    report.notes.extend(
        f"{key}={value!r} as {opened.declared.where[key]} says" for key, value in followed.items()
    )
    names = opened.declared.class_names
    if names and len(names) != model.num_classes:
        classes = model.num_classes
        if classes:
            report.notes.append(f"its {len(names)} class names were left out: {classes} classes")
        names = ()
    declared = opened.declared
    return Loaded(model, params, report, names, declared.crop, declared.exif_orientation)


def declared_options(
    source: str | pathlib.Path, model: Any, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Options, not given explicitly, that a model needs to agree with what a source states.

    Args:
      source: Source of the weights, as in `load`.
      model: The model without these options.
      given: Options given explicitly, which are not returned.
    """
    file = file_of(source)
    if file is not None:
        said = declared.of_file(file, files.read_contents(file))
    elif paths.parse(source).is_dir():
        said = declared.of_run(source)
    else:
        return {}
    return {key: x for key, x in said.differences(model).items() if key not in given}


def _params(path: str, found: LoadedWeights, model: Any) -> tuple[Any, adapt.Report]:
    try:
        return found.params_for(model)
    except UserError as error:
        raise UserError(f"{path!r} (format {found.format}): {error}") from error


def _changed(model: Any, options: Mapping[str, Any]) -> Any:
    """A copy of a model with changed attributes of its trunk."""
    return model.with_backbone(**options) if options else model


def _described(opened: _Opened) -> Any:
    # Our exports in other formats name the whole model but hold only its trunk.
    if opened.about.get("model") and opened.format in (ours.NAME, dvt.NAME):
        return ours.build_model(opened.about)
    if opened.format not in _SEEN:
        raise UserError(
            f"The weights file {opened.path!r} does not name its model; give it with model=."
        )
    return declared.build(opened.declared, _SEEN[opened.format](opened.arrays))


def _classes(flat: Mapping[str, np.ndarray]) -> int:
    """Number of classes of a head or decoder; 0 if there is none."""
    if "decoder/class_embed" in flat:
        return flat["decoder/class_embed"].shape[0]
    return next((x.shape[-1] for name, x in flat.items() if _HEAD_KERNEL.search(name)), 0)


def _open(source: str | pathlib.Path) -> _Opened:
    file, path = file_of(source), str(source)
    if file is not None:
        contents = files.read_contents(file)
        said = declared.of_file(file, contents)
        return _found(contents, path, said, ours.describe(file) or {})
    if not paths.parse(source).exists():
        raise UserError(f"There is no weights file or workdir {path!r}.")
    if not paths.parse(source).is_dir():
        raise UserError(f"{path!r} is neither a workdir nor a weights file.")
    from msvit_jax import checkpoint  # imports Orbax, which files do not need

    flat = flat_names(checkpoint.load_params(source))
    _check_finite(flat, path)
    return _Opened(path, flat, ours.NAME, declared.of_run(source), {})


def _found(contents: files.Contents, path: str, said: Declared, about: dict[str, Any]) -> _Opened:
    try:
        model = wrappers.undo(contents.arrays)
    except UserError as error:
        raise UserError(f"{path!r}: {error}") from error
    if model is None:
        known = ", ".join([ours.NAME, *FORMATS])
        raise UserError(f"{path!r} holds weights of none of the formats {known}: {contents}")
    arrays = {name: files.number(name, x, path) for name, x in model.arrays.items()}
    _check_finite(arrays, path)
    return _Opened(path, arrays, model.format, said, about, model.beside, model.notes)


def _check_finite(arrays: Mapping[str, Any], path: str) -> None:
    """Raises UserError for weights that are NaN, infinite, or beyond float32."""
    for name, x in arrays.items():
        if np.asarray(x).dtype.kind != "f":
            continue
        with np.errstate(over="ignore"):
            wrong = np.count_nonzero(~np.isfinite(np.asarray(x, np.float32)))
        if wrong:
            raise UserError(
                f"{path!r}: {name} holds {wrong:,} values of {np.size(x):,} that are NaN, infinite "
                "or beyond float32: the training that made it has failed, or the file is damaged. "
                "Take an earlier checkpoint."
            )


def file_of(source: str | pathlib.Path) -> pathlib.Path | None:
    """The weights file at a path, or in a directory by transformers; None if there is none.

    For an address it is a local copy, see `paths.fetch`.

    Raises:
      UserError: The path is a folder that is not a run's and has no weights.
    """
    path = paths.parse(source)
    if path.is_file():
        return paths.fetch(path)
    found = next((name for name in _IN_DIRECTORY if (path / name).is_file()), None)
    if found is None and path.is_dir() and not _may_be_run(path):
        held = sorted(each.name for each in path.iterdir())
        listed = ", ".join(held[:_LISTED]) + (", ..." if len(held) > _LISTED else "")
        raise UserError(
            f"{str(path)!r} is a folder, but neither a run's, with {paths.CONFIG_FILE} and "
            f"checkpoints, nor one with {' or '.join(_IN_DIRECTORY)}. It holds "
            f"{listed or 'nothing'}."
        )
    return None if found is None else paths.fetch(path) / found


def _may_be_run(folder: pathlib.Path) -> bool:
    """Whether a folder can be a run's, even one without checkpoints yet."""
    config = folder / paths.CONFIG_FILE
    if (folder / "checkpoints").is_dir():
        return True
    if not config.is_file():
        return False
    # Directories by transformers and timm have a file of the same name.
    return not {"model_type", "architecture"} & files.read_json(config.read_text(), config).keys()


def class_names(source: str | pathlib.Path) -> tuple[str, ...]:
    """Class names of a run or of a weights file; empty if it has none.

    Args:
      source: Source of the weights, as in `load`.
    """
    file = file_of(source)
    if file is None:
        from msvit_jax import checkpoint  # imports Orbax, which files do not need

        return tuple(checkpoint.read_about(source).get("class_names") or ())
    return declared.of_file(file, files.read_contents(file)).class_names


def convert(state: State, model: Any, *, where: str = "The source") -> LoadedWeights:
    """Converts weights of any format to our names.

    Args:
      state: Arrays by name.
      model: Model that the weights are for.
      where: Name of the source, for messages.

    Raises:
      UserError: The format is unknown, or the weights are of another model.
    """
    return _found(files.Contents(dict(state)), where, Declared(), {}).source_for(model)


def _by_slashes(state: State) -> Flat:
    return {name.replace(".", "/"): np.asarray(x) for name, x in state.items()}


def _foreign(state: State, model: Any, name: str) -> LoadedWeights:
    form, trunk, prefix = FORMATS[name], *trunk_of(model, name)
    headless = trunk.num_classes == 0
    # The table needs a head to recognize the source's.
    plain = trunk.clone(num_classes=1) if headless else trunk
    plain = plain.clone(scan_layers=False) if _scanned(plain) else plain
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
        flat = _stack(flat, trunk.depth)
    inside = {prefix + key: x for key, x in flat.items()}
    return LoadedWeights(inside, name, (*unused, *extras), pos_resize=_pos_resize(name, state))


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
    """The part of a model that a format can express, and the prefix of its parameters.

    Raises:
      UserError: The model is a cascade and the format is for plain models, or the reverse.
    """
    cascade = model.is_cascade
    if cascade != (format_name == dvt.NAME):
        what = "a cascade" if cascade else "no cascade"
        raise UserError(f"The format {format_name} does not fit: this model is {what}.")
    if model.task == SEGMENTATION:
        model = model.encoder  # formats of classifiers have no decoder
    if cascade or model.backbone is model:
        return model, ""
    return model.backbone, BACKBONE


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
