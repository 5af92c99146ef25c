"""The study on scattered digits: a DVT cascade, what its reuses are worth and what it saves.

    python studies/dvt.py --workdir=runs/dvt --seeds=0,1,2

From the configs of this repository, for every seed and all from the same dense model:

* dense: configs/digits_vit.py, and trained on for as long as the others
* both: configs/digits_dvt.py, whose stages reuse features and relations of the stage before
* features, relations, none: the same with one reuse, and without

Everything is judged after its last step. Thresholds are fitted on training images and judged on
validation images: by differential evolution for budgets fixed beforehand, and by the geometric
scheme. Writes docs/results/dvt.md and dvt.json. What is done already is not done again.
Cost: about an hour and a half on two CPU cores.
"""

import concurrent.futures
from collections.abc import Sequence

import digits
import numpy as np

from msvit_jax import config as configs
from msvit_jax import errors

REUSES = {
    "both": {},
    "features": {"model.relation_reuse": False},
    "relations": {"model.feature_reuse": False},
    "none": {"model.feature_reuse": False, "model.relation_reuse": False},
}
SAVED = (1.3, 1.6, 2.0)  # dense's MACs over the budgets that thresholds are searched for
FIT_EXAMPLES = 5000


def arms(study: digits.Study) -> dict[str, digits.Figures]:
    """Trains and evaluates one seed's arms."""
    dense = study.arm("dense", "digits_vit")
    tuned = configs.load(str(digits.ROOT / "configs/digits_dvt.py"))
    start = {"init_from": study.workdir("dense"), "epochs": tuned.epochs}
    longer = {
        "optimizer.learning_rate": tuned.optimizer.learning_rate,
        "optimizer.warmup_epochs": tuned.optimizer.warmup_epochs,
    }
    budgets = ",".join(f"{dense['gmacs_mean'] / saved:.6f}" for saved in SAVED)
    curve = {"budget_curve": True, "budgets": budgets, "fit_examples": FIT_EXAMPLES}

    def cascade(name: str) -> digits.Figures:
        study.arm(f"dvt_{name}", "digits_dvt", **start, **REUSES[name])
        return study.evaluated(f"dvt_{name}", "curve", **curve)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        waited = {name: pool.submit(cascade, name) for name in REUSES}
        waited["dense, longer"] = pool.submit(
            study.arm, "dense_tuned", "digits_vit", **start, **longer
        )
        return {"dense": dense} | {name: future.result() for name, future in waited.items()}


def least_macs(figures: digits.Figures, top1: float) -> float | None:
    """The cheapest point of the curve, in MMACs, that is as accurate; None if none is."""
    points = [row for row in figures["budget_curve"] if not row["kind"].startswith("exit")]
    found = [1000 * row["gmacs_mean"] for row in points if row["top1"] >= top1]
    return min(found, default=None)


def of_arm(results: dict[int, dict[str, digits.Figures]], name: str) -> list[digits.Figures]:
    """The figures of an arm for all seeds that it was run with."""
    return [seed[name] for seed in results.values() if name in seed]


