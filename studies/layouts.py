"""The study of training layouts on scattered digits: trimmed and rows beside slots.

    python studies/layouts.py --workdir=runs/layouts --seeds=0,1,2

From the configs of this repository with fewer epochs:

* dense: configs/digits_vit.py, 4 epochs, once; all start from it
* slots, trimmed: configs/digits_msvit.py, 2 epochs, in either layout, every seed
* slots, frozen gate and rows, frozen gate: one more epoch from the seed's slots model

The layouts give the same answers but for rounding. Trimmed leaves out of a step the few images
beyond its capacity, and gives no gradient to regions whose alternatives have none; so the question
is whether accuracy and tokens differ by more than seeds do. Everything is judged after its last
step. Writes docs/results/layouts.md and layouts.json. What is done already is not done again. Cost:
about half an hour on two CPU cores.
"""

import concurrent.futures
import json
import pathlib
import re
from collections.abc import Sequence

import digits
import numpy as np
from absl import flags

from msvit_jax import errors

DENSE, TUNED, FROZEN = 4.0, 2.0, 1.0  # epochs
LOOK = 100  # steps between looks at the token counts
ROWS = {"model.layout": "rows", "model.rows": 40, "model.row_width": 72}  # of 65 tokens at least
ARMS = ("slots", "trimmed", "slots, frozen gate", "rows, frozen gate")


def arms(study: digits.Study, dense: str) -> dict[str, digits.Figures]:
    """Trains one seed's arms."""
    tuned = {"init_from": dense, "epochs": TUNED, "model.layout": "slots"}
    trimmed = {"model.layout": "trimmed", "capacity.every_steps": LOOK}
    frozen = {
        "model.layout": "slots",
        "init_from": study.workdir("slots"),
        "epochs": FROZEN,
        "optimizer.freeze": "gate",
        "loss.gate.kind": "none",
        "optimizer.learning_rate": 3e-4,
    }
    found = {
        "slots": study.arm("slots", "digits_msvit", **tuned),
        "trimmed": study.arm("trimmed", "digits_msvit", **{**tuned, **trimmed}),
        "slots, frozen gate": study.arm("frozen_slots", "digits_msvit", **frozen),
        "rows, frozen gate": study.arm("frozen_rows", "digits_msvit", **{**frozen, **ROWS}),
    }
    found["trimmed"] |= capacities(pathlib.Path(study.workdir("trimmed")))
    found["rows, frozen gate"] |= overflow(pathlib.Path(study.workdir("frozen_rows")))
    return found


def capacities(workdir: pathlib.Path) -> digits.Figures:
    """What the schedule of a run did, from its log and metrics."""
    log = workdir.with_suffix(".out").read_text()
    changes = re.findall(
        r"step (\d+): (?:budgets|capacities) \S+ -> (\S+) tokens, (\S+) on average", log
    )
    return {"budgets": [list(change) for change in changes], **overflow(workdir)}


def overflow(workdir: pathlib.Path) -> digits.Figures:
    """The share of training images that were beyond capacity, mean over reports."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    shares = [
        line.get("overflow", line.get("unfit", 0.0)) for line in lines if line["kind"] == "train"
    ]
    return {"overflow": float(np.mean(shares))}


def report(results: dict[int, dict[str, digits.Figures]]) -> str:
    """Writes the table."""
    head = "| seed | " + " | ".join(ARMS) + " | images beyond capacity: trimmed, rows |"
    lines = [head, "|" + "---|" * (len(ARMS) + 2)]
    for seed, found in results.items():
        cells = [f"{found[a]['top1']:.2f} / {found[a]['tokens_mean']:.1f}" for a in ARMS]
        lost = ", ".join(f"{found[a]['overflow']:.2%}" for a in ("trimmed", "rows, frozen gate"))
        lines.append(f"| {seed} | " + " | ".join(cells) + f" | {lost} |")
    means = []
    for arm in ARMS:
        top1 = [found[arm]["top1"] for found in results.values()]
        means.append(f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}" if len(top1) > 1 else "")
    lines.append("| mean ± std of top-1 | " + " | ".join(means) + " | |")
    lines += ["", "Budgets that the schedule chose (step: budgets of a batch's parts):", ""]
    for seed, found in results.items():
        told = "; ".join(f"{step}: {b}" for step, b, _ in found["trimmed"]["budgets"])
        lines.append(f"* seed {seed}: {told}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Runs the study."""
    del argv
    workers = digits.Workers(flags.FLAGS.jobs)
    seeds = [int(seed) for seed in flags.FLAGS.seeds]
    first = digits.Study(workers, seeds[0])
    first.arm("dense", "digits_vit", epochs=DENSE)
    dense = first.workdir("dense")
    with concurrent.futures.ThreadPoolExecutor(len(seeds)) as pool:
        found = pool.map(lambda seed: arms(digits.Study(workers, seed), dense), seeds)
        results = dict(zip(seeds, found, strict=True))
    text = [
        "# Training layouts on scattered digits",
        "",
        "Made by `python studies/layouts.py`, which says what is trained. Top-1 (%) / mean tokens",
        "per image on 2,000 validation images, evaluated in slots, after the last step.",
        "",
        report(results),
    ]
    digits.write("layouts", "\n".join(text), results)


if __name__ == "__main__":
    errors.run(main)
