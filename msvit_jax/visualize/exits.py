"""Draws easy and hard examples: the images that leave a cascade at each exit."""

import pathlib
from collections.abc import Sequence

import numpy as np

from msvit_jax import checkpoint, paths
from msvit_jax.exits.budget_curve import fitted_thresholds
from msvit_jax.inference import Predictions, Predictor
from msvit_jax.pictures.maps import enlarge
from msvit_jax.pictures.sheet import Strip, panel, save
from msvit_jax.visualize.examples import (
    BATCH,
    SHEET,
    Drawn,
    Example,
    check_classes,
    from_dataset,
    from_files,
)

LOOKED_AT = 25  # images of a split that are run for each picture in a strip


def draw_run(
    run: checkpoint.Run,
    out: pathlib.Path | str,
    *,
    workdir: pathlib.Path | str,
    gmacs_budget: float | None = None,
    files: Sequence[str] = (),
    count: int = 8,
) -> Drawn:
    """Draws images that leave at each exit of a trained cascade.

    Args:
      run: A run of a cascade.
      out: Folder for the picture.
      workdir: Workdir of the run.
      gmacs_budget: Mean GMACs per image, which selects among the thresholds that eval.py fitted.
        None: the mean of the first and last exit's cost, with thresholds calibrated on these
        images.
      files: Paths of images; empty: examples of the evaluation split.
      count: Number of pictures per exit.

    Raises:
      UserError: The folder cannot be written, images or classes are unusable (see
        `examples.check_classes`, `examples.from_files` and `examples.from_dataset`), or no fitted
        thresholds match the budget (see `fitted_thresholds`).
    """
    config = run.config.data
    paths.check_writable(out, make=False)  # before the work
    if not files:
        check_classes(run)
    examples = from_files(files, config) if files else from_dataset(config, LOOKED_AT * count)
    images = np.stack([example.image for example in examples])
    predictor = Predictor(run.model, run.variables, batch_size=min(BATCH, len(images)))
    if gmacs_budget is None:
        macs = run.model.exit_macs()
        predictor.calibrate_exits(images, float(macs[0] + macs[-1]) / 2e9)
    else:
        predictor.thresholds = fitted_thresholds(workdir, gmacs_budget)
    predictions = predictor(images)
    drawn = strips(examples, predictions, run.model.exit_tokens, count)
    return Drawn(drawn, save(panel(drawn), paths.parse(out) / SHEET))


def strips(
    examples: Sequence[Example], predictions: Predictions, tokens: np.ndarray, count: int
) -> list[Strip]:
    """A strip for each exit: images that left there, from the most to the least certain.

    Args:
      examples: Images.
      predictions: Predictions of a cascade for the images.
      tokens: [stages], number of patch tokens of each exit.
      count: Number of pictures per strip; white ones fill up if fewer images left there.
    """
    assert predictions.exit_index is not None
    sure = predictions.probabilities.max(axis=1)
    made = []
    for stage, size in enumerate(tokens):
        left = np.flatnonzero(predictions.exit_index == stage)
        ordered = left[np.argsort(-sure[left], kind="stable")]
        chosen = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).astype(int))
        shown = [enlarge(examples[index].image) for index in ordered[chosen].tolist()]
        blank = np.full_like(enlarge(examples[0].image), 255)
        caption = f"exit {stage + 1}, {size} tokens: {len(left)} of {len(examples)} images"
        caption += _right(examples, predictions, left)
        made.append(Strip([*shown, *[blank] * (count - len(shown))], caption))
    return made


def _right(examples: Sequence[Example], predictions: Predictions, left: np.ndarray) -> str:
    """Text with the share of correctly classified images; empty if labels are not known."""
    labels = [examples[index].label for index in left.tolist()]
    if not labels or None in labels:
        return ""
    return f", {np.mean(predictions.labels[left] == np.asarray(labels)):.0%} of them right"
