"""What `msvit predict` does with a segmenter: files in, label maps as PNGs out."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from msvit_jax import evaluate, flops, paths
from msvit_jax.data.image_files import shown
from msvit_jax.errors import UserError
from msvit_jax.inference import Predictor
from msvit_jax.inference.segmenting import Segmented, png_names, write_labels

COLUMNS = ("file", "size", "windows", "tokens", "classes")
_LARGEST = 3  # classes named in a row of the table


def run(
    predictor: Predictor, source: dict[str, Any], files: Sequence[pathlib.Path], options: Any
) -> None:
    """Segments files, writes label maps, and prints a table and one JSON line.

    Args:
      predictor: Predictor of a segmenter.
      source: Description of where the predictor comes from, for the JSON line.
      files: Paths of the images.
      options: Options of the command, see `predict.Options`.

    Raises:
      UserError: Nothing can be read, the folder cannot be written, or an option is for classifiers.
    """
    if options.pictures:
        raise UserError(
            "--pictures is for classifiers; msvit visualize draws what a segmenter does."
        )
    if options.tokens is not None:
        fit = bool(predictor.buckets)
        predictor.calibrate(files, options.tokens, on_error=options.on_error, fit_buckets=fit)
    folder = None if options.out is None else _folder(options.out)
    names = png_names(files)
    if folder is not None:
        taken = [name for name in names if (folder / name).exists()]
        if taken:
            raise UserError(f"{str(folder / taken[0])!r} exists and is left as it is.")
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    answers = predictor.segment(files, on_error=options.on_error)
    for file, name, answer in zip(files, names, answers, strict=True):
        if answer.failed is not None:
            skipped[str(file)] = answer.failed
            print(f"skipped {shown(file)}: {answer.failed}")
            continue
        if folder is not None:
            write_labels(answer.labels, folder / name, predictor.model.num_classes)
        rows.append(_row(file, answer, predictor))
    if not rows:
        raise UserError(f"None of the {len(files)} files can be read as an image.")
    shown_rows = [{**row, "file": shown(row["file"]), "classes": _text(row)} for row in rows]
    print(evaluate.table(shown_rows, COLUMNS), flush=True)
    if folder is not None:
        print(f"\n{len(rows)} label maps in {folder}")
    windows = sum(row["windows"] for row in rows)
    summary = {
        **source,
        "images": len(rows),
        "skipped": skipped,
        "threshold": predictor.threshold,
        "windows": windows,
        "tokens_mean": sum(row["tokens"] * row["windows"] for row in rows) / windows,
        "gmacs_mean": sum(row["gmacs"] for row in rows) / len(rows),
        "predictions": rows,
    }
    print(json.dumps(summary))


def _folder(out: str) -> pathlib.Path:
    if pathlib.PurePath(out).suffix in (".csv", ".jsonl"):
        raise UserError(f"--out={out!r}: a segmenter writes label maps into a folder; name one.")
    return paths.check_writable(out, "--out")


def _row(file: pathlib.Path, answer: Segmented, predictor: Predictor) -> dict[str, Any]:
    counts = np.bincount(answer.labels.reshape(-1), minlength=predictor.model.num_classes)
    names = predictor.class_names or [str(number) for number in range(len(counts))]
    shares = sorted(
        zip(names, (counts / answer.labels.size).tolist(), strict=True),
        key=lambda found: -found[1],
    )
    height, width = answer.labels.shape
    return {
        "file": str(file),
        "size": f"{height} x {width}",
        "windows": len(answer.tokens),
        "tokens": float(answer.tokens.mean()),
        "gmacs": float(flops.macs_per_image(predictor.model, answer.tokens).sum()) / 1e9,
        "classes": {name: share for name, share in shares if share},
    }


def _text(row: dict[str, Any]) -> str:
    named = list(row["classes"].items())
    text = ", ".join(f"{name} {share:.0%}" for name, share in named[:_LARGEST])
    return text + (", ..." if len(named) > _LARGEST else "")
