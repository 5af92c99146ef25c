"""Compiles DeiT-S and MSViT for TPUs in all layouts and writes docs/results/tpu_compile.md.

    python studies/tpu_compile.py [--only=predict:v5e:1x1,...]

Needs libtpu (pip install 'jax[tpu]') and no TPU. Each command is one process; what an interrupted
study has finished stays in the JSON file and `--only` adds to it.
"""

import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from msvit_jax import errors
from msvit_jax.aot import topology

ROOT = pathlib.Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "tpu_compile.json"
BATCH = 128  # a chip
CLOCK = 1.5  # GHz of a v5e: 197 TFLOP/s from four units of 128 x 128
# Cycles of the kernels over the least that their products need, for this model, from
# docs/results/kernel_schedules.md: halves of blocks, and attention alone forward and backward.
SCHEDULED = {"predict": 1.27, "train": 3.5}
TOKENS = 127  # and the class token: a whole tile
RUNS = {
    "predict:v5e:1x1": "dense,slots,budget,rows,ladder",
    "train:v5e:1x1": "dense,slots,trimmed,budget,rows",
    "predict:v5e:16x16": "dense,slots,budget,rows",
    "train:v5e:16x16": "dense,slots,trimmed,budget,rows",
    "predict:v5e:1x1:mergence": "dense,reduced",
    "predict:v5e:1x1:mergence with 127 tokens after layer 4": "dense,reduced",
}
# What a run compiles, and how; 0.645 of 196 tokens are 127, with the class token a whole tile.
SYSTEMS: dict[str, list[str]] = {
    "": ["--config=configs/imagenet/msvit_deit_small.py"],
    "mergence": ["--config=configs/imagenet/mergence_deit_small.py"],
    "mergence with 127 tokens after layer 4": [
        "--config=configs/imagenet/mergence_deit_small.py",
        "--config.model.keep=(0.645,0.7,0.7)",
    ],
}
_ONLY = flags.DEFINE_list("only", list(RUNS), "Names of the runs to compile.")
HEAD = f"""# Compiled for TPUs

What the TPU compiler says of `msvit_deit_small_patch16_224`, of `mergence_deit_small_patch16_224`
("reduced": 70 % kept in layers 4, 7 and 10 unless said otherwise) and of their dense backbone at
224 px in bfloat16, {BATCH} images a chip. No TPU was used: cycles are the compiler's estimates,
which leave out our kernels and waiting for other chips. "Kernels" is computed: the least that they
can take, the longer of their products and their bytes at the chip's published rates. "ms" are the
cycles at {CLOCK} GHz and the kernels by [their schedules](kernel_schedules.md): for this model
{SCHEDULED["predict"]} times that least in a forward pass, {SCHEDULED["train"]} times in training.
Training steps scan over the layers: cycles and kernels count every turn of the loops, GMACs, bytes
and collectives only one. Layouts have capacity for a mean of {TOKENS} of 196 patch tokens (with the
class token {TOKENS + 1}, a whole tile); rows and ladder for counts spread by 30. All figures are of
one chip. Made by `python studies/tpu_compile.py`; every figure is in tpu_compile.json.
"""


def command(run: str) -> list[str]:
    """The command of a run."""
    what, kind, chips_of, *system = run.split(":")
    topology = f"{kind}:{chips_of}"
    chips = math.prod(int(side) for side in chips_of.split("x"))
    return [
        *("python", "-m", "msvit_jax.aot", *SYSTEMS["".join(system)]),
        f"--what={what}",
        f"--topology={topology}",
        f"--layouts={RUNS[run]}",
        f"--tokens={TOKENS}",
        f"--config.batch_size={BATCH * chips}",
        # A fifth of the code to compile, for a step that takes half as long again.
        *(["--config.model.scan_layers=True"] if what == "train" else []),
    ]


def execute(run: str) -> dict[str, Any]:
    """Runs one command and returns its JSON."""
    words = command(run)
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return {"command": " ".join(words), **json.loads(done.stdout.splitlines()[-1])}


def milliseconds(what: str, record: dict[str, Any]) -> float:
    """Estimated cycles and what kernels take by their schedules, in ms of a v5e."""
    chip, kernels = topology.CHIPS["v5e"], record["kernels"]
    products = SCHEDULED[what] * kernels["flops"] / chip.tflops / 1e9
    moved = kernels["moved_bytes"] / chip.memory_gbps / 1e6
    return record["mcycles"] / CLOCK + max(products, moved)


def section(run: str, result: dict[str, Any]) -> str:
    """One table."""
    kind = run.partition(":")[0]
    what = {"train": "Training step", "predict": "Forward pass"}[kind]
    system = "".join(run.split(":")[3:]).replace("mergence", "Token Mergence")
    title = ", ".join([what, result["topology"], *([system] if system else [])])
    lines = [
        f"## {title}",
        "",
        f"    {result['command']}",
        "",
        *([result["note"], ""] if "note" in result else []),
        "| layout | capacity | GiB | GMACs an image | GB moved | M cycles "
        "| kernels, ms | ms | to dense | collectives |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    dense = milliseconds(kind, result["records"][0])
    for r in result["records"]:
        moved = ", ".join(
            f"{c['count']} {kind}, {c['bytes'] / 2**20:.1f} MiB"
            for kind, c in r["collectives"].items()
        )
        lines.append(
            f"| {r['layout']} | {r['capacity']} | {r['memory_gib']:.2f} | "
            f"{r['gmacs_per_image']:.2f} | {r['gbytes_accessed']:.1f} | {r['mcycles']:.1f} | "
            f"{r['limits']['kernels']:.2f} | {milliseconds(kind, r):.1f} | "
            f"{milliseconds(kind, r) / dense:.2f} | {moved or 'none'} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Runs what is asked for and writes both files."""
    del argv
    done = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for run in _ONLY.value:
        if run not in RUNS:
            raise errors.UserError(f"Unknown run {run!r}; there is {', '.join(RUNS)}.")
        done[run] = execute(run)
        RESULT.write_text(json.dumps(done, indent=1) + "\n")
        sections = [section(run, done[run]) for run in RUNS if run in done]
        RESULT.with_suffix(".md").write_text("\n".join([HEAD, *sections]))


if __name__ == "__main__":
    errors.run(main)
