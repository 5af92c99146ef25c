"""Merging by a product with a one-hot matrix beside merging by scatter-add, in turns.

    python studies/merge_speed.py [--model=deit_small_patch16_224] [--keep=0.7]

For every layer of a model that reduces: milliseconds to merge a batch's removed tokens into their
targets, each way compiled alone and warm; the median of all turns and half of the range between the
quartiles. The library adds by scatter on CPU, by a product elsewhere (`reducers.Merge`).
"""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import msvit_jax
from msvit_jax.benchmark import machine
from msvit_jax.evaluate import table
from msvit_jax.reducers import base

_MODEL = flags.DEFINE_string("model", "deit_small_patch16_224", "Name of a plain ViT.")
_KEEP = flags.DEFINE_float("keep", 0.7, "Share of the patch tokens that a reducing layer keeps.")
_BATCH = flags.DEFINE_list("batch", ["1", "32"], "Batch sizes, in images.")
_TURNS = flags.DEFINE_integer("turns", 60, "Number of turns; each way is timed once in each.")

Way = Callable[[base.Merge, jax.Array], jax.Array]


def _parts(merge: base.Merge, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what the positions hold at first, what is added, and the targets of that."""
    assert merge.kept_weight is not None
    assert merge.removed_weight is not None
    kept = merge.kept_weight[:, :, None] * base.take(x, merge.kept)
    return kept, merge.removed_weight[:, :, None] * base.take(x, merge.removed), merge.target


def product(merge: base.Merge, x: jax.Array) -> jax.Array:
    """The library's way but on CPU."""
    return base.add_by_product(*_parts(merge, x))


def scatter_add(merge: base.Merge, x: jax.Array) -> jax.Array:
    """The library's way on CPU."""
    return base.add_by_scatter(*_parts(merge, x))


def segment_sum(merge: base.Merge, x: jax.Array) -> jax.Array:
    """One sum over segments of the flattened batch."""
    batch, places = merge.kept.shape
    kept, moved, _ = _parts(merge, x)
    target = (merge.target + places * jnp.arange(batch)[:, None]).reshape(-1)
    sums = jax.ops.segment_sum(moved.reshape(-1, x.shape[2]), target, batch * places)
    return kept + sums.reshape(kept.shape)


WAYS: tuple[Way, ...] = (product, scatter_add, segment_sum)


def main(argv: Sequence[str]) -> None:
    """Prints a table."""
    del argv
    where = machine.describe()
    print({**where["machine"], **where["devices"], "jax": where["versions"]["jax"]})
    model = msvit_jax.create_model(_MODEL.value, reducer="mergence", keep=_KEEP.value)
    rows = []
    for batch in map(int, _BATCH.value):
        tokens = model.grid_size**2 + model.prefix_length
        for layer, spec in model.reductions.items():
            counts = spec.make().keep_table(tokens - spec.prefix)
            kept, removed = counts.capacity(tokens, spec.prefix, 1)
            row = {"batch": batch, "layer": layer + 1, "tokens": tokens, "left": kept}
            rows.append(row | _times(batch, tokens, kept, removed, model.width))
            tokens = kept
    names = [way.__name__ for way in WAYS]
    print(table(rows, ["batch", "layer", "tokens", "left", *names, *(f"{n}_iqr/2" for n in names)]))


def _times(batch: int, tokens: int, kept: int, removed: int, width: int) -> dict[str, float]:
    """Milliseconds of each way for random tokens and targets."""
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(tokens) for _ in range(batch)]).astype(np.int32)
    merge = base.Merge(
        kept=jnp.asarray(np.sort(order[:, :kept])),
        removed=jnp.asarray(np.sort(order[:, kept:])),
        target=jnp.asarray(rng.integers(0, kept, (batch, removed)), jnp.int32),
        kept_weight=jnp.ones((batch, kept)),
        removed_weight=jnp.asarray(rng.random((batch, removed)), jnp.float32),
    )
    x = jnp.asarray(rng.normal(size=(batch, tokens, width)), jnp.float32)
    programs = [jax.jit(way) for way in WAYS]
    answers = [program(merge, x) for program in programs]
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], atol=1e-4)
    seconds = np.zeros((_TURNS.value, len(WAYS)))
    calls = max(1, 32 // batch)
    for turn in range(_TURNS.value):
        for way in rng.permutation(len(WAYS)):
            start = time.perf_counter()
            for _ in range(calls):
                answer = programs[way](merge, x)
            answer.block_until_ready()
            seconds[turn, way] = (time.perf_counter() - start) / calls
    low, middle, high = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75), axis=0)
    names = [way.__name__ for way in WAYS]
    spread = {f"{n}_iqr/2": s for n, s in zip(names, (high - low) / 2, strict=True)}
    return dict(zip(names, middle, strict=True)) | spread


if __name__ == "__main__":
    app.run(main)
