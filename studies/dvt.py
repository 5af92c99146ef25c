"""The study on scattered digits: a DVT cascade, what its reuses are worth and what it saves.

    python studies/dvt.py --workdir=runs/dvt --seeds=0,1,2

From the configs of this repository, for every seed and all from the same dense model:

* dense: configs/digits_vit.py, and trained on for as long as the cascades
* two stages: configs/digits_dvt.py, for what a cascade saves; and the same without reuse
* both: three stages and two epochs; features, relations, none: the same with one reuse, and
  without, for what reuse adds

Everything is judged after its last step. Thresholds are fitted on training images and judged on
validation images: by differential evolution for budgets fixed beforehand, and by the geometric
scheme. Writes docs/results/dvt.md, dvt.json and dvt.png. What is done already is not done again.
Cost: about two and a half hours on two CPU cores.
"""

import concurrent.futures
import pathlib
from collections.abc import Sequence
from typing import Any

import digits
import numpy as np
from matplotlib import pyplot

from msvit_jax import config as configs
from msvit_jax import errors

TWO, TWO_ALONE = "two stages", "two stages, no reuse"
REUSES: dict[str, dict[str, Any]] = {
    "both": {},
    "features": {"model.relation_reuse": False},
    "relations": {"model.feature_reuse": False},
    "none": {"model.feature_reuse": False, "model.relation_reuse": False},
}
THREE_STAGES: dict[str, Any] = {"model.grid_sizes": (4, 6, 8), "epochs": 2.0}
AS_TWO, AS_THREE = "dense, 6 epochs longer", "dense, 2 epochs longer"
SAVED = (1.3, 1.6, 2.0)  # dense's MACs over the budgets that thresholds are searched for
FIT_EXAMPLES = 5000

Results = dict[int, dict[str, digits.Figures]]


def arms(study: digits.Study) -> dict[str, digits.Figures]:
    """Trains and evaluates one seed's arms."""
    dense = study.arm("dense", "digits_vit")
    tuned = configs.load(str(digits.ROOT / "configs/digits_dvt.py"))
    start = {"init_from": study.workdir("dense")}
    as_tuned = {
        "optimizer.learning_rate": tuned.optimizer.learning_rate,
        "optimizer.warmup_epochs": tuned.optimizer.warmup_epochs,
    }
    budgets = ",".join(f"{dense['gmacs_mean'] / saved:.6f}" for saved in SAVED)
    curve = {"budget_curve": True, "gmacs_budgets": budgets, "fit_examples": FIT_EXAMPLES}

    def cascade(name: str, **overrides: Any) -> digits.Figures:
        study.arm(name, "digits_dvt", **start, **overrides)
        return study.evaluated(name, "curve", **curve)

    def longer(name: str, epochs: float) -> digits.Figures:
        return study.arm(name, "digits_vit", **start, **as_tuned, epochs=epochs)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        waited = {
            AS_TWO: pool.submit(longer, "dense_as_two", tuned.epochs),
            AS_THREE: pool.submit(longer, "dense_tuned", THREE_STAGES["epochs"]),
            TWO: pool.submit(cascade, "dvt_two_stages"),
            TWO_ALONE: pool.submit(cascade, "dvt_two_alone", **REUSES["none"]),
        }
        for name, reuses in REUSES.items():
            waited[name] = pool.submit(cascade, f"dvt_{name}", **THREE_STAGES, **reuses)
        return {"dense": dense} | {name: future.result() for name, future in waited.items()}


def of_arm(results: Results, name: str) -> list[digits.Figures]:
    """The figures of an arm for all seeds."""
    return [seed[name] for seed in results.values()]


def exits_table(results: Results, names: Sequence[str], dense: Sequence[str]) -> str:
    """Top-1 of every exit if all images left there, beside dense models."""
    count = len(results[min(results)][names[0]]["exits_top1"])
    head = ["model", *(f"exit {stage + 1}" for stage in range(count)), "MMACs up to each exit"]
    table = []
    for name in names:
        rows = of_arm(results, name)
        cells = [
            digits.with_spread([row["exits_top1"][stage] for row in rows]) for stage in range(count)
        ]
        macs = ", ".join(f"{1000 * m:.2f}" for m in rows[0]["exits_gmacs"])
        table.append([name, *cells, macs])
    for name in dense:
        rows = of_arm(results, name)
        cells = [*("" for _ in range(count - 1)), digits.with_spread([row["top1"] for row in rows])]
        table.append([name, *cells, f"{1000 * rows[0]['gmacs_mean']:.2f}"])
    return digits.markdown(head, table)


def gains_table(results: Results, names: Sequence[str], without: str) -> str:
    """What each reuse adds to the accuracy of the later exits, seed by seed."""
    head = ["points above no reuse", "exit", *(f"seed {seed}" for seed in results), "mean"]
    table = []
    for name in names:
        for stage in range(1, len(results[min(results)][name]["exits_top1"])):
            gains = [
                seed[name]["exits_top1"][stage] - seed[without]["exits_top1"][stage]
                for seed in results.values()
            ]
            shown = [f"{gain:+.2f}" for gain in gains]
            table.append([name, str(stage + 1), *shown, digits.with_spread(gains)])
    return digits.markdown(head, table)


