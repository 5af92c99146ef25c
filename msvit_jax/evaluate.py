"""The one evaluation: used by the training loop, `msvit eval` and the threshold sweep.

Every example counts exactly once, whatever the batch size and the number of processes; figures
are means over examples.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from msvit_jax import (
    checkpoint,
    data,
    extras,
    flops,
    labels,
    metrics,
    paths,
    sharding,
    tasks,
    weights,
)
from msvit_jax import config as configs
from msvit_jax.data.segmentation import WindowBatches
from msvit_jax.errors import UserError
from msvit_jax.exits import budget_curve
from msvit_jax.models.interface import ImageModel
from msvit_jax.models.output import GateOutput
from msvit_jax.pixels import normalize
from msvit_jax.weights import adapt

with extras.needed("train"):
    from ml_collections import config_dict

COLUMNS = (
    "model",
    "examples",
    "top1",
    "top5",
    "miou",
    "mean_accuracy",
    "pixel_accuracy",
    "loss",
    "tokens_mean",
    "tokens_p5",
    "tokens_p95",
    "gmacs_mean",
    "content_fine",
    "plain_coarse",
    "fine_per_content",
    "agreement",
)

QUALITY = {"top1": "top-1 (%)", "miou": "mIoU (%)"}  # titles of the tasks' main figures


@dataclasses.dataclass(frozen=True)
class Samples:
    """A few images and what the model did with their tokens, to draw.

    Attributes:
      images: [n, H, W, 3] uint8 images.
      coarse: [n, R], 1 where a region is coarse; None without a gate.
      probability: [n, R], probability of staying coarse; None without a gate.
      merge_maps: [n, reductions, rows, columns], merge maps from `Output.merge_maps`; None if no
        layer reduces tokens.
    """

    images: np.ndarray
    coarse: np.ndarray | None = None
    probability: np.ndarray | None = None
    merge_maps: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
      figures: Figures from `metrics.summarize`.
      coarse_rates: [R], share of images in which each region stayed coarse; None without a gate.
      samples: First images; None for a model that gives all images all tokens.
    """

    figures: dict[str, Any]
    coarse_rates: np.ndarray | None = None
    samples: Samples | None = None


