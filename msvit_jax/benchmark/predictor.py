"""Measures what a Predictor adds to the compiled programs that it runs.

    python -m msvit_jax.benchmark.predictor [--model=msvit_deit_small_patch16_224] [--tokens=128]
        [--batch=32] [--images=256] [--rounds=5] [--set=width=64 --set=depth=4]

From files to answers: JPEGs of ImageNet's typical size (500 x 375 pixels) are classified by the
model and by the dense model under it, then the programs that each call ran are run again with the
arrays that they had. `share` is the programs' time over that of the whole call.

One image at a time: the gated model keeps all tokens, so that nothing is saved, beside the dense
model; `over_dense` is its time over the dense model's, from an array to an answer.

Random weights; all sides in turns after a warmup. Prints a table, then one JSON object as the last
line.
"""

import functools
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from msvit_jax import process_tuning
from msvit_jax.benchmark.exits import model_options, print_records, random_variables
from msvit_jax.benchmark.input import photo_jpegs
from msvit_jax.benchmark.sides import timed
from msvit_jax.benchmark.turns import spread, time_interleaved
from msvit_jax.errors import UserError, refuse_arguments, run
from msvit_jax.inference import Predictor
from msvit_jax.models import registry
from msvit_jax.models.interface import ImageModel

COLUMNS = ("side", "batch", "images_per_second", "share", "milliseconds", "over_dense")
_SINGLES = 8  # images that are answered one by one in each round


def measure(
    model: str,
    *,
    tokens: float,
    batch: int,
    images: int,
    rounds: int,
    overrides: dict[str, Any],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measures whole calls beside their programs, then single images beside the dense model.

    Args:
      model: Name of a model with a gate that has a threshold.
      tokens: Mean number of patch tokens per image that the gate is calibrated to.
      batch: Number of images of a call of a compiled program.
      images: Number of files that are classified in each round.
      rounds: Number of measured rounds, after one warmup round.
      overrides: Attributes of the model; the dense model takes those that it has.
      seed: Seed of the weights and images.

    Raises:
      UserError: The model has no threshold.
    """
    gated = registry.create_model(model, **overrides)
    if not gated.has_threshold:
        raise UserError(f"{model!r} has no gate with a threshold; choose an msvit_... model.")
    taken = {k: v for k, v in overrides.items() if k in registry.dense_options(model)}
    dense = registry.create_model(registry.dense_model(model), **taken)
    models = {"dense": dense, "gated": gated}
    weights = {name: random_variables(m, seed) for name, m in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        files = _write_photos(pathlib.Path(folder), images, seed)
        records = _whole_calls(models, weights, files, tokens, batch, rounds)
    return records + _single_images(models, weights, rounds, seed)


def _write_photos(folder: pathlib.Path, count: int, seed: int) -> list[pathlib.Path]:
    files = [folder / f"{index}.jpg" for index in range(count)]
    for file, jpeg in zip(files, photo_jpegs(count, seed), strict=True):
        file.write_bytes(jpeg)
    return files


def _whole_calls(
    models: dict[str, ImageModel],
    weights: dict[str, Any],
    files: Sequence[pathlib.Path],
    tokens: float,
    batch: int,
    rounds: int,
) -> list[dict[str, Any]]:
    sides: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        predictor = Predictor(model, weights[name], batch_size=batch)
        if model.has_threshold:
            predictor.calibrate(files, tokens, fit_buckets=True)
        predictor(files)  # compiles
        sides[name] = functools.partial(predictor, files)
        sides[f"{name}, programs"] = _programs_of(predictor, files)
    seconds = time_interleaved([[timed(side)] for side in sides.values()], rounds, warmup=1)
    records = []
    for index, name in enumerate(models):
        whole, programs = seconds[:, 2 * index], seconds[:, 2 * index + 1]
        records.append(
            {
                "side": f"{name}, files to answers",
                "batch": batch,
                **spread("images_per_second", len(files) / whole),
                **spread("share", programs / whole),
            }
        )
    return records


def _programs_of(predictor: Predictor, files: Sequence[pathlib.Path]) -> Callable[[], Any]:
    """Returns a function that runs the programs of a call again, with the arrays they had."""
    executables = predictor._executables
    calls: list[Callable[[], Any]] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(functools.partial(function, *arguments))
            return function(*arguments)

        return call

    kept = {name: getattr(executables, name) for name in ("run_gate", "answer")}
    for name, function in kept.items():
        setattr(executables, name, noted(function))
    try:
        predictor(files)
    finally:
        for name, function in kept.items():
            setattr(executables, name, function)
    return lambda: [call() for call in calls]


def _single_images(
    models: dict[str, ImageModel], weights: dict[str, Any], rounds: int, seed: int
) -> list[dict[str, Any]]:
    shape = (_SINGLES, 1, *models["dense"].image_shape)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    sides = []
    for name, model in models.items():
        predictor = Predictor(model, weights[name], batch_size=1)
        if model.has_threshold:
            predictor.threshold = 1.0  # no probability of staying coarse exceeds it
        predictor(pixels[0])  # compiles
        sides.append([timed(predictor, image) for image in pixels])
    seconds = time_interleaved(sides, rounds, warmup=1) / _SINGLES
    return [
        {
            "side": f"{name}, one image",
            "batch": 1,
            **spread("milliseconds", 1e3 * column),
            **spread("over_dense", column / seconds[:, 0]),
        }
        for name, column in zip(models, seconds.T, strict=True)
    ]


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and prints its results."""
    refuse_arguments(argv)
    logging.set_verbosity(logging.ERROR)
    kept = process_tuning.keep_freed_memory()
    given = flags.FLAGS
    records = measure(
        given.model,
        tokens=given.tokens,
        batch=given.batch,
        images=given.images,
        rounds=given.rounds,
        overrides=model_options(given.set),
    )
    print_records(records, COLUMNS, kept)


if __name__ == "__main__":
    flags.DEFINE_string("model", "msvit_deit_small_patch16_224", "Name of a model with a gate.")
    flags.DEFINE_float("tokens", 128, "Mean number of patch tokens that the gate is calibrated to.")
    flags.DEFINE_integer("batch", 32, "Number of images in a call of a compiled program.")
    flags.DEFINE_integer("images", 256, "Number of files that are classified in each round.")
    flags.DEFINE_integer(
        "rounds", 5, "Number of times that all cases run, after one warm-up round."
    )
    flags.DEFINE_multi_string(
        "set", [], "Attribute of the models, e.g. --set=width=64; may be repeated."
    )
    run(main)
