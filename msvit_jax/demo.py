"""The library's main use in a few minutes on two CPU cores: a dense ViT, then MSViT from it.

    python -m msvit_jax.demo --workdir=runs/demo [--data_dir=DIR]

Trains configs/digits_vit.py and configs/digits_msvit.py for fewer epochs than the studies do,
evaluates both with the same evaluation, measures their speed, and draws where MSViT kept its fine
tokens. The same command resumes it where it was stopped; after the end it only evaluates, measures
and draws again.
"""

import itertools
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from msvit_jax import checkpoint, config, data, errors, evaluate, paths, process_tuning
from msvit_jax.inference import Predictor
from msvit_jax.run_log import duration
from msvit_jax.train import loop
from msvit_jax.visualize import examples

COLUMNS = ("model", "top-1 %", "tokens / image", "GMACs / image", "images / s")
TIMED_BATCH, TIMED_IMAGES = 128, 2000
TIMED_CALLS = 7  # calls of each model
BUCKETS = (28, 34, 43)  # capacities in tokens, besides the whole grid
PICTURES = 12
# Goals of MSViT; a run that misses one says so.
MOST_TOKENS, LEAST_POINTS, LEAST_SPEED = 0.6, -1.0, 1.2
# Fewer epochs than the studies, as many as two cores do in the demo's time, and one evaluation.
BOTH = {
    "data.cache": True,
    "eval_every_epochs": 1e3,
    "log_every_steps": 25,
    "log_images": 0,
    "terminal": "bar",
}
DENSE = {**BOTH, "epochs": 3.5, "optimizer.warmup_epochs": 0.5}
MSVIT = {**BOTH, "epochs": 1.4, "optimizer.warmup_epochs": 0.2}


def main(argv: Sequence[str]) -> None:
    """Runs the demo."""
    errors.refuse_arguments(argv)
    process_tuning.keep_freed_memory()
    process_tuning.make_devices_of_cores()
    run(paths.parse(flags.FLAGS.workdir), {"data.data_dir": flags.FLAGS.data_dir})


def run(workdir: pathlib.Path, overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains, evaluates, measures and draws.

    Args:
      workdir: Directory in which both runs get a folder, and the pictures another.
      overrides: Overrides of both configs, on top of the demo's own.

    Returns:
      Rows of the table.
    """
    start = time.perf_counter()

    def heading(text: str) -> None:
        print(f"\n== {text} ({duration(time.perf_counter() - start)} so far)", flush=True)

    dense_dir, msvit_dir = workdir / "vit", workdir / "msvit"
    heading("1/4 Dense ViT: all tokens for every image")
    dense = _train("digits_vit.py", dense_dir, DENSE | overrides)
    heading("2/4 MSViT from its weights: coarse tokens where the gate finds nothing")
    from_dense = {"init_from": str(dense_dir)}
    msvit = _train("digits_msvit.py", msvit_dir, MSVIT | from_dense | overrides)
    heading("3/4 Speed of both")
    runs = {"ViT": checkpoint.load_run(dense_dir), "MSViT": checkpoint.load_run(msvit_dir)}
    speeds = images_per_second(list(runs.values()))
    heading("4/4 Pictures")
    drawn = examples.draw_run(runs["MSViT"], workdir / "pictures", count=PICTURES)
    rows = [
        _row(name, figures, speed)
        for name, figures, speed in zip(runs, (dense, msvit), speeds, strict=True)
    ]
    _report(rows, drawn.sheet, time.perf_counter() - start)
    return rows


def images_per_second(runs: Sequence[checkpoint.Run]) -> list[float]:
    """Measures models on the same images, warm and in turns: median speed of each in images/s.

    Measured from pixels on the CPU to answers there, through the Predictor, which runs each image
    with the tokens that its gate keeps. Models take turns, because a machine that slows down then
    slows down all of them.
    """
    images = _evaluation_images(runs[0])
    predictors = [
        Predictor(
            run.model, run.variables, batch_size=TIMED_BATCH, layout="budget", buckets=buckets
        )
        for run, buckets in zip(runs, (None, BUCKETS), strict=True)
    ]
    times: list[list[float]] = [[] for _ in runs]
    for predictor in predictors:
        predictor.warm_up()(images)
    for _ in range(TIMED_CALLS):
        for predictor, spent in zip(predictors, times, strict=True):
            start = time.perf_counter()
            predictor(images)
            spent.append(time.perf_counter() - start)
    return [len(images) / statistics.median(spent) for spent in times]


def _evaluation_images(run: checkpoint.Run) -> np.ndarray:
    """Returns the first evaluation images, uint8."""
    batches = data.eval_batches(run.config.data, batch_size=TIMED_BATCH)
    found = [
        b["image"][b["valid"]] for b in itertools.islice(batches, -(-TIMED_IMAGES // TIMED_BATCH))
    ]
    return np.concatenate(found)[:TIMED_IMAGES]


def _train(name: str, workdir: pathlib.Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Trains or resumes one config and returns the figures of its evaluation at the end."""
    figures = loop.train(config.load(str(config.packaged_folder() / name), overrides), workdir)
    if "step" in figures:  # only for a run that was stopped
        raise errors.UserError("The demo was stopped; the same command goes on from there.")
    return figures


def _row(name: str, figures: dict[str, Any], speed: float) -> dict[str, Any]:
    values = (figures["top1"], figures["tokens_mean"], figures["gmacs_mean"], speed)
    return dict(zip(COLUMNS, (name, *(float(value) for value in values)), strict=True))


def _report(rows: list[dict[str, Any]], sheet: pathlib.Path, seconds: float) -> None:
    print(f"\n{evaluate.table(rows, COLUMNS)}\n")
    print(f"Where MSViT kept fine tokens: {sheet}\nThe demo took {duration(seconds)}.")
    print(verdict(*rows))


def verdict(dense: dict[str, Any], msvit: dict[str, Any]) -> str:
    """States whether MSViT reached its goals: fewer tokens, as accurate, in less time.

    Args:
      dense: Row of the dense model.
      msvit: Row of MSViT.
    """
    tokens = msvit["tokens / image"] / dense["tokens / image"]
    points = msvit["top-1 %"] - dense["top-1 %"]
    macs = dense["GMACs / image"] / msvit["GMACs / image"]
    faster = msvit["images / s"] / dense["images / s"]
    shown = (
        f"{tokens:.0%} of the tokens, {macs:.2f} times fewer multiply-accumulates, "
        f"{faster:.2f} times as many images a second, {points:+.1f} points of top-1"
    )
    missed = [
        text
        for text, reached in (
            (f"at most {MOST_TOKENS:.0%} of the tokens", tokens <= MOST_TOKENS),
            (f"at least {LEAST_POINTS:+.0f} point of top-1", points >= LEAST_POINTS),
            (f"at least {LEAST_SPEED} times as many images a second", faster >= LEAST_SPEED),
        )
        if not reached
    ]
    if not missed:
        return f"MSViT did what it is for: {shown}."
    return (
        f"MSViT did NOT do what it is for: {shown}; expected were {' and '.join(missed)}.\n"
        "Images a second mean little on a busy machine: run the same command again when it is "
        "idle. What went wrong in training stands in its warnings above and in metrics.jsonl."
    )


if __name__ == "__main__":
    # Here, because flags are global and other commands have some of these names too.
    flags.DEFINE_string("workdir", "runs/demo", "Folder for both runs and the pictures.")
    flags.DEFINE_string("data_dir", "", "Folder of data sets; empty for TFDS's default.")
    errors.run(main)
