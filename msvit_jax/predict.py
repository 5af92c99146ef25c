"""Classifies image files with a trained run, or with a weights file of any format.

    python -m msvit_jax.predict --workdir=RUN photos/ more/*.jpg [--tokens=100] [--pictures=DIR]
    python -m msvit_jax.predict --weights=FILE --model=NAME photos/

Takes files, folders and globs. A weights file written by this library names its model itself. The
program prints a table, then one JSON object as the last line; --out=answers.csv (or .jsonl) gets
each answer as soon as it is known. --tokens sets the gate's threshold so that these images get that
many tokens on average; --pictures draws where the tokens went. --gmacs_budget=GMACS sets a
cascade's exits by the thresholds that `msvit eval` fitted.

A segmenter writes a PNG of class numbers for each image into --out=DIR.

Files that cannot be read are named and skipped; with --on_error=stop all files are read before the
first is classified, and one that cannot be read ends the program. Files passed over in folders are
counted.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msvit_jax import (
    checkpoint,
    errors,
    evaluate,
    extras,
    flops,
    paths,
    predict_masks,
    process_tuning,
    weights,
)
from msvit_jax.data import decode, image_files
from msvit_jax.data.image_files import shown
from msvit_jax.errors import UserError
from msvit_jax.inference import Predictions, Predictor
from msvit_jax.inference.answer_files import AnswerFile
from msvit_jax.inference.images import find_files, find_unreadable
from msvit_jax.models.interface import SEGMENTATION

with extras.needed("train"):
    import tqdm
    from absl import flags

COLUMNS = ("file", "class", "probability", "tokens")
_CALIBRATED_ON = 1000  # largest number of files to calibrate on
_NAMED = 20  # largest number of unreadable files that a message names


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command; the flags' help describes each."""

    workdir: str | None = None
    weights: str | None = None
    model: str | None = None
    which: str = "best"
    batch_size: int = 32
    layout: str = "auto"
    tokens: float | None = None
    gmacs_budget: float | None = None
    pictures: str | None = None
    out: str | None = None
    on_error: str = "skip"
    exif_orientation: bool | None = None


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    given = flags.FLAGS
    names = [field.name for field in dataclasses.fields(Options)]
    run(argv[1:], Options(**{name: getattr(given, name) for name in names}))


def run(patterns: Sequence[str], options: Options) -> None:
    """Finds images, predicts, prints the answers and draws pictures.

    Args:
      patterns: Files, folders and globs.
      options: Options of the command.

    Raises:
      UserError: Nothing is found, nothing can be read, or an output cannot be written.
    """
    process_tuning.keep_freed_memory()
    checkpoint.quiet_orbax()
    found = find_files(patterns)
    files = found.files
    if not files:
        raise UserError("Name the image files to classify, or a folder or glob of them.")
    for line in image_files.passed_over_lines(found.passed_over):
        print(f"passed over: {line}")
    predictor, source = _load(options)
    if predictor.model.task == SEGMENTATION:
        predict_masks.run(predictor, source, files, options)
        return
    if options.pictures:
        _check_pictures(predictor, options.pictures)
    if options.on_error == "stop":
        _check_files(predictor, files)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(AnswerFile(options.out)) if options.out else None
        if options.tokens is not None:
            _calibrate(predictor, files, options)
        predictions = _predict(predictor, files, options, out)
    failed = {files[number]: reason for number, reason in predictions.failed.items()}
    for line in _failed_lines(failed):
        print(f"skipped {line}")
    good = [number for number in range(len(files)) if number not in predictions.failed]
    if not good:
        raise UserError(f"None of the {len(files)} files can be read as an image.")
    files, predictions = [files[number] for number in good], predictions.take(good)
    rows = _rows(files, predictions)
    print(
        evaluate.table([{**row, "file": shown(row["file"])} for row in rows], COLUMNS), flush=True
    )
    trouble = None
    if options.pictures:
        try:
            _draw(predictor, files, predictions, paths.parse(options.pictures))
        except OSError as error:  # a full disk: the answers are printed all the same
            trouble = error
    macs = flops.macs_per_image(predictor.model, predictions.tokens)
    summary = {
        **source,
        "images": len(files),
        "skipped": {str(file): reason for file, reason in failed.items()},
        "passed_over": {reason: len(paths) for reason, paths in found.passed_over.items()},
        "threshold": predictor.threshold,
        "thresholds": predictor.thresholds,
        "tokens_mean": float(predictions.tokens.mean()),
        "gmacs_mean": float(macs.mean()) / 1e9,
    }
    print(json.dumps({**summary, "predictions": rows}))
    if trouble:
        raise trouble


def _predict(
    predictor: Predictor, files: Sequence[pathlib.Path], options: Options, out: AnswerFile | None
) -> Predictions:
    def answered(numbers: list[int], predictions: Predictions) -> None:
        if out:
            out.write(_rows([files[number] for number in numbers], predictions))

    with tqdm.tqdm(total=len(files), unit="image", disable=None) as bar:
        predictions = predictor(
            files, on_error=options.on_error, answered=answered, progress=bar.update
        )
    if out:
        failed = predictions.failed.items()
        out.write({"file": str(files[number]), "error": reason} for number, reason in failed)
    return predictions


def _check_files(predictor: Predictor, files: Sequence[pathlib.Path]) -> None:
    """Checks all files before anything is computed."""
    bad = find_unreadable(files, predictor.reading())
    if bad:
        raise UserError(
            f"{len(bad)} of {len(files)} files cannot be read as images; nothing was computed.\n"
            + "\n".join(f"  {line}" for line in _failed_lines(bad))
            + "\nRepair or remove them, or leave them out with --on_error=skip."
        )


