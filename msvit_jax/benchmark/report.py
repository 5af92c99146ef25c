"""Measurements as records, and as a table for people."""

from typing import Any

import jax
import numpy as np

from msvit_jax.benchmark import machine
from msvit_jax.benchmark.options import Options
from msvit_jax.benchmark.sides import Side, draw, forward_sides
from msvit_jax.benchmark.training import train_sides
from msvit_jax.benchmark.turns import spread, take_turns

_COLUMNS = "{:>6} {:>8} {:>10} {:>17} {:>8} {:>8} {:>6} {:>9} {:>9} {:>8} {:>9}"
_HEADINGS = (
    "batch",
    "layout",
    "images/s",
    "(range)",
    "GMACs",
    "speed-up",
    "MACs",
    "realised",
    "in places",
    "GB",
    "compile s",
)


def run(options: Options) -> dict[str, Any]:
    """Measures everything that the options ask for, and prints a table on the way.

    Returns:
      The machine, versions and commit, and under "records" one record for each batch and layout,
      the dense side first; ready for JSON. Multiply-accumulates are those of a forward pass; a
      training step does about three times as many, on every side alike.

    Raises:
      UserError: something that the model or the machine cannot do.
    """
    print(_COLUMNS.format(*_HEADINGS))
    records = []
    for batch in options.batches:
        for record in measure(options, batch):
            print(_row(record))
            records.append(record)
    stats = jax.devices()[0].memory_stats() or {}
    peak = {"device_peak_bytes": stats.get("peak_bytes_in_use")}
    return {**machine.describe(), **peak, "records": records}


def measure(options: Options, batch: int) -> list[dict[str, Any]]:
    """Measures one batch size in all layouts."""
    work = draw(options, batch)
    sides = train_sides(options, work) if options.train else forward_sides(options, work)
    seconds = take_turns([side.calls for side in sides], options.rounds)
    return [
        _record(options, side, sides[0], seconds[:, index], seconds[:, 0])
        for index, side in enumerate(sides)
    ]


def _record(
    options: Options, side: Side, dense: Side, seconds: np.ndarray, dense_seconds: np.ndarray
) -> dict[str, Any]:
    speedup = spread("speedup", dense_seconds / seconds)
    mac_ratio = float(dense.macs.mean() / side.macs.mean())
    places = sum(size.places for size in side.sizes)
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
        "realised": speedup["speedup"] / mac_ratio,
        "tokens_mean": float(side.tokens.mean()),
        "tokens_std": float(side.tokens.std()),
        "padding_efficiency": sum(size.active for size in side.sizes) / places,
        "sizes": _distinct(side),
        "memory_bytes": max(memory, default=None),
        "compile_seconds": sum(program.compile_seconds for program in side.programs),
        "programs": len(side.programs),
        "images_per_round": side.tokens.size,
        "rounds": options.rounds,
    }


def _distinct(side: Side) -> list[dict[str, Any]]:
    """The sizes that a side's programs were compiled for; none for dense and slots."""
    given = {tuple(size.attributes.items()) for size in side.sizes}
    plain = [{k: v for k, v in sorted(each) if k != "layout"} for each in sorted(given)]
    return [sizes for sizes in plain if sizes]


def _row(record: dict[str, Any]) -> str:
    least, most = record["images_per_second_range"]
    memory = record["memory_bytes"]
    return _COLUMNS.format(
        record["batch"],
        record["layout"],
        f"{record['images_per_second']:.1f}",
        f"({least:.1f} to {most:.1f})",
        f"{record['gmacs']:.3f}",
        f"{record['speedup']:.2f}",
        f"{record['mac_ratio']:.2f}",
        f"{record['realised']:.2f}",
        f"{record['padding_efficiency']:.2f}",
        "?" if memory is None else f"{memory / 1e9:.2f}",
        f"{record['compile_seconds']:.1f}",
    )
