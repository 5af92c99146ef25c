"""Images per second, dense against dynamic, and what of the saved arithmetic becomes time.

    python -m msvit_jax.benchmark --batch=1,32,128 [--model=msvit_deit_small_patch16_224]
        [--tokens=128 --spread=30] [--layouts=slots,budget,rows] [--dtype=bfloat16]
        [--rounds=10] [--set=width=64 --set=depth=4] [--train]

A model and the dense model it is built over run in one process, in turns, warm. Weights
and images are random, and the numbers of active tokens are forced: drawn with the given mean and
spread; the gate runs all the same. A layout's sizes are chosen so that everything fits. At batch 1
there are 16 images with different counts, one after the other, one program for each 8 tokens. With
--tokens=196 --spread=0 everything is fine, and what remains is the price of being able to choose.

A model whose layers reduce tokens and that has no gate (mergence_..., or any with
--set=reducer=...) has one dynamic side, "reduced".

With --train it is the step that train.py runs, by default in the layouts slots and trimmed:
forward, backward, optimiser and the gate's loss. In budget and rows the gate is frozen.

A table, then one JSON object as the last line: machine, versions, commit, and under "records" one
record for each batch and layout. `speedup` is the median of the ratios of pairs, dense / dynamic;
`mac_ratio` that of the analytic multiply-accumulates; `realised` = speedup / mac_ratio.
"""

import json
from collections.abc import Sequence

from absl import flags, logging

from msvit_jax import benchmark, errors, host
from msvit_jax.benchmark.options import DTYPES, REDUCED
from msvit_jax.models.registry import MIXED_SCALE

_MODEL = flags.DEFINE_string(
    "model", "msvit_deit_small_patch16_224", "A model with a gate or with merging."
)
_BATCH = flags.DEFINE_list("batch", ["1", "32", "128"], "Images in a batch; several sizes.")
_LAYOUTS = flags.DEFINE_list("layouts", None, "Of the dynamic sides; by default see above.")
_TOKENS = flags.DEFINE_float("tokens", 128, "Mean number of active patch tokens.")
_SPREAD = flags.DEFINE_float("spread", 30, "Their standard deviation.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the computation.")
_TRAIN = flags.DEFINE_bool("train", False, "Training steps instead of forward passes.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "How often all sides run, after two to warm up.")
_SET = flags.DEFINE_multi_string("set", [], "Attributes of the models: --set=width=64.")
_BUDGET = flags.DEFINE_list("budget", None, "Places for patch tokens: one number, or a ladder.")
_ROWS = flags.DEFINE_integer("rows", None, "Rows of the whole batch; goes with --row_width.")
_ROW_WIDTH = flags.DEFINE_integer("row_width", None, "Tokens of a row, prefix tokens included.")
_SEED = flags.DEFINE_integer("seed", 0, "Of token counts and decisions.")


def _numbers(name: str, texts: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(int(text) for text in texts)
    except ValueError as error:
        raise errors.UserError(f"--{name}={','.join(texts)}: whole numbers are needed.") from error


def main(argv: Sequence[str]) -> None:
    """The command."""
    if len(argv) > 1:
        raise errors.UserError(f"Unexpected argument {argv[1]!r}.")
    logging.set_verbosity(logging.ERROR)
    kept = host.keep_freed_memory()
    usual = ["slots", "trimmed"] if _TRAIN.value else ["slots", "budget", "rows"]
    if _MODEL.value not in MIXED_SCALE:
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
        budget=_numbers("budget", _BUDGET.value) if _BUDGET.value else None,
        rows=_ROWS.value,
        row_width=_ROW_WIDTH.value,
        seed=_SEED.value,
    )
    print(json.dumps({**benchmark.run(options), "keeps_freed_memory": kept}))


if __name__ == "__main__":
    errors.run(main)
