"""Prints the results: a table, then one JSON object."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from msvit_jax.aot.topology import Topology
from msvit_jax.evaluate import table

COLUMNS = (
    "layout",
    "capacity",
    "batch",
    "GiB",
    "GMACs/image",
    "GB moved",
    "Mcycles",
    "ratio",
    "kernels",
    "VMEM, MiB",
    "collectives",
    "limits, ms",
    "links",
    "compile s",
)
_SMALLER = {
    "train": "a smaller batch_size, optimizer.accum_steps, model.remat=True, mesh.data=1 with "
    "mesh.fsdp=-1, or more chips",
    "predict": "a smaller eval_batch_size, or more chips",
}


def show(records: Sequence[dict[str, Any]], topology: Topology) -> bool:
    """Prints records of `compiling.compile_variant`, and on stderr errors for those too large.

    Returns:
      Whether all fit.
    """
    first, count = records[0], len(topology.devices)
    print(
        f"{first['what']}, {count} x {topology.chip.name} ({topology.name}), batch "
        f"{first['batch']} ({first['batch'] // count} a chip). The compiler's figures of one chip "
        f"of {topology.chip.memory} GiB; cycles are its estimates, their ratio is to "
        f"{first['layout']}."
    )
    print(table([_row(record, first) for record in records], COLUMNS))
    for note in _notes(records):
        print(note)
    about = {"topology": topology.name, "chips": count, "jax": jax.__version__}
    print(json.dumps({**about, "records": list(records)}), flush=True)
    large = [record for record in records if not record["fits"]]
    for record in large:
        print(
            f"error: {record['layout']} does not fit: {record['needs_gib']} GiB of "
            f"{record['has_gib']} GiB; try {_SMALLER[record['what']]}.",
            file=sys.stderr,
        )
    return not large


def _row(record: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    row = {key: record[key] for key in ("layout", "capacity", "batch")}
    if not record["fits"]:
        return {**row, "GiB": f"{record['needs_gib']} (does not fit)"}
    if first["fits"]:
        row["ratio"] = f"{record['mcycles'] / max(first['mcycles'], 1e-9):.3f}"
    moved = [
        f"{kind} {c['count']} ({c['bytes'] / 2**20:.1f} MiB)"
        for kind, c in record["collectives"].items()
    ]
    return {
        **row,
        "GiB": f"{record['memory_gib']:.2f}",
        "GMACs/image": record["gmacs_per_image"],
        "GB moved": record["gbytes_accessed"],
        "Mcycles": record["mcycles"],
        **_kernels(record),
        "collectives": ", ".join(moved) or "none",
        "limits, ms": f"{record['limits']['products']:.2f} / {record['limits']['memory']:.2f}",
        "links": f"{record['limits']['links_share']:.1%}",
        "compile s": record["compile_seconds"],
    }


def _kernels(record: dict[str, Any]) -> dict[str, Any]:
    """Number of Pallas kernels, the least milliseconds that they can take, and their memory."""
    kernels = record["kernels"]
    if not kernels["calls"]:
        return {"kernels": "none", "VMEM, MiB": ""}
    return {
        "kernels": f"{kernels['calls']}, {record['limits']['kernels']:.2f} ms",
        "VMEM, MiB": f"{kernels['vmem'] / 2**20:.1f}",
    }


def _notes(records: Sequence[dict[str, Any]]) -> list[str]:
    """Notes on what the figures do not include."""
    notes = []
    if any(r["fits"] for r in records):
        notes.append(
            "Limits: products at the chip's published peak, the least that a step can take, / "
            "bytes as the compiler counts them, more than fused operations move. Links: at most "
            "the share that transfers take, beside products alone and without overlap."
        )
    if any(r.get("loops") for r in records):
        notes.append(
            "Loops: cycles are times their trips; GMACs, GB and collectives count a body once, as "
            "XLA does. Without model.scan_layers and optimizer.accum_steps they are whole."
        )
    if any(r.get("loops_of_unknown_length") for r in records):
        notes.append("Some loops do not say how often they run: their cycles are counted once.")
    if any(r.get("kernels", {}).get("calls") for r in records):
        notes.append(
            "Pallas kernels are not estimated: cycles, and their ratio, are those of all the rest. "
            "Beside the number of kernels: computed, not estimated, the least that they can take, "
            "which is the longer of their products and their bytes at the chip's published rates."
        )
    return notes