def exits_table(results: dict[int, dict[str, digits.Figures]]) -> str:
    """Top-1 of every exit if all images left there, beside the dense models."""
    first = results[min(results)]["both"]
    count = len(first["exits_top1"])
    head = ["model", "seeds", *(f"exit {stage + 1}" for stage in range(count))]
    head += ["MMACs up to each exit"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in REUSES:
        rows = of_arm(results, name)
        cells = [str(len(rows))]
        cells += [
            digits.with_spread([row["exits_top1"][stage] for row in rows]) for stage in range(count)
        ]
        macs = ", ".join(f"{1000 * m:.2f}" for m in rows[0]["exits_gmacs"])
        lines.append(f"| {name} | {' | '.join(cells)} | {macs} |")
    for name in ("dense", "dense, longer"):
        rows = of_arm(results, name)
        cells = [str(len(rows)), *("" for _ in range(count - 1))]
        cells.append(digits.with_spread([row["top1"] for row in rows]))
        lines.append(f"| {name} | {' | '.join(cells)} | {1000 * rows[0]['gmacs_mean']:.2f} |")
    return "\n".join(lines)


def gains_table(results: dict[int, dict[str, digits.Figures]]) -> str:
    """What each reuse adds to the accuracy of the later exits, seed by seed."""
    head = ["points above no reuse", "exit", *(f"seed {seed}" for seed in results), "mean"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in ("both", "features", "relations"):
        for stage in range(1, len(results[min(results)]["both"]["exits_top1"])):
            gains = {
                number: seed[name]["exits_top1"][stage] - seed["none"]["exits_top1"][stage]
                for number, seed in results.items()
                if name in seed
            }
            shown = [f"{gains[n]:+.2f}" if n in gains else "not run" for n in results]
            cells = [name, str(stage + 1), *shown, digits.with_spread(list(gains.values()))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def budget_table(results: dict[int, dict[str, digits.Figures]]) -> str:
    """Accuracy within budgets that were fixed beforehand."""
    head = ["model", "budget, MMACs", "fewer than dense", "spent", "top-1 (%)", "below dense"]
    head += ["shares that leave at each exit"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in REUSES:
        for index, saved in enumerate(SAVED):
            found = [
                [r for r in arm["budget_curve"] if r["kind"] == "search"][index]
                for arm in of_arm(results, name)
            ]
            dense = [seed["dense, longer"]["top1"] for seed in results.values() if name in seed]
            below = [top1 - row["top1"] for top1, row in zip(dense, found, strict=True)]
            shares = np.mean([row["shares"] for row in found], axis=0)
            cells = [
                name,
                f"{1000 * found[0]['budget']:.2f}",
                f"{saved:g} times",
                digits.with_spread([1000 * row["gmacs_mean"] for row in found]),
                digits.with_spread([row["top1"] for row in found]),
                digits.with_spread(below),
                ", ".join(f"{share:.2f}" for share in shares),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def saved_table(results: dict[int, dict[str, digits.Figures]]) -> str:
    """How many times fewer MACs the cheapest point needs that is as accurate as dense."""
    head = ["as accurate as", "model", *(f"seed {seed}" for seed in results)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for against in ("dense", "dense, longer"):
        for name in REUSES:
            cells = []
            for seed in results.values():
                if name not in seed:
                    cells.append("not run")
                    continue
                least = least_macs(seed[name], seed[against]["top1"])
                dense = 1000 * seed["dense"]["gmacs_mean"]
                cells.append("not reached" if least is None else f"{dense / least:.2f}")
            lines.append(f"| {against} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


HEAD = """# DVT on scattered digits

Made by `python studies/dvt.py`, which says what is trained: 64 px, three stages on grids of 4, 6
and 8, 64 wide, 4 layers; top-1 (%) on 2,000 validation images after the last step, mean and
standard deviation over seeds. The cascades and "dense, longer" are fine-tuned equally long from
the weights of "dense". Multiply-accumulates (MACs), not FLOPs; those up to an exit include the
stages before it.
"""


def report(results: dict[int, dict[str, digits.Figures]]) -> str:
    """All tables."""
    sections = {
        "## Every exit, if all images left there": exits_table(results),
        "## What reuse adds": gains_table(results),
        "## Within a budget (thresholds fitted on training images)": budget_table(results),
        "## Times fewer MACs at dense's accuracy": "The cheapest point of the geometric scheme and "
        "of the searches that is as accurate; chosen on the validation images, so a little "
        "flattering.\n\n" + saved_table(results),
    }
    return "\n".join([HEAD, *(f"{title}\n\n{text}\n" for title, text in sections.items())])


def main(argv: Sequence[str]) -> None:
    """Runs the study and writes its tables."""
    del argv
    digits.run_seeds("dvt", arms, report)


if __name__ == "__main__":
    errors.run(main)
