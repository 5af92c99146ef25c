"""Reports measurements as records and as a table."""

from typing import Any

import jax
import numpy as np

from msvit_jax.benchmark import machine
from msvit_jax.benchmark.options import Options
from msvit_jax.benchmark.sides import Case, draw, forward_sides
from msvit_jax.benchmark.training import train_sides
from msvit_jax.benchmark.turns import spread, time_interleaved

# Columns of the table: heading, width, key in the record, and format.
_COLUMNS = (
    ("batch", 6, "batch", "d"),
    ("layout", 14, "layout", "s"),
    ("images/s", 10, "images_per_second", ".1f"),
    ("GMACs", 8, "gmacs", ".3f"),
    ("speed-up", 9, "speedup", ".3f"),
    ("MAC ratio", 10, "mac_ratio", ".3f"),
    ("realized", 9, "realized", ".3f"),
    ("used capacity", 15, "padding_efficiency", ".3f"),
    ("bytes", 9, "memory_bytes", ".2e"),
    ("compile s", 10, "compile_seconds", ".1f"),
)


def run(options: Options) -> dict[str, Any]:
    """Measures everything that the options ask for and prints a table meanwhile.

    Returns:
      Machine, versions and commit, and under "records" one record for each batch and layout, the
      dense case first; ready for JSON. Multiply-accumulates are those of a forward pass; a training
      step needs about three times as many in every case.

    Raises:
      UserError: The model or the machine does not support the options.
    """
    about = machine.describe()
    print_headings()
    records = []
    for batch in options.batches:
        for each in measure(options, batch):
            print_row(each)
            records.append(each)
    stats = jax.devices()[0].memory_stats() or {}
    peak = {"device_peak_bytes": stats.get("peak_bytes_in_use")}
    return {**about, **peak, "records": records}


def measure(options: Options, batch: int) -> list[dict[str, Any]]:
    """Measures one batch size in all layouts."""
    work = draw(options, batch)
    sides = train_sides(options, work) if options.train else forward_sides(options, work)
    seconds = time_interleaved([side.calls for side in sides], options.rounds)
    return [
        record(options, side, sides[0], seconds[:, index], seconds[:, 0])
        for index, side in enumerate(sides)
    ]


def record(
    options: Options, side: Case, dense: Case, seconds: np.ndarray, dense_seconds: np.ndarray
) -> dict[str, Any]:
    """The record of a case's measurement.

    Args:
      options: Options of the benchmark.
      side: Case that was measured.
      dense: Dense case that it is compared with.
      seconds: [rounds], seconds per round of the case.
      dense_seconds: [rounds], seconds of the dense case in the same rounds.
    """
    speedup = spread("speedup", dense_seconds / seconds)
    mac_ratio = float(dense.macs.mean() / side.macs.mean())
    computed = sum(size.computed for size in side.sizes)
    memory = [program.memory_bytes for program in side.programs if program.memory_bytes]
    return {
        "what": options.what,
        "model": side.model,
        "layout": side.layout,
        "batch": side.tokens.shape[1],
        "dtype": options.dtype,
        "overrides": list(options.overrides),
        **spread("images_per_second", side.tokens.size / seconds),
        "gmacs": float(side.macs.mean() / 1e9),
        **speedup,
        "mac_ratio": mac_ratio,
        "realized": speedup["speedup"] / mac_ratio,
        "tokens_mean": float(side.tokens.mean()),
        "tokens_std": float(side.tokens.std()),
        "padding_efficiency": sum(size.active for size in side.sizes) / computed,
        "overflow": side.overflow,
        "sizes": _distinct(side),
        "memory_bytes": max(memory, default=None),
        "compile_seconds": sum(program.compile_seconds for program in side.programs),
        "programs": len(side.programs),
        "images_per_round": side.tokens.size,
        "rounds": options.rounds,
    }


def _distinct(side: Case) -> list[dict[str, Any]]:
    """The sizes that a case's programs were compiled for; empty for dense and slots."""
    given = {tuple(size.attributes.items()) for size in side.sizes}
    plain = [{k: v for k, v in sorted(each) if k != "layout"} for each in sorted(given)]
    return [sizes for sizes in plain if sizes]


def print_headings() -> None:
    """Prints the first line of the table."""
    print("".join(f"{heading:>{width}}" for heading, width, _, _ in _COLUMNS))


def print_row(record: dict[str, Any]) -> None:
    """Prints a record as a line of the table, with dashes for missing values."""
    cells = []
    for _, width, key, kind in _COLUMNS:
        value = record.get(key)
        cells.append(f"{'-' if value is None else format(value, kind):>{width}}")
    print("".join(cells), flush=True)
