"""Runs a trained model on images and writes pictures of its decisions."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from msvit_jax import checkpoint, labels, paths
from msvit_jax.data import decode, pipeline, sources
from msvit_jax.data.image_files import shown
from msvit_jax.errors import UserError
from msvit_jax.inference import Predictions, Predictor
from msvit_jax.models.interface import ImageModel
from msvit_jax.pictures.maps import (
    GATE_COLUMNS,
    MERGE_LEGEND,
    count_tokens,
    enlarge,
    gate_strip,
    merge_map,
)
from msvit_jax.pictures.sheet import Column, Picture, Strip, panel, save
from msvit_jax.tokens.grid import REGION

BATCH = 32  # images run at once
ON_SHEET = 64  # most strips on a sheet; viewers cannot open much larger pictures
SIDE_BY_SIDE = 4  # most pictures per strip for a sheet of two columns
MOST_STAGES = 6  # most merge maps per strip, to keep it readable
SHEET = "contact_sheet.png"


@dataclasses.dataclass(frozen=True)
class Example:
    """An image to draw: uint8 [S, S, 3] pixels, its name, and its label (None if not known)."""

    image: np.ndarray
    name: str
    label: int | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The strips that were drawn and the path of the sheet."""

    strips: list[Strip]
    sheet: pathlib.Path


def draw_run(
    run: checkpoint.Run, out: pathlib.Path | str, *, files: Sequence[str] = (), count: int = 8
) -> Drawn:
    """Draws a trained run's decisions for image files, or for examples of its evaluation split.

    Args:
      run: A run of a model with a gate or with layers that reduce tokens.
      out: Folder for the pictures and the contact sheet.
      files: Paths of images; empty: examples of the evaluation split.
      count: Number of examples if there are no files.

    Raises:
      UserError: The model has nothing to draw, the folder cannot be written, or images or classes
        are unusable (see `check_classes`, `from_files` and `from_dataset`).
    """
    config = run.config.data
    check_pictures(run.model)
    paths.check_writable(out, make=False)  # before the work
    if not files:
        check_classes(run)
    examples = from_files(files, config) if files else from_dataset(config, count)
    names = run.class_names or _class_names(config)
    predictions = predict(run.model, run.variables, examples, names)
    return write(examples, predictions, reducing_layers(run.model), out)


def check_classes(run: checkpoint.Run) -> None:
    """Checks that a run's classes are those of the data set whose labels are shown.

    Raises:
      UserError: The classes differ, see `labels`.
    """
    names, how = pipeline.class_names(run.config.data), run.config.data.match_classes
    labels.check_count(run.model.num_classes, len(names), of="The run")
    if labels.order(run.class_names, names, how, of="The run") is not None:
        raise UserError("Pictures show the run's classes; by_name is for eval.py and train.py.")


def from_files(paths: Sequence[str], config: ConfigDict) -> list[Example]:
    """Reads image files as in evaluation: the center, resized.

    Args:
      paths: Paths of the files.
      config: The `data` section of the run's config.

    Raises:
      UserError: A file is missing or cannot be decoded; the message names it.
    """
    how = (config.image_size, config.eval_crop, config.exif_orientation)
    return [Example(decode.read_file(path, *how), shown(pathlib.Path(path).name)) for path in paths]


def from_dataset(config: ConfigDict, count: int) -> list[Example]:
    """Takes examples evenly spaced over the evaluation split, which may be sorted by class."""
    if count < 1:
        raise UserError(f"The number of examples must be at least 1, not {count}.")
    builder = sources.open_dataset(config.name, config.data_dir)
    split = sources.open_split(builder, config.eval_split)
    indices = np.unique(np.linspace(0, len(split) - 1, count).astype(int))
    found = ((index, split[index]) for index in indices)
    return [
        Example(
            pipeline.center_crop(
                example, config.image_size, config.eval_crop, config.exif_orientation
            ),
            f"{config.eval_split} {index}",
            int(example["label"]),
        )
        for index, example in found
    ]


def predict(
    model: ImageModel, variables: Any, examples: Sequence[Example], class_names: Sequence[str] = ()
) -> Predictions:
    """Runs a model with a gate or token reduction on examples.

    Args:
      model: A model with a gate or with layers that reduce tokens.
      variables: Variables for `model.apply`.
      examples: Images at the model's image size.
      class_names: Names of the classes, in the order of the labels; empty: classes are numbers.

    Raises:
      UserError: The model has neither a gate nor layers that reduce tokens.
    """
    check_pictures(model)
    predictor = Predictor(
        model,
        variables,
        batch_size=min(BATCH, len(examples)),
        layout="slots",  # a few images: one program is compiled
        class_names=class_names,
    )
    return predictor(np.stack([example.image for example in examples]))


def check_pictures(model: ImageModel) -> None:
    """Raises UserError for a model without anything to draw, see `has_pictures`."""
    if not has_pictures(model):
        raise UserError(
            "The model has no gate and reduces no tokens: every image gets all of its tokens in "
            "every layer, so there is nothing to draw. Choose the workdir of a mixed-scale model "
            "(msvit_...) or of one that merges tokens (mergence_..., or any with a reducer)."
        )


