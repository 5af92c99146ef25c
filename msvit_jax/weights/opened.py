"""Opens a source of weights, and refuses what is missing, damaged, or another model's."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msvit_jax import paths
from msvit_jax.errors import UserError
from msvit_jax.tree import flat_names
from msvit_jax.weights import declared, files, huggingface, ours, timm, wrappers
from msvit_jax.weights.declared import FREE, UNSEEN, Declared
from msvit_jax.weights.entries import Flat, State
from msvit_jax.weights.formats import FORMATS, HEAD_KERNEL, LoadedWeights, from_theirs

# Files that transformers keeps the weights in, within a model's directory.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_IN_DIRECTORY = (*_WHOLE, *(name + files.INDEX for name in _WHOLE))
_LISTED = 8  # most members of a folder listed in a message
# Attributes that affect what a model computes but cannot be inferred from its arrays.
FUNCTION = tuple(key for key in UNSEEN if key not in FREE)
# Functions that infer a model's attributes from its arrays, for sources that state the others.
SEEN = {timm.NAME: timm.seen, huggingface.NAME: huggingface.seen}


@dataclasses.dataclass(frozen=True)
class OpenedSource:
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
            problems = "; ".join(self.declared.problems).rstrip(".")
            raise UserError(f"{self.path!r} cannot be followed: {problems}.")
        seen = SEEN[self.format](self.arrays) if self.format in SEEN else {}
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
            found = LoadedWeights(
                _by_slashes(self.arrays), self.format, patch_grid=self.declared.patch_grid
            )
        else:
            try:
                found = from_theirs(self.arrays, model, self.format)
            except UserError as error:
                raise UserError(f"{self.path!r} (format {self.format}): {error}") from error
        notes += [
            f"{name} is all zeros: every class gets the same answer"
            for name, x in found.flat.items()
            if HEAD_KERNEL.search(name) and x.size and not x.any()
        ]
        return dataclasses.replace(
            found,
            unused=(*found.unused, *self.unused),
            notes=tuple(notes),
            pos_resize=self.declared.model.get("pos_resize", found.pos_resize),
        )


def open_source(source: str | pathlib.Path) -> OpenedSource:
    """Reads the arrays of a run or a file, and what the source says of its model.

    Raises:
      UserError: The source is missing, unreadable, of an unknown format, or has NaN or infinite
        values.
    """
    file, path = file_of(source), str(source)
    if file is not None:
        contents = files.read_contents(file)
        ours.check_unchanged(file, contents.arrays)
        said = declared.of_file(file, contents)
        return from_contents(contents, path, said, ours.describe(file) or {})
    if not paths.parse(source).exists():
        raise UserError(f"There is no weights file or workdir {path!r}.")
    if not paths.parse(source).is_dir():
        raise UserError(f"{path!r} is neither a workdir nor a weights file.")
    from msvit_jax import checkpoint  # imports Orbax, which files do not need

    flat = flat_names(checkpoint.load_params(source))
    _check_finite(flat, path)
    return OpenedSource(path, flat, ours.NAME, declared.of_run(source), {})


def from_contents(
    contents: files.Contents, path: str, said: Declared, about: dict[str, Any]
) -> OpenedSource:
    """Finds the model among the arrays of a file.

    Args:
      contents: Contents of the file.
      path: Name of the file, for messages.
      said: Statements of the file about its model.
      about: Description by this library; empty without one.

    Raises:
      UserError: The arrays are of no known format, or have NaN or infinite values.
    """
    try:
        model = wrappers.undo(contents.arrays)
    except UserError as error:
        raise UserError(f"{path!r}: {error}") from error
    if model is None:
        known = ", ".join([ours.NAME, *FORMATS])
        raise UserError(f"{path!r} holds weights of none of the formats {known}: {contents}")
    arrays = {name: files.number(name, x, path) for name, x in model.arrays.items()}
    _check_finite(arrays, path)
    return OpenedSource(path, arrays, model.format, said, about, model.beside, model.notes)


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


def _by_slashes(state: State) -> Flat:
    return {name.replace(".", "/"): np.asarray(x) for name, x in state.items()}