def budget_table(results: Results, names: Sequence[str], dense: str) -> str:
    """Accuracy within budgets that were fixed beforehand."""
    head = ["model", "budget, MMACs", "fewer than dense", "spent", "top-1 (%)", "below dense"]
    head += [f"below {dense}", "shares that leave at each exit"]
    table = []
    for name in names:
        for index, saved in enumerate(SAVED):
            found = [
                [row for row in arm["budget_curve"] if row["kind"] == "search"][index]
                for arm in of_arm(results, name)
            ]
            below = [
                [d["top1"] - row["top1"] for d, row in zip(of_arm(results, d), found, strict=True)]
                for d in ("dense", dense)
            ]
            cells = [
                name,
                f"{1000 * found[0]['budget']:.2f}",
                f"{saved:g} times",
                digits.with_spread([1000 * row["gmacs_mean"] for row in found]),
                digits.with_spread([row["top1"] for row in found]),
                *map(digits.with_spread, below),
                ", ".join(f"{x:.2f}" for x in np.mean([row["shares"] for row in found], axis=0)),
            ]
            table.append(cells)
    return digits.markdown(head, table)


def least_macs(figures: digits.Figures, top1: float) -> float | None:
    """The cheapest point of the curve, in GMACs, that is as accurate; None if none is."""
    points = [row for row in figures["budget_curve"] if not row["kind"].startswith("exit")]
    return min((row["gmacs_mean"] for row in points if row["top1"] >= top1), default=None)


def saved_table(results: Results, names: Sequence[str], dense: Sequence[str]) -> str:
    """How many times fewer MACs the cheapest point needs that is as accurate as dense models."""
    head = ["as accurate as", "model", *(f"seed {seed}" for seed in results)]
    table = []
    for against in dense:
        for name in names:
            cells = []
            for seed in results.values():
                least = least_macs(seed[name], seed[against]["top1"])
                cells.append(
                    "not reached" if least is None else f"{seed['dense']['gmacs_mean'] / least:.2f}"
                )
            table.append([against, name, *cells])
    return digits.markdown(head, table)


HEAD = """# DVT on scattered digits

Made by `python studies/dvt.py`, which says what is trained: 64 px, stages 64 wide with 4 layers,
all from the weights of the same dense model; top-1 (%) on 2,000 validation images after the last
step, mean and standard deviation over the seeds {seeds}. Thresholds were fitted on 5,000 training
images. Multiply-accumulates (MACs), not FLOPs; those up to an exit include the stages before it.
Two stages were trained for six epochs with both reuses or without, three stages for two.

![Accuracy over multiply-accumulates of the cascades, beside dense models](dvt.png)
"""

CHEAPEST = """The cheapest point of the geometric scheme and of the searches that is as accurate
as the same seed's dense model; chosen on the validation images, so a little flattering.

"""


def report(results: Results) -> str:
    """All tables."""
    two, three = (TWO, TWO_ALONE), tuple(REUSES)
    as_two, as_three = ("dense", AS_TWO), ("dense", AS_THREE)
    sections = {
        "## Two stages, grids 5 and 8": exits_table(results, two, as_two),
        "### Within a budget": budget_table(results, two, AS_TWO),
        "### Times fewer MACs at dense's accuracy": CHEAPEST + saved_table(results, two, as_two),
        "### What reuse adds": gains_table(results, [TWO], TWO_ALONE),
        "## Three stages, grids 4, 6 and 8": exits_table(results, three, as_three),
        "### Within a budget, three stages": budget_table(results, three, AS_THREE),
        "### Times fewer MACs at dense's accuracy, three stages": saved_table(
            results, three, as_three
        ),
        "### What each reuse adds": gains_table(results, ["both", "features", "relations"], "none"),
    }
    head = HEAD.format(seeds=", ".join(map(str, results)))
    return "\n".join([head, *(f"{title}\n\n{text}\n" for title, text in sections.items())])


def picture(results: Results, path: pathlib.Path) -> None:
    """Draws accuracy over compute: the geometric scheme's curves and the dense models, by seed."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for index, (name, label) in enumerate(
        ((TWO, "grids 5, 8; 6 epochs"), ("both", "grids 4, 6, 8; 2 epochs"))
    ):
        for arm in of_arm(results, name):
            points = [row for row in arm["budget_curve"] if row["kind"] == "geometric"]
            macs, top1 = [1000 * row["gmacs_mean"] for row in points], [r["top1"] for r in points]
            axes.plot(macs, top1, color=f"C{index}", linewidth=1, label=label)
            label = ""  # of all seeds one is named
    for name, mark in (("dense", "*"), (AS_TWO, "^"), (AS_THREE, "v")):
        rows = of_arm(results, name)
        macs, top1 = [1000 * row["gmacs_mean"] for row in rows], [row["top1"] for row in rows]
        axes.plot(macs, top1, f"k{mark}", fillstyle="none", label=name)
    axes.set(xlabel="MMACs per image (mean)", ylabel="top-1 (%)", ylim=(90, 99))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> None:
    """Runs the study, writes its tables and draws its curves."""
    del argv
    results = digits.run_seeds("dvt", arms, report)
    picture(results, digits.out("dvt.png"))


if __name__ == "__main__":
    errors.run(main)
