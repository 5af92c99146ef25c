"""Easy and hard examples: which images leave a cascade at which exit."""

import pathlib
from collections.abc import Sequence

import numpy as np

from msvit_jax import checkpoint, paths
from msvit_jax.inference import Predictions, Predictor
from msvit_jax.inference.budgets import fitted_thresholds
from msvit_jax.visualize.examples import (
    BATCH,
    SHEET,
    Drawn,
    Example,
    check_classes,
    from_dataset,
    from_files,
)
from msvit_jax.visualize.maps import enlarge
from msvit_jax.visualize.sheet import Strip, panel, save

LOOKED_AT = 25  # times as many images of a split are run as are drawn for each exit


def draw_run(
    run: checkpoint.Run,
    out: pathlib.Path | str,
    *,
    workdir: pathlib.Path | str,
    budget: float | None = None,
    files: Sequence[str] = (),
    count: int = 8,
) -> Drawn:
    """Draws images that leave at each exit of a trained cascade.

    Args:
      run: of a cascade.
      out: folder for the picture.
      workdir: of the run.
      budget: mean GMACs per image, by the thresholds that eval.py fitted; None: halfway between
        those of the first and the last exit, by thresholds set for these very images.
      files: paths of images; without them examples of the evaluation split.
      count: pictures of each exit.

    Raises:
      UserError: see `examples.from_files`, `examples.from_dataset` and `fitted_thresholds`.
    """
    config = run.config.data
    paths.check_writable(out, make=False)  # before the work
    if not files:
        check_classes(run)
    examples = from_files(files, config) if files else from_dataset(config, LOOKED_AT * count)
    images = np.stack([example.image for example in examples])
    predictor = Predictor(run.model, run.variables, batch_size=min(BATCH, len(images)))
    if budget is None:
        macs = run.model.exit_macs()
        predictor.calibrate_exits(images, float(macs[0] + macs[-1]) / 2e9)
    else:
        predictor.thresholds = fitted_thresholds(workdir, budget)
    predictions = predictor(images)
    drawn = strips(examples, predictions, run.model.exit_tokens, count)
    return Drawn(drawn, save(panel(drawn), paths.parse(out) / SHEET))


def strips(
    examples: Sequence[Example], predictions: Predictions, tokens: np.ndarray, count: int
) -> list[Strip]:
    """A strip for each exit: images that left there, from those it was surest of to the others.

    Args:
      examples: the images.
      predictions: of a cascade, about them.
      tokens: [stages] patch tokens of each exit.
      count: pictures of a strip; white ones where fewer left.
    """
    assert predictions.exits is not None
    sure = predictions.probabilities.max(axis=1)
    made = []
    for stage, size in enumerate(tokens):
        left = np.flatnonzero(predictions.exits == stage)
        ordered = left[np.argsort(-sure[left], kind="stable")]
        places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).astype(int))
        shown = [enlarge(examples[index].image) for index in ordered[places].tolist()]
        blank = np.full_like(enlarge(examples[0].image), 255)
        caption = f"exit {stage + 1}, {size} tokens: {len(left)} of {len(examples)} images"
        caption += _right(examples, predictions, left)
        made.append(Strip([*shown, *[blank] * (count - len(shown))], caption))
    return made


def _right(examples: Sequence[Example], predictions: Predictions, left: np.ndarray) -> str:
    """How many of some images are classified rightly, where that is known."""
    labels = [examples[index].label for index in left.tolist()]
    if not labels or None in labels:
        return ""
    return f", {np.mean(predictions.labels[left] == np.asarray(labels)):.0%} of them right"