def _failed_lines(failed: Mapping[pathlib.Path, str]) -> list[str]:
    lines = [f"{shown(file)}: {reason}" for file, reason in failed.items()]
    more = [f"{len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return lines[:_NAMED] + more


def _load(given: Options) -> tuple[Predictor, dict[str, Any]]:
    """Loads the Predictor, and a description of its source."""
    if bool(given.workdir) == bool(given.weights):
        raise UserError("Give --workdir=DIR, or --weights=FILE (with --model=NAME).")
    options: dict[str, Any] = {
        "gmacs_budget": given.gmacs_budget,
        "batch_size": given.batch_size,
        "layout": given.layout,
        "model": given.model,
    }
    if given.exif_orientation is not None:
        options["exif_orientation"] = given.exif_orientation
    if given.weights:
        if weights.file_of(given.weights) is None:
            raise UserError(f"There is no weights file {given.weights!r}.")
        predictor = Predictor.load(given.weights, **options)
        if not predictor.model.num_classes:
            raise errors.UserError(
                f"{given.weights!r} has no head, so it cannot classify. In Python, "
                "Predictor.load(...)(images).features returns its features."
            )
        assert predictor.report is not None
        print(f"{given.weights}: {predictor.report}\n")
        return predictor, {"weights": given.weights}
    assert given.workdir
    step = checkpoint.find_step(given.workdir, given.which)
    predictor = Predictor.load(given.workdir, str(step), **options)
    return predictor, {"workdir": given.workdir, "step": step}


def _calibrate(predictor: Predictor, files: Sequence[pathlib.Path], options: Options) -> None:
    assert options.tokens is not None
    spread = np.unique(np.linspace(0, len(files) - 1, _CALIBRATED_ON).astype(int))
    sample = [files[index] for index in spread]
    reached = predictor.calibrate(
        sample, options.tokens, on_error=options.on_error, fit_buckets=bool(predictor.buckets)
    )
    print(
        f"gate threshold {reached.threshold:.4g}: {reached.tokens:.4g} tokens per image on "
        f"{reached.images} of the images\n"
    )


def _rows(files: Sequence[pathlib.Path], predictions: Predictions) -> list[dict[str, Any]]:
    best = predictions.probabilities.max(axis=1)
    columns = (predictions.labels, predictions.names, best, predictions.tokens)
    return [
        {
            "file": str(file),
            "label": int(label),
            "class": name,
            "probability": float(probability),
            "tokens": int(tokens),
        }
        for file, label, name, probability, tokens in zip(files, *columns, strict=True)
    ]


def _check_pictures(predictor: Predictor, out: str) -> None:
    """Checks the pictures' folder and the model before anything is computed."""
    from msvit_jax.visualize import examples  # brings matplotlib

    folder = paths.check_writable(out, "--pictures", make=False)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / examples.SHEET).exists():
        raise UserError(
            f"--pictures={out} holds other files, and pictures could replace some of them; give a "
            "folder for them alone."
        )

    if not examples.has_pictures(predictor.model):
        raise UserError(
            "--pictures draws what a gate decided and which tokens were merged; this model does "
            "neither."
        )


def _draw(
    predictor: Predictor, files: Sequence[pathlib.Path], predictions: Predictions, out: pathlib.Path
) -> None:
    """Draws the first images, as many as a contact sheet shows."""
    from msvit_jax.visualize import examples  # brings matplotlib

    how = (predictor.model.image_size, predictor.crop, predictor.exif_orientation)
    first = [
        examples.Example(decode.read_file(file, *how), shown(file.name))
        for file in files[: examples.ON_SHEET]
    ]
    drawn = examples.write(first, predictions, examples.reducing_layers(predictor.model), out)
    print(f"\npictures of {len(first)} of {len(files)} images in {out}, together in {drawn.sheet}")


if __name__ == "__main__":
    # Here, because flags are global and other commands have some of these names too.
    flags.DEFINE_string("workdir", None, "Workdir of a trained run.")
    flags.DEFINE_string("weights", None, "Weights file to use instead of a run.")
    flags.DEFINE_string("model", None, "Name of the model, if the weights file does not state it.")
    flags.DEFINE_string("which", "best", "Checkpoint to use: 'best', 'latest' or a step.")
    flags.DEFINE_integer("batch_size", 32, "Number of images run at a time.", lower_bound=1)
    flags.DEFINE_string(
        "layout", "auto", "Layout of the tokens: 'auto', 'slots', 'budget' or 'rows'."
    )
    flags.DEFINE_float(
        "tokens", None, "Mean number of patch tokens per image that the gate is set to."
    )
    flags.DEFINE_float(
        "gmacs_budget", None, "Mean GMACs per image that a cascade's exits are set to."
    )
    flags.DEFINE_string("pictures", None, "Folder for pictures of where the tokens went.")
    flags.DEFINE_string(
        "out",
        None,
        "New .csv or .jsonl file for the answers, written as they come; for a segmenter, folder "
        "for PNGs.",
    )
    flags.DEFINE_enum(
        "on_error", "skip", ["stop", "skip"], "Whether to stop at unreadable files or skip them."
    )
    flags.DEFINE_bool(
        "exif_orientation",
        None,
        "Whether to rotate photos upright by their EXIF data; by default as the model was trained.",
    )
    errors.run(main)
