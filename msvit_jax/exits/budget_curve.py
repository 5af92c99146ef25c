"""The budget curve of a trained cascade: accuracy over compute, with an exit chosen per image.

Thresholds are fitted on training images without augmentation and evaluated on the evaluation split.
"""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import config_dict

from msvit_jax import checkpoint, config_rules, data, extras, labels, paths, sharding
from msvit_jax.errors import UserError, describe, short
from msvit_jax.exits import exit_thresholds
from msvit_jax.models.interface import ImageModel
from msvit_jax.pixels import normalize

CSV_FILE, PLOT_FILE, FITTED_FILE = "budget_curve.csv", "budget_curve.png", "thresholds.json"
COLUMNS = ("kind", "budget", "gmacs_mean", "top1", "shares", "thresholds")
# GMACs (layer norms included) and top-1 of the paper's T2T-12 cascade on ImageNet (Wang et al.
# 2021, table 5).
PAPER = {
    "dvt_t2t_vit_12": {0.75: 73.70, 1.0: 76.22, 1.25: 77.89, 1.5: 78.89, 1.75: 79.47, 2.0: 79.75}
}


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits of all exits for a split, and its labels.

    Attributes:
      exit_logits: [n, stages, classes] float32, logits of every exit.
      labels: [n], class numbers.
    """

    exit_logits: np.ndarray
    labels: np.ndarray


def collect(
    model: ImageModel,
    params: Any,
    data_config: config_dict.ConfigDict,
    *,
    split: str,
    batch_size: int,
    mesh: Mesh,
) -> Logits:
    """Computes all exits for every image of a split, in order; the same on every process.

    Args:
      model: A cascade.
      params: Parameters of the cascade, on the mesh.
      data_config: The config's `data` section.
      split: Name of the split in TFDS syntax, such as 'train[:1000]'.
      batch_size: Global batch size, rounded up to a multiple of the number of devices.
      mesh: Devices, from `sharding.make_mesh`.
    """

    def run(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        images = normalize(batch["image"], model.mean, model.std)
        output = model.apply({"params": params}, images, train=False)
        return output.exit_logits, batch["label"], batch["valid"]

    step = jax.jit(run, out_shardings=sharding.replicated(mesh))
    size = -(-batch_size // mesh.size) * mesh.size
    found = []
    with jax.set_mesh(mesh):
        for batch in data.eval_batches(data_config, batch_size=size, split=split):
            wanted = {name: batch[name] for name in ("image", "label", "valid")}
            logits, labels, valid = jax.device_get(step(params, sharding.shard_batch(mesh, wanted)))
            found.append((logits[valid], labels[valid]))
    return Logits(*(np.concatenate(part) for part in zip(*found, strict=True)))


def curve(
    fit: Logits,
    held_out: Logits,
    exit_macs: np.ndarray,
    *,
    gmacs_budgets: Sequence[float] = (),
    criterion: str = "confidence",
) -> list[dict[str, Any]]:
    """Rows of the curve: every exit alone, the geometric scheme, and the search for each budget.

    Args:
      fit: Logits and labels to fit thresholds on.
      held_out: Logits and labels to evaluate the thresholds on.
      exit_macs: [stages], multiply-accumulates up to each exit, from `DVT.exit_macs`.
      gmacs_budgets: Mean GMACs per fitted image; empty: ten values, geometrically spaced from the
        first exit's cost to the last's.
      criterion: Measure of certainty, one of `exit_thresholds.CRITERIA`.

    Raises:
      UserError: A budget is below the first exit's cost, or the criterion is unknown.
    """
    ours = exit_thresholds.score(fit.exit_logits, fit.labels, criterion, seed=0)
    theirs = exit_thresholds.score(held_out.exit_logits, held_out.labels, criterion, seed=1)
    wanted = [budget * 1e9 for budget in gmacs_budgets]
    for macs_budget in wanted:
        exit_thresholds.check_budget(macs_budget, exit_macs)
    wanted = wanted or np.geomspace(exit_macs[0], exit_macs[-1], 10).tolist()
    rows = []
    for stage in range(len(exit_macs)):
        alone = [exit_thresholds.NEVER] * stage + [exit_thresholds.ALWAYS] * (
            len(exit_macs) - stage
        )
        point = exit_thresholds.judge(theirs, alone, exit_macs)
        rows.append(_row(f"exit {stage + 1}", None, point))
    rows += [
        _row("geometric", None, point)
        for point in exit_thresholds.geometric_curve(ours, theirs, exit_macs)
    ]
    for macs_budget in wanted:
        thresholds = exit_thresholds.search(ours, exit_macs, macs_budget)
        point = exit_thresholds.judge(theirs, thresholds, exit_macs)
        rows.append(_row("search", macs_budget, point))
    return rows


def _row(kind: str, macs_budget: float | None, point: exit_thresholds.Point) -> dict[str, Any]:
    return {
        "kind": kind,
        "budget": None if macs_budget is None else macs_budget / 1e9,
        "gmacs_mean": point.macs / 1e9,
        "top1": point.top1,
        "shares": list(point.shares),
        "thresholds": list(point.thresholds),
    }


def write(rows: Sequence[dict[str, Any]], directory: pathlib.Path, title: str, paper: bool) -> None:
    """Writes `CSV_FILE` and `PLOT_FILE`.

    Args:
      rows: Rows from `curve`.
      directory: Directory of the two files.
      title: Name of the model.
      paper: Whether the paper's points for this model are drawn as well.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for row in rows:
        lists = {name: " ".join(map(str, row[name])) for name in ("shares", "thresholds")}
        writer.writerow({**row, **lists})
    paths.write_whole(directory / CSV_FILE, text.getvalue())
    _draw(rows, directory, title, PAPER.get(title) if paper else None)


