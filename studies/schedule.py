"""Adds up what a Predictor computes in vain: MACs of its calls over those of the images' tokens.

    python studies/schedule.py [--model=msvit_deit_small_patch16_224] [--tokens=128 --spread=30]

Nothing is run: token counts are drawn, and the shapes that the Predictor would choose are added up.
The figures are the same on every machine. Padding of batches, budgets and rows is in them; the
gate's own pass is not.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

import msvit_jax
from msvit_jax.evaluate import table
from msvit_jax.inference import shapes
from msvit_jax.inference.schedule import Queue

_MODEL = flags.DEFINE_string(
    "model", "msvit_deit_small_patch16_224", "Name of a model with a gate."
)
_TOKENS = flags.DEFINE_float("tokens", 128, "Mean number of patch tokens per image.")
_SPREAD = flags.DEFINE_float("spread", 30, "Standard deviation of that number.")
_PROGRAMS = flags.DEFINE_integer(
    "max_programs", 24, "Most programs, as the Predictor's max_programs."
)
SIZES = ((1, 1), (1, 32), (8, 32), (32, 32), (50, 32), (256, 32), (2000, 32), (2000, 128))
DRAWS = 10


def main(argv: Sequence[str]) -> None:
    """Prints a table."""
    del argv
    model, rng = msvit_jax.create_model(_MODEL.value), np.random.default_rng(0)
    rows = []
    for images, batch in SIZES:
        counts = [_counts(rng, model, images) for _ in range(DRAWS)]
        row = {"images": images, "batch": batch}
        for layout in ("slots", "budget", "rows", "auto"):
            row[layout] = float(np.mean([_excess(model, layout, batch, c) for c in counts]))
        rows.append(row)
    print(table(rows, list(rows[0])))


def _counts(rng: np.random.Generator, model: Any, images: int) -> np.ndarray:
    """Token counts that a gate can give: regions + 3 x fine regions."""
    regions = model.num_regions
    fine = (rng.normal(_TOKENS.value, _SPREAD.value, images) - regions) / 3
    return regions + 3 * np.clip(np.rint(fine), 0, regions).astype(int)


def _excess(model: Any, layout: str, batch: int, counts: np.ndarray) -> float:
    """MACs of the Predictor's calls for images that come batch by batch, over what they need."""
    policy = shapes.make_policy(
        model,
        layout=layout,
        batch=batch,
        groups=1,
        buckets=None,
        row_width=None,
        most_shapes=_PROGRAMS.value - 2,
    )
    queue, seen, spent = Queue(policy), 0, 0.0
    while True:
        call = queue.next(last=seen == len(counts))
        if call is not None:
            spent += call.shape.macs
        elif seen < len(counts):
            for image in range(seen, min(seen + batch, len(counts))):
                queue.add(image, int(counts[image]))
            seen = min(seen + batch, len(counts))
        else:
            return spent / float(model.macs(counts).sum())


if __name__ == "__main__":
    app.run(main)