class Evaluator:
    """Evaluates parameters of one model on one split; compiles once."""

    def __init__(
        self,
        model: ImageModel,
        data_config: config_dict.ConfigDict,
        *,
        batch_size: int,
        mesh: Mesh,
        split: str | None = None,
        samples: int = 0,
    ) -> None:
        """Prepares an evaluation.

        Args:
          model: Model from the registry.
          data_config: Config's `data` section.
          batch_size: Global batch size; rounded up to a multiple of the devices.
          mesh: Mesh of devices, from `sharding.make_mesh`.
          split: Split to evaluate; None for the config's `eval_split`.
          samples: Number of images to keep for pictures.
        """
        model = model.with_dense_layout()  # the layout in which every image has an answer
        self._model, self._mesh, self._samples = model, mesh, samples
        self._task = tasks.task_of(model)
        tasks.check_target(model, data_config)
        size = -(-batch_size // mesh.size) * mesh.size
        self._class_names = data.class_names(data_config)
        labels.check_count(model.num_classes, len(self._class_names))
        self._batches = data.eval_batches(
            data_config, batch_size=size, split=split, patch_size=model.patch_size
        )
        counts = np.arange(model.max_tokens + 1)
        self._macs = flops.macs_per_image(model, counts)
        self._layer_tokens = _layer_tokens(model, counts)
        self.has_threshold, self.best_by = model.has_threshold, self._task.best_by
        whole = sharding.replicated(mesh)
        self._step = jax.jit(self._sums, out_shardings=(whole, sharding.batch_sharding(mesh)))

    def _sums(
        self, params: Any, batch: dict[str, Array], threshold: Array | None
    ) -> tuple[metrics.Sums, Any]:
        model, task = self._model, self._task
        images = normalize(batch["image"], model.mean, model.std)
        extra = {} if threshold is None else {"threshold": threshold}
        output = model.apply({"params": params}, images, train=False, **extra)
        targets = task.plain_targets(batch, model.num_classes)
        judged = task.judge(output, targets, images.shape[1:3], model, valid=batch["valid"])
        sums = metrics.batch_sums(
            output,
            task.labels(batch),
            judged.losses,
            max_tokens=model.max_tokens,
            weights=judged.weights,
            valid=batch["valid"],
            mask=task.content(batch),
            pixels=judged.pixels,
        )
        dense = output.logits if task.labels(batch) is None else None
        return sums, (output.gate, output.merge_maps(model.patch_grid), dense)

    def __call__(self, params: Any, threshold: float | None = None) -> Evaluation:
        """Evaluates.

        Args:
          params: Parameters of the model.
          threshold: Threshold of the gate instead of the model's own; does not recompile.
        """
        if threshold is None and self.has_threshold:
            threshold = self._model.threshold
        traced = jnp.float32(threshold) if self.has_threshold else None
        total, samples, last = None, None, None
        with jax.set_mesh(self._mesh):
            for host_batch in self._batches:
                batch = sharding.shard_batch(self._mesh, host_batch)
                sums, decided = self._step(params, batch, traced)
                decided, dense = decided[:2], decided[2]
                if samples is None and self._samples and any(x is not None for x in decided):
                    samples = _keep(host_batch, decided, self._samples)
                # Read one batch late, so that the device always has work, and memory stays bounded.
                if last is not None:
                    total = self._read(total, *last)
                last = sums, host_batch, dense
        if last is None:
            raise ValueError("The evaluation split is empty.")
        total = self._read(total, *last)
        figures = metrics.summarize(total, self._macs, self._layer_tokens)
        figures |= self._of_whole_images(figures)
        if "exits_top1" in figures:
            figures["exits_gmacs"] = (self._model.exit_macs() / 1e9).tolist()
        return Evaluation(figures, metrics.coarse_rates(total), samples)

    def _read(
        self,
        total: metrics.Sums | None,
        sums: metrics.Sums,
        host_batch: dict[str, np.ndarray],
        dense: Array | None,
    ) -> metrics.Sums:
        """Adds a batch's sums, and puts dense answers together to those for whole images."""
        if isinstance(self._batches, WindowBatches) and dense is not None:
            self._batches.take(host_batch, _local_rows(dense, len(host_batch["valid"])))
        host = metrics.to_host(sums)
        return host if total is None else total + host

    def _of_whole_images(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Figures of images that were evaluated in windows, whose number is `examples` so far."""
        if not isinstance(self._batches, WindowBatches):
            return {}
        confusion, images = self._batches.result()
        return {
            "examples": images,
            "windows": figures["examples"],
            **confusion.figures(self._class_names),
        }


def _layer_tokens(model: ImageModel, counts: np.ndarray) -> np.ndarray | None:
    """Patch tokens into each layer's MLP, by initial number of tokens; None if none reduces."""
    return model.backbone.layer_tokens(counts) if model.reductions else None


def _keep(
    batch: dict[str, np.ndarray], decided: tuple[GateOutput | None, Array | None], count: int
) -> Samples:
    """Takes this process's first images with the gate's decisions and their merge maps."""
    gate, merge_maps = decided
    count = min(count, int(batch["valid"].sum()))
    samples = Samples(batch["image"][:count])
    if gate is not None:
        samples = dataclasses.replace(
            samples,
            coarse=_local_rows(gate.coarse, count),
            probability=1 / (1 + np.exp(-_local_rows(gate.logits, count))),
        )
    if merge_maps is not None:
        samples = dataclasses.replace(samples, merge_maps=_local_rows(merge_maps, count))
    return samples


def _local_rows(x: Array, count: int) -> np.ndarray:
    shards = sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0)
    return np.concatenate([np.asarray(s.data) for s in shards])[:count]


def evaluate(
    model: ImageModel,
    params: Any,
    data_config: config_dict.ConfigDict,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    split: str | None = None,
    threshold: float | None = None,
) -> dict[str, Any]:
    """Evaluates parameters once and returns the figures (`metrics.summarize`).

    Args:
      model: Model from the registry.
      params: Parameters of the model.
      data_config: Config's `data` section.
      batch_size: Global batch size; rounded up to a multiple of the devices.
      mesh: Mesh of devices; None for all devices.
      split: Split to evaluate; None for the config's `eval_split`.
      threshold: Threshold of the gate; None for the model's own.
    """
    mesh = mesh or sharding.make_mesh()
    evaluator = Evaluator(model, data_config, batch_size=batch_size, mesh=mesh, split=split)
    params = jax.device_put(jax.device_get(params), sharding.replicated(mesh))
    return evaluator(params, threshold).figures


def evaluate_run(
    workdir: paths.PathLike,
    *,
    which: str = "best",
    split: str | None = None,
    batch_size: int | None = None,
    overrides: Sequence[str] = (),
    thresholds: Sequence[float] = (),
    curve: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates a trained run and prints a table, as `msvit eval` does.

    Args:
      workdir: Directory of the run.
      which: Checkpoint: 'best', 'latest', or a step.
      split: Split to evaluate; None for the config's.
      batch_size: Global batch size; None for the config's.
      overrides: Texts such as 'model.gate=random', for another model around the same parameters.
      thresholds: Thresholds of the gate, for the accuracy/compute curve; empty for no curve.
      curve: Options of `budget_curve.curve_of_run`, for a cascade's budget curve; None for no
        curve.

    Returns:
      Figures, with `model`, `workdir`, `step` and, if asked for, `sweep` or `budget_curve`.
    """
    checkpoint.quiet_orbax()
    workdir = paths.parse(workdir)
    config = checkpoint.read_config(workdir)
    trained_with = configs.build_model(config).patch_grid
    for key, value in map(configs.split_override, overrides):
        configs.set_key(config, key, value)
    model = configs.build_model(config)
    step = checkpoint.find_step(workdir, which)
    mesh = sharding.make_mesh()
    params, _ = adapt.params_for(
        model, checkpoint.load_params(workdir, str(step)), source_grid=trained_with
    )
    names = checkpoint.read_about(workdir, str(step)).get("class_names") or ()
    params = _in_order_of_data(model, params, names, config.data, f"The run in {str(workdir)!r}")
    params = jax.device_put(params, sharding.replicated(mesh))
    size = batch_size or config.eval_batch_size or config.batch_size
    evaluator = Evaluator(model, config.data, batch_size=size, mesh=mesh, split=split)
    if (thresholds or curve is not None) and jax.process_index() == 0:
        paths.check_writable(workdir)  # before the work, not after it
    about = {"model": config.model.name, "workdir": str(workdir), "step": step}
    figures = {**about, **evaluator(params).figures}
    _print_figures(figures, model)
    if thresholds:
        figures["sweep"] = _sweep(evaluator, params, thresholds, workdir, config.model.name)
    if curve is not None:
        run = {"split": split, "batch_size": size, "mesh": mesh}
        rows = budget_curve.curve_of_run(
            model, params, workdir, data_config=config.data, **run, **curve
        )
        figures["budget_curve"] = rows
        _print([_short(row) for row in rows if row["kind"] != "geometric"], budget_curve.COLUMNS)
        if jax.process_index() == 0:
            print(f"written: {workdir / budget_curve.CSV_FILE}, {workdir / budget_curve.PLOT_FILE}")
    return figures


def evaluate_weights(
    source: str,
    config_file: str,
    *,
    split: str | None = None,
    batch_size: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates weights of any format and prints a table, as `msvit eval --weights` does.

    Args:
      source: Workdir, weights file, or directory that transformers or timm wrote.
      config_file: Config of the model and the data.
      split: Split to evaluate; None for the config's.
      batch_size: Global batch size; None for the config's.
      overrides: Texts such as 'model.gate=random'.

    Returns:
      Figures, with `model` and `weights`.
    """
    checkpoint.quiet_orbax()
    config = configs.load(config_file, overrides)
    config = configs.resolve(config, len(data.class_names(config.data)))
    said = weights.declared_options(source, configs.build_model(config), config.model)
    model = configs.build_model(configs.with_model_options(config, said))
    params, report = weights.load_params(source, model)
    report.notes.extend(f"{key}={value!r} as the source says" for key, value in said.items())
    if jax.process_index() == 0:
        print(f"{source}: {report}")
    names = weights.class_names(source)
    params = _in_order_of_data(model, params, names, config.data, f"{source!r}")
    size = batch_size or config.eval_batch_size or config.batch_size
    found = evaluate(model, params, config.data, batch_size=size, split=split)
    figures = {"model": config.model.name, "weights": source, **found}
    _print_figures(figures, model)
    return figures


def _in_order_of_data(
    model: ImageModel,
    params: Any,
    answers: Sequence[str],
    data_config: config_dict.ConfigDict,
    of: str,
) -> Any:
    """Puts a model's answers in the order of the data set's classes, see `labels`.

    Args:
      model: Model to evaluate.
      params: Parameters of the model.
      answers: Names of the model's classes; empty if not known.
      data_config: Config's `data` section.
      of: Name of the answering thing, for messages.

    Raises:
      UserError: The number of classes or their names differ.

    Returns:
      Parameters with the head in that order.
    """
    theirs = data.class_names(data_config)
    labels.check_count(model.num_classes, len(theirs), of=of)
    return labels.in_order(params, labels.order(answers, theirs, data_config.match_classes, of=of))


def _print_figures(figures: dict[str, Any], model: ImageModel) -> None:
    if not np.isfinite(figures["loss"]):
        raise UserError(
            f"The loss is {figures['loss']}, so the other figures mean nothing: the weights are "
            "damaged or far too large, or dtype=float16 is too small for them. Take an earlier "
            "checkpoint, or --config.dtype=float32."
        )
    _print([figures], COLUMNS)
    if (counts := figures.get("layer_tokens_mean")) and jax.process_index() == 0:
        print("patch tokens into each layer's MLP: " + " ".join(f"{c:.4g}" for c in counts))
    if "iou" in figures:
        _print([{"class": name, "iou": x} for name, x in figures["iou"].items()], ("class", "iou"))
    if "exits_top1" in figures:
        _print(_exits(figures, model), ("exit", "tokens", "top1", "gmacs"))


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with its lists as texts."""
    texts = {name: " ".join(f"{x:.3g}" for x in row[name]) for name in ("shares", "thresholds")}
    return {**row, **texts}


def _exits(figures: dict[str, Any], model: ImageModel) -> list[dict[str, Any]]:
    """Makes a row for each exit of a cascade, as if all images left there."""
    columns = zip(model.exit_tokens, figures["exits_top1"], figures["exits_gmacs"], strict=True)
    return [
        {"exit": number, "tokens": int(tokens), "top1": top1, "gmacs": gmacs}
        for number, (tokens, top1, gmacs) in enumerate(columns, start=1)
    ]


def _sweep(
    evaluator: Evaluator,
    params: Any,
    thresholds: Sequence[float],
    workdir: pathlib.Path,
    title: str,
) -> list[dict[str, Any]]:
    """Runs, prints and writes the curve over thresholds."""
    if not evaluator.has_threshold:
        raise UserError(
            f"{title!r} has no gate that decides by a threshold, so there is none to sweep."
        )
    rows = [{"threshold": float(t), **evaluator(params, t).figures} for t in thresholds]
    _print(rows, ("threshold", *COLUMNS))
    if jax.process_index() == 0:
        write_sweep(rows, workdir, title, evaluator.best_by)
        print(f"written: {workdir / 'sweep.csv'}, {workdir / 'sweep.png'}")
    return rows


def _print(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    if jax.process_index() == 0:
        print(table(rows, columns), flush=True)


def write_sweep(
    rows: Sequence[dict[str, Any]], directory: pathlib.Path, title: str, figure_of: str = "top1"
) -> None:
    """Writes `sweep.csv` and `sweep.png`."""
    with extras.needed("plots"):
        from matplotlib import pyplot  # only a sweep draws

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    paths.write_whole(directory / "sweep.csv", text.getvalue())
    figure, axes = pyplot.subplots(figsize=(6, 4))
    macs, quality = [r["gmacs_mean"] for r in rows], [r[figure_of] for r in rows]
    axes.plot(macs, quality, marker="o")
    for row in rows:
        at = (row["gmacs_mean"], row[figure_of])
        axes.annotate(f"{row['threshold']:g}", at, textcoords="offset points", xytext=(4, -10))
    axes.set(xlabel="GMACs per image (mean)", ylabel=QUALITY[figure_of], title=title)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    paths.write_whole(directory / "sweep.png", picture.getvalue())
    pyplot.close(figure)


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Formats rows as an aligned text table; columns that no row has are left out."""
    columns = [c for c in columns if any(c in row for row in rows)]
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join(
        "  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