def has_pictures(model: ImageModel) -> bool:
    """Whether a model has anything to draw: a gate, or layers that reduce tokens."""
    return model.has_gate or bool(reducing_layers(model))


def reducing_layers(model: ImageModel) -> tuple[int, ...]:
    """The layers that reduce tokens, counted from 1."""
    return tuple(layer + 1 for layer in model.reductions)


def strips(examples: Sequence[Example], predictions: Predictions) -> list[Strip]:
    """Draws predicted examples: the image, the gate's columns, and the merge maps."""
    return [
        Strip(
            [enlarge(example.image), *_pictures(example, predictions, index)],
            _caption(example, predictions, index),
            wrong=example.label not in (None, int(predictions.labels[index])),
        )
        for index, example in enumerate(examples)
    ]


def headings(
    predictions: Predictions, layers: Sequence[int], images: slice = slice(None)
) -> list[Column]:
    """Titles of the pictures of `strips`; merge maps are titled "layer 4: 138 tokens".

    Args:
      predictions: Predictions for the examples.
      layers: Numbers of the layers that reduce tokens, counted from 1.
      images: Slice of the images on the sheet, whose tokens are counted.
    """
    columns = [Column("image")]
    if predictions.coarse is not None:
        columns += GATE_COLUMNS[1:]
    if predictions.merge_maps is not None:
        counts = count_tokens(predictions.merge_maps[images])
        for stage in shown_stages(len(layers)):
            least, most = counts[:, stage].min(), counts[:, stage].max()
            tokens = f"{least}" if least == most else f"{least} to {most}"
            columns.append(Column(f"layer {layers[stage]}: {tokens} tokens"))
    return columns


def shown_stages(count: int) -> list[int]:
    """Indices of the reductions to draw: at most `MOST_STAGES`, including the first and last."""
    return np.linspace(0, count - 1, min(count, MOST_STAGES)).astype(int).tolist()


def write(
    examples: Sequence[Example],
    predictions: Predictions,
    layers: Sequence[int],
    out: pathlib.Path | str,
) -> Drawn:
    """Writes one PNG for each example and a contact sheet of the first 64.

    File names contain the examples' numbers and names; names need not be unique.

    Args:
      examples: Examples to draw.
      predictions: Predictions for the examples, in the same order; any further ones are ignored.
      layers: Numbers of the layers that reduce tokens, counted from 1.
      out: Folder for the files.
    """
    out = paths.check_writable(out)
    drawn = strips(examples, predictions)
    legend = "" if predictions.merge_maps is None else MERGE_LEGEND
    for number, (strip, example) in enumerate(zip(drawn, examples, strict=True)):
        stem = _short(pathlib.Path(example.name).stem.replace(" ", "_"))
        titles = headings(predictions, layers, slice(number, number + 1))
        save(panel([strip], titles, legend=legend), out / f"{number:03d}_{stem}.png")
    shown = drawn[:ON_SHEET]
    titles = headings(predictions, layers, slice(len(shown)))
    columns = 2 if len(drawn) > 3 and len(titles) <= SIDE_BY_SIDE else 1
    sheet = panel(shown, titles, columns=columns, legend=legend)
    return Drawn(drawn, save(sheet, out / SHEET))


def _short(name: str) -> str:
    """Cuts a name to what is left for it in a file name."""
    return os.fsencode(name)[:200].decode(errors="ignore") if len(name) > 50 else name


def _pictures(example: Example, predictions: Predictions, index: int) -> list[Picture]:
    """The pictures of a model's decisions about an example."""
    pictures: list[Picture] = []
    coarse, probability = predictions.coarse, predictions.coarse_probability
    if coarse is not None and probability is not None:
        region_grid = coarse.shape[1:]
        decided = coarse[index].reshape(-1), probability[index].reshape(-1)
        strip = gate_strip(example.image, *decided, region_grid)
        pictures += strip.pictures[1:]
    if predictions.merge_maps is not None:
        maps = predictions.merge_maps[index]
        regions = None if coarse is None else coarse[index]
        pictures += [
            merge_map(example.image, maps[stage], coarse=regions)
            for stage in shown_stages(len(maps))
        ]
    return pictures


def _class_names(config: ConfigDict) -> tuple[str, ...]:
    """Names of the classes; empty if the run's data set is not available."""
    try:
        return pipeline.dataset_info(config).class_names
    except UserError:
        return ()


def _caption(example: Example, predictions: Predictions, index: int) -> str:
    predicted = int(predictions.labels[index])
    sure = predictions.probabilities[index, predicted]
    shown = example.name
    if example.label is not None:
        shown = f"label {predictions.class_name(example.label)}"
    caption = f"{shown} · predicted {predictions.class_name(predicted)} ({sure:.0%})"
    tokens = f"{predictions.tokens[index]}"
    if predictions.coarse is not None:
        tokens += f" of {REGION**2 * predictions.coarse[index].size}"
    if predictions.merge_maps is not None:
        tokens += f" tokens, {count_tokens(predictions.merge_maps[index])[-1]} after the last layer"
        return f"{caption} · {tokens}"
    return f"{caption} · {tokens} tokens"
