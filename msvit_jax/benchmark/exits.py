"""Measures the time that a cascade's early exits save.

    python -m msvit_jax.benchmark.exits [--model=dvt_deit_small] [--batch=32] [--images=256]
        [--shares=0.5,0.3,0.2] [--rounds=5] [--set=width=64 --set=depth=4]

Three Predictors run interleaved on the same random images, with random weights: the cascade with
thresholds at which given shares of the images leave at each exit, the same cascade run to its last
exit, and the dense backbone. Prints a table, then one JSON object as the last line; `realized` is
the speed-up divided by the ratio of multiply-accumulates.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from msvit_jax import config as configs
from msvit_jax import drawing, evaluate, flops, process_tuning
from msvit_jax.benchmark import machine
from msvit_jax.benchmark.sides import timed
from msvit_jax.benchmark.turns import spread, time_interleaved
from msvit_jax.errors import UserError, refuse_arguments, run
from msvit_jax.exits import exit_thresholds
from msvit_jax.inference import Predictor
from msvit_jax.models import registry
from msvit_jax.models.interface import ImageModel

SIDES = ("exits", "last exit", "dense")
COLUMNS = (
    "side",
    "batch",
    "images_per_second",
    "gmacs",
    "against",
    "speedup",
    "mac_ratio",
    "realized",
)


def measure(
    model: str,
    *,
    batch: int,
    images: int,
    shares: Sequence[float],
    rounds: int,
    overrides: dict[str, Any],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measures all cases; returns a record for each, and for "exits" one per comparison.

    Args:
      model: Name of a cascade.
      batch: Number of images of a call of a compiled program.
      images: Number of images answered in each round.
      shares: Share of the images that leaves at each exit.
      rounds: Number of measured rounds, after one warmup round.
      overrides: Attributes of the cascade; the dense model takes those that it has.
      seed: Seed of the weights and images.

    Raises:
      UserError: The model is not a cascade, or the shares do not fit its exits.
    """
    if model not in registry.CASCADES:
        raise UserError(
            f"{model!r} is not a cascade; choose one of {', '.join(registry.CASCADES)}."
        )
    cascade = registry.create_model(model, **overrides)
    stages = len(cascade.exit_tokens)
    if len(shares) != stages or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        raise UserError(f"--shares={list(shares)}: give {stages} shares that sum to 1.")
    taken = {k: v for k, v in overrides.items() if k in registry.dense_options(model)}
    if cascade.image_size % cascade.grid_size == 0:  # as many tokens as the last stage
        taken["patch_size"] = cascade.image_size // cascade.grid_size
    dense = registry.create_model(registry.dense_model(model), **taken)
    pixels = np.random.default_rng(seed).integers(0, 256, (images, *cascade.image_shape), np.uint8)
    variables = [random_variables(module, seed) for module in (cascade, dense)]
    early, last = (Predictor(cascade, variables[0], batch_size=batch) for _ in range(2))
    plain = Predictor(dense, variables[1], batch_size=batch)
    early.thresholds = exit_thresholds.by_shares(early.certainty(pixels), shares)
    answers = [predictor(pixels) for predictor in (early, last, plain)]
    macs = [
        float(flops.macs_per_image(predictor.model, answer.tokens).mean())
        for predictor, answer in zip((early, last, plain), answers, strict=True)
    ]
    seconds = time_interleaved([[timed(p, pixels)] for p in (early, last, plain)], rounds, warmup=1)
    records = [
        {
            "side": name,
            "model": registry.dense_model(model) if name == "dense" else model,
            "batch": batch,
            "shares": list(shares),
            **spread("images_per_second", images / seconds[:, index]),
            "gmacs": macs[index] / 1e9,
        }
        for index, name in enumerate(SIDES)
    ]
    return records[1:] + [
        {**records[0], "against": SIDES[other], **_compared(seconds, macs, other)}
        for other in (1, 2)
    ]


def _compared(seconds: np.ndarray, macs: Sequence[float], other: int) -> dict[str, Any]:
    speedup = spread("speedup", seconds[:, other] / seconds[:, 0])
    ratio = macs[other] / macs[0]
    return {**speedup, "mac_ratio": ratio, "realized": speedup["speedup"] / ratio}


def random_variables(model: ImageModel, seed: int) -> Any:
    """Draws a model's variables."""
    zeros = jnp.zeros((1, *model.image_shape))
    return drawing.variables(model, jax.random.key(seed), zeros)


def model_options(texts: Sequence[str]) -> dict[str, Any]:
    """Reads attributes of a model given as "key=value"."""
    config = configs.base()
    for key, value in map(configs.split_override, texts):
        configs.set_key(config, f"model.{key}", value)
    return {key: value for key, value in config.model.items() if key != "name"}


def print_records(records: Sequence[dict[str, Any]], columns: Sequence[str], kept: bool) -> None:
    """Prints records as a table, then with the machine as one line of JSON.

    Args:
      records: Records of a benchmark.
      columns: Keys to show in the table.
      kept: Whether the process keeps freed memory.
    """
    print(evaluate.table(records, columns), flush=True)
    print(json.dumps({**machine.describe(), "keeps_freed_memory": kept, "records": records}))


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and prints its results."""
    refuse_arguments(argv)
    logging.set_verbosity(logging.ERROR)
    kept = process_tuning.keep_freed_memory()
    given = flags.FLAGS
    records = measure(
        given.model,
        batch=given.batch,
        images=given.images,
        shares=[float(share) for share in given.shares],
        rounds=given.rounds,
        overrides=model_options(given.set),
    )
    print_records(records, COLUMNS, kept)


if __name__ == "__main__":
    flags.DEFINE_string("model", "dvt_deit_small", "Name of a cascade.")
    flags.DEFINE_integer("batch", 32, "Number of images in a call of a compiled program.")
    flags.DEFINE_integer("images", 256, "Number of images that are classified in each round.")
    flags.DEFINE_list(
        "shares", ["0.5", "0.3", "0.2"], "Share of the images that leave at each exit."
    )
    flags.DEFINE_integer(
        "rounds", 5, "Number of times that all cases run, after one warm-up round."
    )
    flags.DEFINE_multi_string(
        "set", [], "Attribute of the models, e.g. --set=width=64; may be repeated."
    )
    run(main)
