"""The study on scattered digits: Token Mergence beside other ways to reduce tokens.

    python studies/mergence.py --workdir=runs/mergence --seeds=0,1,2

From the configs of this repository, for every seed and all from the same dense model:

* dense: configs/digits_vit.py, and trained on for as long as the others
* mergence: configs/digits_mergence.py; top-k, EViT and ToMe: the same fine-tuning of a dense model
  that reduces tokens in their way, at most as many MACs
* untrained: each reducer, and tokens kept by chance, applied to dense's weights as they are
* at fewer MACs: MSViT (configs/digits_msvit.py), mergence, and MSViT that merges besides, whose
  gate is given more tokens for as many MACs

Everything is fine-tuned for the epochs of configs/digits_mergence.py, the arms at fewer MACs for
half of them, and judged after its last step. Writes docs/results/mergence.md and mergence.json.
What is done already is not done again.
Cost: about an hour and a half on two CPU cores.
"""

import concurrent.futures
from collections.abc import Sequence
from typing import Any

import digits
import numpy as np

from msvit_jax import config as configs
from msvit_jax import errors

SHARE = 0.67  # of dense's MACs, at most
TOKENS = 64
REDUCERS = {"mergence": "mergence", "top-k": "topk", "EViT": "evit", "ToMe": "tome"}
BOTH = {"model.reducer": "mergence", "model.keep": 0.7, "loss.gate.target": 0.5}
TRAINED = ("dense", "dense, longer", *REDUCERS)
UNTRAINED = (*REDUCERS, "random")
FEWER = ("MSViT", "mergence, fewer", "MSViT + mergence")


def model(**options: Any) -> Any:
    """The digits' dense model with other attributes."""
    given = {f"model.{key}": value for key, value in options.items()}
    config = configs.load(str(digits.ROOT / "configs/digits_vit.py"), given)
    return configs.build_model(configs.resolve(config, 10))


def reduction(reducer: str) -> dict[str, Any]:
    """Keys of a config with which a reducer spends as much of the MACs as it may."""
    most = SHARE * float(model().macs(TOKENS))
    if reducer == "tome":  # as published: as many tokens in every layer
        tried = [{"reducer": reducer, "remove": r} for r in range(1, 13)]
    else:
        tried = [{"reducer": reducer, "keep": k / 100} for k in range(99, 0, -1)]
    found = next(t for t in tried if float(model(**t).macs(TOKENS)) <= most)
    return {f"model.{key}": value for key, value in found.items()}


def arms(study: digits.Study) -> dict[str, digits.Figures]:
    """Trains and evaluates one seed's arms."""
    found = {"dense": study.arm("dense", "digits_vit")}
    epochs = configs.load(str(digits.ROOT / "configs/digits_mergence.py")).epochs
    tuned = {"init_from": study.workdir("dense"), "epochs": epochs}
    halved = {"epochs": epochs / 2}
    single = {"model.scales": "(8,)"}
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "mergence": ("digits_mergence", {}),
        **{
            name: ("digits_mergence", {**single, **reduction(REDUCERS[name])})
            for name in ("top-k", "EViT", "ToMe")
        },
        "MSViT + mergence": ("digits_msvit", {**BOTH, **halved}),
        "mergence, fewer": ("digits_mergence", {"model.keep": 0.3, **halved}),
        "MSViT": ("digits_msvit", halved),
        "dense, longer": ("digits_mergence", {**single, "model.reducer": "none"}),
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waited = {
            name: pool.submit(study.arm, folder(name), config, **{**tuned, **more})
            for name, (config, more) in asked.items()
        }
        for name in UNTRAINED:
            waited[f"untrained {name}"] = pool.submit(
                study.evaluated,
                "dense",
                folder(f"untrained {name}"),
                **reduction(REDUCERS.get(name, name)),
            )
        return found | {name: future.result() for name, future in waited.items()}


def folder(name: str) -> str:
    """Where an arm lies."""
    return name.lower().replace(",", "").replace(" ", "_")


def table(results: dict[int, dict[str, digits.Figures]], names: Sequence[str]) -> str:
    """Top-1 of every seed and its mean and spread, with MACs and tokens layer by layer."""
    seeds = list(results)
    head = ["model", "top-1 (%)", "below dense", *(f"seed {s}" for s in seeds), "MMACs", "of dense"]
    lines = []
    dense = [results[s]["dense, longer"]["top1"] for s in seeds]
    for name in names:
        rows = [results[s][name] for s in seeds]
        top1 = [row["top1"] for row in rows]
        below = np.subtract(dense, top1)
        macs = 1000 * float(np.mean([row["gmacs_mean"] for row in rows]))
        counts = np.mean([row.get("layer_tokens_mean", [row["tokens_mean"]]) for row in rows], 0)
        cells = [
            name,
            digits.with_spread(top1),
            digits.with_spread(below),
            *(f"{t:.2f}" for t in top1),
            f"{macs:.2f}",
            f"{macs / (1000 * results[seeds[0]]['dense']['gmacs_mean']):.3f}",
            ", ".join(f"{c:.3g}" for c in counts),
        ]
        lines.append(cells)
    return digits.markdown([*head, "tokens into the MLPs"], lines)


HEAD = """# Token Mergence on scattered digits

Made by `python studies/mergence.py`, which says what is trained: 64 px, patches of 8 px, 64 wide,
4 layers; top-1 (%) on 2,000 validation images after the last step, mean and standard deviation over
seeds. All but "dense" are fine-tuned from it, those of a table equally long (four epochs, at fewer
MACs two); "below dense" is in points, beside the dense model that was trained four epochs longer.
Tokens are without the class token.
Multiply-accumulates (MACs), not FLOPs.
"""


def report(results: dict[int, dict[str, digits.Figures]]) -> str:
    """The three tables."""
    sections = {
        f"## At most {SHARE:.0%} of dense's MACs, fine-tuned": TRAINED,
        "## The same, applied to dense's weights as they are (one scale)": [
            f"untrained {name}" for name in UNTRAINED
        ],
        "## Fewer MACs: mixed scale, merging, and both": FEWER,
    }
    parts = [f"{title}\n\n{table(results, names)}\n" for title, names in sections.items()]
    return "\n".join([HEAD, *parts])


def main(argv: Sequence[str]) -> None:
    """Runs the study and writes its tables."""
    del argv
    digits.run_seeds("mergence", arms, report)


if __name__ == "__main__":
    errors.run(main)
