"""Classifies image files with a trained run, or with a weights file of any format.

    python -m msvit_jax.predict --workdir=RUN photos/ more/*.jpg [--tokens=100] [--pictures=DIR]
    python -m msvit_jax.predict --weights=FILE --model=NAME photos/

Takes files, folders and globs. A weights file of ours says itself what its model is. Prints a
table, then one JSON object as the last line. --tokens sets the gate's threshold so that these
images get that many tokens on average; --pictures draws where the tokens went. --budget=GMACS sets
a cascade's exits by the thresholds that eval.py fitted.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags

from msvit_jax import checkpoint, errors, evaluate, flops, host, paths, weights
from msvit_jax.data import decode
from msvit_jax.inference import Predictions, Predictor
from msvit_jax.inference.images import find_files

COLUMNS = ("file", "class", "probability", "tokens")
_CALIBRATED_ON = 1000  # files at most


def main(argv: Sequence[str]) -> None:
    """Finds, predicts, prints, draws."""
    host.keep_freed_memory()
    checkpoint.quiet_orbax()
    files = find_files(argv[1:])
    if not files:
        raise errors.UserError("Name the image files to classify, or a folder or glob of them.")
    given = flags.FLAGS
    predictor, source = _load(given)
    if given.pictures:
        _check_pictures(predictor)
    if given.tokens is not None:
        _calibrate(predictor, files, given.tokens)
    with tqdm.tqdm(total=len(files), unit="image", disable=None) as bar:
        predictions = predictor(files, progress=bar.update)
    rows = _rows(files, predictions)
    print(evaluate.table(rows, COLUMNS), flush=True)
    if given.pictures:
        _draw(predictor, files, predictions, paths.parse(given.pictures))
    macs = flops.macs_per_image(predictor.model, predictions.tokens)
    summary = {
        **source,
        "images": len(files),
        "threshold": predictor.threshold,
        "thresholds": predictor.thresholds,
        "tokens_mean": float(predictions.tokens.mean()),
        "gmacs_mean": float(macs.mean()) / 1e9,
    }
    print(json.dumps({**summary, "predictions": rows}))


def _load(given: Any) -> tuple[Predictor, dict[str, Any]]:
    """The Predictor, and what to say of where it is from."""
    if bool(given.workdir) == bool(given.weights):
        raise errors.UserError("Give --workdir=DIR, or --weights=FILE (with --model=NAME).")
    options = {
        "budget": given.budget,
        "batch_size": given.batch_size,
        "layout": given.layout,
        "model": given.model,
    }
    if given.weights:
        if weights.file_of(given.weights) is None:
            raise errors.UserError(f"There is no weights file {given.weights!r}.")
        predictor = Predictor.load(given.weights, **options)
        assert predictor.report is not None
        print(f"{given.weights}: {predictor.report}\n")
        return predictor, {"weights": given.weights}
    step = checkpoint.find_step(given.workdir, given.which)
    predictor = Predictor.load(given.workdir, str(step), **options)
    return predictor, {"workdir": given.workdir, "step": step}


def _calibrate(predictor: Predictor, files: Sequence[pathlib.Path], tokens: float) -> None:
    spread = np.unique(np.linspace(0, len(files) - 1, _CALIBRATED_ON).astype(int))
    reached = predictor.calibrate([files[index] for index in spread], tokens)
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


def _check_pictures(predictor: Predictor) -> None:
    """Before anything is computed."""
    from msvit_jax.visualize import examples  # brings matplotlib

    if not examples.has_pictures(predictor.model):
        raise errors.UserError(
            "--pictures draws what a gate decided and which tokens were merged; this model does "
            "neither."
        )


def _draw(
    predictor: Predictor, files: Sequence[pathlib.Path], predictions: Predictions, out: pathlib.Path
) -> None:
    """Draws as many images as a contact sheet shows, the first ones."""
    from msvit_jax.visualize import examples  # brings matplotlib

    shown = [
        examples.Example(
            decode.read_file(file, predictor.model.image_size, predictor.crop), file.name
        )
        for file in files[: examples.ON_SHEET]
    ]
    drawn = examples.write(shown, predictions, examples.reducing_layers(predictor.model), out)
    print(f"\npictures of {len(shown)} of {len(files)} images in {out}, together in {drawn.sheet}")


if __name__ == "__main__":
    # Here, because flags are global and other commands have some of these names too.
    flags.DEFINE_string("workdir", None, "Of a trained run.")
    flags.DEFINE_string("weights", None, "Weights file instead of a run.")
    flags.DEFINE_string("model", None, "Its model's name, where the file does not say it.")
    flags.DEFINE_string("which", "best", "'best', 'latest', or the step of a checkpoint.")
    flags.DEFINE_integer("batch_size", 32, "Images run at a time.", lower_bound=1)
    flags.DEFINE_string("layout", "auto", "'auto', 'slots', 'budget' or 'rows'.")
    flags.DEFINE_float("tokens", None, "Mean number of patch tokens per image to set the gate to.")
    flags.DEFINE_float("budget", None, "Mean GMACs per image to set a cascade's exits to.")
    flags.DEFINE_string("pictures", None, "Folder for pictures of where the tokens went.")
    errors.run(main)
