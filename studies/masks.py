"""The study of segmentation on scattered digits: mixed scale and merging beside dense encoders.

    python studies/masks.py --workdir=runs/masks --seeds=0,1,2

Digit or background, pixel by pixel, with the mask decoder. For every seed:

* dense: configs/digits_segmenter.py, 4 epochs

and from it, for two epochs more:

* dense, longer
* MSViT: configs/digits_msvit_segmenter.py, about half of the tokens
* lower resolution: images of 56 px (49 tokens), answers at their own 64
* mergence, ToMe: about as many MACs as MSViT, merged patches put back as copies of what they became
* "own features": MSViT, mergence and ToMe with `model.unmerge="residual"`

All are judged after their last step, at the images' own size. Writes docs/results/masks.md and
masks.json. What is done already is not done again. Cost: an hour and a half on one CPU core.
"""

import concurrent.futures
from collections.abc import Sequence
from typing import Any

import digits
import numpy as np
from tables import markdown, with_spread

from msvit_jax import errors

TUNED = {"epochs": 2.0, "optimizer.learning_rate": 1e-3}
MERGENCE = {"model.reducer": "mergence", "model.keep": 0.4}
TOME = {"model.reducer": "tome", "model.remove": 12}  # 16 of 64 tokens are left
OWN = {"model.unmerge": "residual"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, longer": ("digits_segmenter", TUNED),
    "MSViT": ("digits_msvit_segmenter", {"model.unmerge": "copy"}),
    "MSViT, own features": ("digits_msvit_segmenter", OWN),
    "lower resolution": (
        "digits_segmenter",
        {**TUNED, "model.image_size": 56, "data.image_size": 56, "data.short_side": 56},
    ),
    "mergence": ("digits_segmenter", {**TUNED, **MERGENCE}),
    "mergence, own features": ("digits_segmenter", {**TUNED, **MERGENCE, **OWN}),
    "ToMe": ("digits_segmenter", {**TUNED, **TOME}),
    "ToMe, own features": ("digits_segmenter", {**TUNED, **TOME, **OWN}),
}


def arms(study: digits.Study) -> dict[str, digits.Figures]:
    """Trains and evaluates one seed's arms."""
    found = {"dense": study.arm("dense", "digits_segmenter")}
    start = {"init_from": study.workdir("dense")}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waited = {
            name: pool.submit(
                study.arm,
                name.lower().replace(", ", "_").replace(" ", "_"),
                config,
                **start,
                **more,
            )
            for name, (config, more) in ARMS.items()
        }
        return found | {name: future.result() for name, future in waited.items()}


HEAD = """# Segmentation of scattered digits

Made by `python studies/masks.py`, which says what is trained: digit or background, 64 px, patches
of 8 px, 64 wide, 4 layers and Segmenter's mask decoder; mIoU (%) on 2,000 validation images at
their own size, after the last step; mean and standard deviation over seeds. "Own features" is
`unmerge="residual"`. "Below dense" is in points, beside the dense model that was trained as long.
MACs are those of encoder and decoder, means over images.
"""


def report(results: dict[int, dict[str, digits.Figures]]) -> str:
    """The table."""
    seeds = list(results)
    dense = [results[s]["dense, longer"]["miou"] for s in seeds]
    rows = []
    for name in ("dense", *ARMS):
        found = [results[s][name] for s in seeds]
        miou = [r["miou"] for r in found]
        tokens, macs = (np.mean([r[k] for r in found]) for k in ("tokens_mean", "gmacs_mean"))
        share = macs / np.mean([results[s]["dense"]["gmacs_mean"] for s in seeds])
        rows.append(
            [
                *(name, with_spread(miou), with_spread(np.subtract(dense, miou))),
                *(f"{tokens:.1f}", f"{1000 * macs:.2f}", f"{share:.3f}"),
                *(f"{x:.2f}" for x in miou),
            ]
        )
    head = ["encoder", "mIoU (%)", "below dense", "tokens", "MMACs", "of dense"]
    return f"{HEAD}\n{markdown([*head, *(f'seed {s}' for s in seeds)], rows)}\n"


def main(argv: Sequence[str]) -> None:
    """Runs the study and writes its table."""
    del argv
    digits.run_seeds("masks", arms, report)


if __name__ == "__main__":
    errors.run(main)
