"""Compiles training steps for whole slices of TPUs and writes docs/results/pods.md.

    python studies/pods.py [--only=msvit_deit_small:v5e:16x16,...]

Four models on four slices, 128 images a chip: the compiler's memory and transfers of a chip, and
what its published rates allow. For v5e:2x2 the largest batch that fits, too. Needs libtpu (pip
install 'jax[tpu]') and no TPU. Each command is one process; what an interrupted study has finished
stays in the JSON file. Cost: some three hours on one CPU core, two of them for dvt_deit_small.
"""

import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from tables import markdown

from msvit_jax import errors

ROOT = pathlib.Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "pods.json"
BATCH = 128  # a chip
SLICES = ("v5e:2x2", "v5e:16x16", "v5p:2x2x2", "v6e:4x4")
_BASE = ["--config=configs/imagenet/deit_small.py", "--config.model.name=vit_base_patch16_224"]
MODELS: dict[str, list[str]] = {
    "digits_msvit": ["--config=configs/digits_msvit.py", "--layouts=slots"],
    "msvit_deit_small": ["--config=configs/imagenet/msvit_deit_small.py", "--layouts=trimmed"],
    "dvt_deit_small": ["--config=configs/imagenet/dvt_deit_small.py", "--layouts=cascade"],
    "vit_base": [*_BASE, "--layouts=dense"],
    "vit_base, fsdp": [*_BASE, "--layouts=dense", "--config.mesh.data=1", "--config.mesh.fsdp=-1"],
}
# Images that the papers' recipes show: epochs x examples of the training set.
RECIPES = {
    "msvit_deit_small": 20 * 1_281_167,
    "dvt_deit_small": 310 * 1_281_167,
    "vit_base": 300 * 1_281_167,
}
RUNS = [f"{model}:{part}" for model in MODELS for part in SLICES]
# Not of dvt_deit_small, which takes half an hour to compile for each batch size that is tried.
LARGEST = [f"{model}:largest" for model in ("msvit_deit_small", "vit_base")]
_ONLY = flags.DEFINE_list("only", [*RUNS, *LARGEST], "Names of the runs to compile.")

HEAD = f"""# Training on pods, compiled and not run

What the TPU compiler says of a training step in bfloat16, {BATCH} images a chip: memory of a chip,
and bytes that it sends to others. Milliseconds are computed from these and the chip's published
rates; nothing was run. "Products" at their peak are the least that a step can take; "memory" is for
the bytes that the compiler counts, more than fused operations move. "Links" is at most the share
that transfers take: beside products alone, without overlap. Chip-hours of the papers' recipes are
at these two rates: no run takes less than the first. Loops whose length the compiler does not
tell are counted as one pass each. The four of ImageNet's steps draw the shares of mixup; the
further ones of FSDP on v5p and v6e overlap a product with the transfer of its weights piece by
piece, so that products and transfers of these two rows are too low: their products are those
without FSDP.
Made by `python studies/pods.py`; every figure is in pods.json."""


def command(run: str) -> list[str]:
    """The command of a run."""
    model, _, part = run.partition(":")
    chips_of = "v5e:2x2" if part == "largest" else part
    chips = math.prod(int(side) for side in chips_of.split(":")[1].split("x"))
    return [
        *("python", "-m", "msvit_jax.aot", *MODELS[model]),
        f"--topology={chips_of}",
        f"--config.batch_size={BATCH * chips}",
        "--config.dtype=bfloat16",
        *(["--largest_batch"] if part == "largest" else []),
    ]


def execute(run: str) -> dict[str, Any]:
    """Runs one command and returns its JSON."""
    words = command(run)
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 3):  # 3: does not fit, which is a result
        raise errors.UserError(f"{' '.join(words)} failed.")
    return {"command": " ".join(words), **json.loads(done.stdout.splitlines()[-1])}


def page(done: dict[str, Any]) -> str:
    """All tables."""
    rows = []
    for run in RUNS:
        if run not in done:
            continue
        model, _, part = run.partition(":")
        (record,) = done[run]["records"]
        if not record["fits"]:
            rows.append([model, part, f"{record['needs_gib']} (does not fit)", *[""] * 6])
            continue
        limits = record["limits"]
        sent = sum(c["bytes"] for c in record["collectives"].values()) / 2**20
        hours = ""
        if (name := model.partition(",")[0]) in RECIPES:
            chip_hours = RECIPES[name] / BATCH / 3.6e6
            rates = [chip_hours * limits[kind] for kind in ("products", "memory")]
            hours = " / ".join(f"{x:.1f}" if x < 10 else f"{x:,.0f}" for x in rates)
        milliseconds = f"{limits['products']:.1f} / {limits['memory']:.1f}"
        links = f"{limits['links_share']:.1%}"
        memory = f"{record['memory_gib']:.2f}"
        loops = str(record["loops_of_unknown_length"])
        rows.append([model, part, memory, f"{sent:,.1f}", loops, milliseconds, links, hours])
    head = ["model", "slice", "GiB", "MiB in collectives", "loops", "products / memory, ms"]
    parts = [HEAD, markdown([*head, "links", "chip-hours of the recipe"], rows)]
    largest = [
        [run.removesuffix(":largest"), str(r["batch"]), f"{r['memory_gib']:.2f}"]
        for run in LARGEST
        if run in done
        for r in done[run]["records"]
        if r["fits"]
    ]
    if largest:
        parts.append("## The largest batch on v5e:2x2, within an eighth")
        parts.append(markdown(["model", "images", "GiB a chip"], largest))
        parts.append(
            "So near the limit the compiler computes some values twice to save memory: a tenth to\n"
            "a sixth more MACs an image than in the table above."
        )
    if left := [run for run in RUNS + LARGEST if run not in done]:
        parts.append(f"Not compiled yet: {'; '.join(left)}.")
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str]) -> None:
    """Runs what is asked for and not done, and writes both files."""
    errors.refuse_arguments(argv)
    done = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for run in _ONLY.value:
        if run not in RUNS + LARGEST:
            raise errors.UserError(f"Unknown run {run!r}; there is {', '.join(RUNS + LARGEST)}.")
        if run not in done:
            done[run] = execute(run)
            RESULT.write_text(json.dumps(done, indent=1) + "\n")
        RESULT.with_suffix(".md").write_text(page(done))


if __name__ == "__main__":
    errors.run(main)