def _draw(
    rows: Sequence[dict[str, Any]],
    directory: pathlib.Path,
    title: str,
    paper: dict[float, float] | None,
) -> None:
    with extras.needed("plots"):
        from matplotlib import pyplot  # only needed here

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for kind, style in (("geometric", "-"), ("search", "o"), ("exit", "s")):
        points = [row for row in rows if row["kind"].startswith(kind)]
        macs, top1 = ([row[name] for row in points] for name in ("gmacs_mean", "top1"))
        label = "all images at one exit" if kind == "exit" else kind
        axes.plot(macs, top1, style, label=label)
    if paper:
        axes.plot(list(paper), list(paper.values()), "x", label="paper")
    axes.set(xlabel="GMACs per image (mean)", ylabel="top-1 (%)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format="png")
    paths.write_whole(directory / PLOT_FILE, drawn.getvalue())
    pyplot.close(figure)


def fitted_thresholds(workdir: str | pathlib.Path, gmacs_budget: float) -> tuple[float, ...]:
    """Thresholds that `eval.py --budget_curve` fitted for a run, the costliest within a budget.

    Args:
      workdir: Workdir of the run.
      gmacs_budget: Mean GMACs per image.

    Raises:
      UserError: None were fitted, or all of them cost more than the budget.
    """
    path = paths.parse(workdir) / FITTED_FILE
    if not path.is_file():
        raise UserError(
            f"{workdir} has no fitted thresholds; run eval.py --workdir={workdir} --budget_curve."
        )
    fitting = [row for row in _read_fitted(path) if row["budget"] <= gmacs_budget + 1e-12]
    if not fitting:
        raise UserError(
            f"No thresholds in {path} spend {gmacs_budget:.4g} GMACs or less; fit some "
            f"with eval.py --budget_curve --gmacs_budgets={gmacs_budget:.4g}."
        )
    return tuple(max(fitting, key=lambda row: row["budget"])["thresholds"])


def _read_fitted(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the thresholds of each budget; raises UserError if the file does not hold them."""
    finite = config_rules.Number()
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            thresholds = row["thresholds"]
            exit_thresholds.check(thresholds, len(thresholds) + 1)
            if not finite.fits(row["budget"]):
                raise ValueError(f"a budget of {row['budget']!r}")
        return rows
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{str(path)!r} is damaged ({short(describe(error), 200)}); make it anew with eval.py "
            "--budget_curve."
        ) from error


def curve_of_run(
    model: ImageModel,
    params: Any,
    workdir: pathlib.Path,
    *,
    split: str | None,
    batch_size: int,
    mesh: Mesh,
    data_config: config_dict.ConfigDict | None = None,
    gmacs_budgets: Sequence[float] = (),
    criterion: str = "confidence",
    fit_examples: int = 20_000,
) -> list[dict[str, Any]]:
    """Computes and writes the curve of a trained run.

    Args:
      model: Model of the run.
      params: Parameters of the model, on the mesh.
      workdir: Workdir of the run.
      split: Split to evaluate on; None: the config's `eval_split`.
      batch_size: Global batch size.
      mesh: Devices, from `sharding.make_mesh`.
      data_config: A config's `data` section; None: the run's.
      gmacs_budgets: Mean GMACs per fitted image; empty: ten values, see `curve`.
      criterion: Measure of certainty, one of `exit_thresholds.CRITERIA`.
      fit_examples: Number of training images to fit on.

    Raises:
      UserError: The model is not a cascade; see also `curve`.
    """
    config = checkpoint.read_config(workdir)
    if data_config is not None:
        config.data = data_config
    name = config.model.name
    if not model.is_cascade:
        raise UserError(f"{name!r} is not a cascade, so there are no exits to choose from.")
    for gmacs_budget in gmacs_budgets:
        exit_thresholds.check_budget(gmacs_budget * 1e9, model.exit_macs())
    labels.check_count(model.num_classes, len(data.class_names(config.data)))
    count = min(fit_examples, data.dataset_info(config.data).train_examples)
    run = {"batch_size": batch_size, "mesh": mesh}
    train_split = config.data.train_split
    fit_split = train_split if "[" in train_split else f"{train_split}[:{count}]"
    fit = collect(model, params, config.data, split=fit_split, **run)
    held_out = collect(model, params, config.data, split=split or config.data.eval_split, **run)
    rows = curve(fit, held_out, model.exit_macs(), gmacs_budgets=gmacs_budgets, criterion=criterion)
    if jax.process_index() == 0:
        write(rows, workdir, name, paper=config.data.name == "imagenet2012")
        if criterion == "confidence":  # the Predictor's criterion
            found = [row for row in rows if row["kind"] == "search"]
            paths.write_whole(workdir / FITTED_FILE, json.dumps(found, indent=2))
    return rows
