"""From a trained run and images to pictures on disk."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from msvit_jax import checkpoint
from msvit_jax.data import decode, pipeline, sources
from msvit_jax.errors import UserError
from msvit_jax.inference import Predictions, Predictor
from msvit_jax.inference.shapes import has_gate
from msvit_jax.tokens.grid import REGION
from msvit_jax.visualize.maps import GATE_COLUMNS, gate_strip
from msvit_jax.visualize.sheet import Strip, panel, save

BATCH = 32  # images run at once
ON_SHEET = 64  # more would make a picture that no viewer opens
SHEET = "contact_sheet.png"


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture to be: uint8 [S, S, 3], what to call it, and its class where that is known."""

    image: np.ndarray
    name: str
    label: int | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn and where it lies."""

    strips: list[Strip]
    sheet: pathlib.Path


def draw_run(
    run: checkpoint.Run, out: pathlib.Path | str, *, files: Sequence[str] = (), count: int = 8
) -> Drawn:
    """Draws what a trained run does with image files, or with examples of its evaluation split.

    Args:
      run: with a gate.
      out: folder for the pictures and the contact sheet.
      files: paths of images.
      count: how many examples, where there are no files.

    Raises:
      UserError: see `from_files`, `from_dataset` and `draw_gate`.
    """
    config = run.config.data
    examples = from_files(files, config) if files else from_dataset(config, count)
    strips = draw_gate(run.model, run.variables, examples, _class_names(config))
    return Drawn(strips, write(strips, [example.name for example in examples], out))


def from_files(paths: Sequence[str], config: ConfigDict) -> list[Example]:
    """Reads image files as evaluation does: the central square, resized.

    Args:
      paths: of the files.
      config: the `data` section of the run's config.

    Raises:
      UserError: a file is missing or cannot be decoded; names it.
    """
    return [
        Example(
            decode.read_file(path, config.image_size, config.eval_crop), pathlib.Path(path).name
        )
        for path in paths
    ]


def from_dataset(config: ConfigDict, count: int) -> list[Example]:
    """Takes examples evenly spread over the evaluation split, which may be sorted by class."""
    if count < 1:
        raise UserError(f"The number of examples must be at least 1, not {count}.")
    builder = sources.open_dataset(config.name, config.data_dir)
    split = sources.open_split(builder, config.eval_split)
    indices = np.unique(np.linspace(0, len(split) - 1, count).astype(int))
    found = ((index, split[index]) for index in indices)
    return [
        Example(
            pipeline.centre_crop(example, config.image_size, config.eval_crop),
            f"{config.eval_split} {index}",
            int(example["label"]),
        )
        for index, example in found
    ]


def draw_gate(
    model: Any, variables: Any, examples: Sequence[Example], class_names: Sequence[str] = ()
) -> list[Strip]:
    """Runs a model with a gate and draws what the gate decided.

    Args:
      model: with a `gate_grid`.
      variables: for `model.apply`.
      examples: at the model's image size.
      class_names: in the order of the labels; without them classes are numbers.

    Raises:
      UserError: the model has no gate.
    """
    if not has_gate(model):
        raise UserError(
            "The model has no gate: every image gets all of its tokens, so there is nothing to "
            "draw. Choose the workdir of a mixed-scale model (msvit_...)."
        )
    predictor = Predictor(
        model,
        variables,
        batch_size=min(BATCH, len(examples)),
        layout="slots",  # a few images: one program is compiled
        class_names=class_names,
    )
    return gate_strips(examples, predictor(np.stack([example.image for example in examples])))


def gate_strips(examples: Sequence[Example], predictions: Predictions) -> list[Strip]:
    """Draws what a gate decided about examples that a Predictor has run."""
    coarse, probability = predictions.coarse, predictions.coarse_probability
    assert coarse is not None
    assert probability is not None
    _, rows, columns = coarse.shape
    most = REGION**2 * rows * columns
    return [
        gate_strip(
            example.image,
            coarse[index].reshape(-1),
            probability[index].reshape(-1),
            (rows, columns),
            caption=_caption(example, predictions, index, most),
            wrong=example.label not in (None, int(predictions.labels[index])),
        )
        for index, example in enumerate(examples)
    ]


def write(strips: Sequence[Strip], names: Sequence[str], out: pathlib.Path | str) -> pathlib.Path:
    """Writes one PNG for each strip and a contact sheet of the first 64; returns the sheet's path.

    Files are called after their numbers and names, which need not differ.
    """
    out = pathlib.Path(out)
    for number, (strip, name) in enumerate(zip(strips, names, strict=True)):
        stem = pathlib.Path(name).stem.replace(" ", "_")
        save(panel([strip], GATE_COLUMNS), out / f"{number:03d}_{stem}.png")
    columns = 2 if len(strips) > 3 else 1
    return save(panel(strips[:ON_SHEET], GATE_COLUMNS, columns=columns), out / SHEET)


def _class_names(config: ConfigDict) -> tuple[str, ...]:
    """The classes' names; none where the run's data set is not on this machine."""
    try:
        return pipeline.dataset_info(config).class_names
    except UserError:
        return ()


def _caption(example: Example, predictions: Predictions, index: int, most: int) -> str:
    predicted = int(predictions.labels[index])
    sure = predictions.probabilities[index, predicted]
    shown = example.name
    if example.label is not None:
        shown = f"label {predictions.class_name(example.label)}"
    return (
        f"{shown} · predicted {predictions.class_name(predicted)} ({sure:.0%})"
        f" · {predictions.tokens[index]} of {most} tokens"
    )
