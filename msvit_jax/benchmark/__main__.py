"""Measures images per second of a dense and a dynamic model, and the time saved per MAC saved.

    python -m msvit_jax.benchmark --batch=1,32,128 [--model=msvit_deit_small_patch16_224]
        [--tokens=128 --spread=30] [--layouts=slots,budget,rows] [--dtype=bfloat16]
        [--rounds=10] [--set=width=64 --set=depth=4] [--train]

A model and its dense counterpart run in one process, interleaved and after a warmup. Weights and
images are random. The numbers of active tokens are not the gate's: they are drawn with the given
mean and spread, but the gate still runs. A layout's sizes are chosen so that everything fits. At
batch 1 there are 16 images with different counts, run one after the other, with one program for
each token capacity (a multiple of 8). With --tokens=196 --spread=0 all regions are fine, which
shows the overhead of the gate and the layouts.

A model without a gate whose layers reduce tokens (mergence_..., or any with --set=reducer=...) has
a single dynamic case, "reduced".

Segmenters are measured up to the logits of patches, at 512 px and for 150 classes by default:
    --model=msvit_seg_vit_small_mask --tokens=600 --spread=100 --batch=8 [--set=decode=mixed]

With --train the training step of train.py is measured, by default in the layouts slots and trimmed:
forward, backward, optimizer and the gate's loss. In budget and rows the gate is frozen.

Prints a table, then one JSON object as the last line: machine, versions, commit, and under
"records" one record for each batch and layout. `speedup` is the median ratio of paired times, dense
/ dynamic; `mac_ratio` is the ratio of analytic multiply-accumulates; `realized` = speedup /
mac_ratio.
"""

import json
from collections.abc import Sequence

from absl import flags, logging

from msvit_jax import benchmark, errors, process_tuning
from msvit_jax.benchmark.options import DTYPES, REDUCED, mixed_scale

_MODEL = flags.DEFINE_string(
    "model", "msvit_deit_small_patch16_224", "Name of a model with a gate or with merging."
)
_BATCH = flags.DEFINE_list("batch", ["1", "32", "128"], "Batch sizes to measure, in images.")
_LAYOUTS = flags.DEFINE_list(
    "layouts",
    None,
    "Layouts to measure; by default slots, budget and rows, with --train slots and trimmed.",
)
_TOKENS = flags.DEFINE_float("tokens", 128, "Mean number of active patch tokens per image.")
_SPREAD = flags.DEFINE_float("spread", 30, "Standard deviation of that number.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Number type of the computation.")
_TRAIN = flags.DEFINE_bool(
    "train", False, "Whether to measure training steps instead of forward passes."
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 10, "Number of times that all cases run, after two warm-up rounds."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "Attribute of the models, e.g. --set=width=64; may be repeated."
)
_TOKEN_CAPACITY = flags.DEFINE_list(
    "token_capacity", None, "Capacity in patch tokens per image: one number or several."
)
_ROWS = flags.DEFINE_integer("rows", None, "Number of rows for a batch; needs --row_width.")
_ROW_WIDTH = flags.DEFINE_integer(
    "row_width", None, "Number of tokens of a row, prefix tokens included."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of token counts and decisions.")


def _numbers(name: str, texts: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(int(text) for text in texts)
    except ValueError as error:
        raise errors.UserError(f"--{name}={','.join(texts)}: give whole numbers.") from error


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and prints its results."""
    errors.refuse_arguments(argv)
    logging.set_verbosity(logging.ERROR)
    kept = process_tuning.keep_freed_memory()
    usual = ["slots", "trimmed"] if _TRAIN.value else ["slots", "budget", "rows"]
    if not mixed_scale(_MODEL.value, _SET.value):
        usual = [REDUCED]
    options = benchmark.Options(
        model=_MODEL.value,
        batches=_numbers("batch", _BATCH.value),
        layouts=tuple(_LAYOUTS.value or usual),
        train=_TRAIN.value,
        dtype=_DTYPE.value,
        tokens=_TOKENS.value,
        spread=_SPREAD.value,
        rounds=_ROUNDS.value,
        overrides=tuple(_SET.value),
        token_capacity=_numbers("token_capacity", _TOKEN_CAPACITY.value)
        if _TOKEN_CAPACITY.value
        else None,
        rows=_ROWS.value,
        row_width=_ROW_WIDTH.value,
        seed=_SEED.value,
    )
    print(json.dumps({**benchmark.run(options), "keeps_freed_memory": kept}))


if __name__ == "__main__":
    errors.run(main)
