"""Loads weights from a run or a file of any format, with what the source says of its model."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from msvit_jax import paths
from msvit_jax.errors import UserError
from msvit_jax.models.registry import create_model
from msvit_jax.models.vit import ViT
from msvit_jax.weights import adapt, declared, dvt, files, ours
from msvit_jax.weights.declared import UNSEEN, Declared, same
from msvit_jax.weights.entries import Flat, State
from msvit_jax.weights.formats import HEAD_KERNEL, LoadedWeights
from msvit_jax.weights.opened import SEEN, OpenedSource, file_of, from_contents, open_source

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ViT)}


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
    return open_source(source).source_for(model)


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
    opened = open_source(source)
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


def _described(opened: OpenedSource) -> Any:
    # Our exports in other formats name the whole model but hold only its trunk.
    if opened.about.get("model") and opened.format in (ours.NAME, dvt.NAME):
        return ours.build_model(opened.about)
    if opened.format not in SEEN:
        raise UserError(
            f"The weights file {opened.path!r} does not name its model; give it with model=."
        )
    return declared.build(opened.declared, SEEN[opened.format](opened.arrays))


def _classes(flat: Mapping[str, np.ndarray]) -> int:
    """Number of classes of a head or decoder; 0 if there is none."""
    if "decoder/class_embed" in flat:
        return flat["decoder/class_embed"].shape[0]
    return next((x.shape[-1] for name, x in flat.items() if HEAD_KERNEL.search(name)), 0)


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
    return from_contents(files.Contents(dict(state)), where, Declared(), {}).source_for(model)
