"""Measures a GPU in a few minutes: right before fast, dense beside timm, dynamic, training.

    python studies/gpu.py --out=gpu.json [--minutes=6] [--small]

In this order, as far as the minutes go; the file is written after every step, and what was left
out or failed is named in it:

* attention: every implementation and mask, forward and backward, in bfloat16, at 197 and 198
  tokens, against plain XLA in float32
* times: how long each of them takes, forward and with its gradient
* layouts: logits of budget and rows against slots, in float32, 8 images
* forward: DeiT-S in bfloat16, our dense model, timm's eager and compiled, budget, rows, mergence
  and ToMe; all in turns, with the attention that "auto" takes; dense with XLA's as well
* train: dense, slots and trimmed training steps
* exits: a cascade of two or three stages through the Predictor
* parts: budget with one to eight capacities in a batch: fewer pad more and launch less

Random weights, forced decisions: 128 +- 30 of 196 tokens. --small runs the same with a model of two
layers and few images, for a processor. Where torch or timm is missing, our side is measured alone.
"""

import concurrent.futures
import dataclasses
import faulthandler
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
from absl import flags, logging

from msvit_jax import drawing, errors, process_tuning
from msvit_jax.benchmark import Options, exits, forced, machine, report, sides, turns
from msvit_jax.models import attention, registry
from msvit_jax.tokens import layout_sizes
from msvit_jax.tokens.packing import NOBODY

_OUT = flags.DEFINE_string("out", "gpu.json", "JSON file for the figures.")
_MINUTES = flags.DEFINE_float("minutes", 6, "Minutes after which no further step is begun.")
_SMALL = flags.DEFINE_bool("small", False, "Whether to use a model of two layers and few images.")
_BATCHES = flags.DEFINE_list("batches", [], "Batch sizes of forward passes; default: all.")
_WITHOUT = flags.DEFINE_list("without", [], "Sides of forward passes to leave out, e.g. ToMe.")
_STEPS = flags.DEFINE_list(
    "steps",
    ["attention", "times", "layouts", "forward", "exits", "train", "parts"],
    "Steps to run.",
)

TOME = ("reducer=tome", "remove=13", f"reduce_layers={','.join(map(str, range(1, 13)))}")
HEADS, CHANNELS, LAYERS = 6, 64, 12
_STUCK = 60  # seconds after which a step says where it is
Records = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Amount of measuring.

    Attributes:
      batches: Batch sizes of forward passes.
      train: Batch size of training steps.
      rounds: Number of rounds of each comparison.
      overrides: Attributes of all models, as key=value.
      dtype: Number type of the computation.
      tome: Overrides that make the dense model one with ToMe.
      images: Number of images that go through the cascades.
    """

    batches: tuple[int, ...] = (32, 256, 1)
    train: int = 256
    rounds: int = 8
    overrides: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    tome: tuple[str, ...] = TOME
    images: int = 1024


SMALL = Scale(
    batches=(8, 1),
    train=8,
    rounds=1,
    overrides=("width=32", "depth=2", "heads=2"),
    dtype="float32",
    tome=("reducer=tome", "remove=13", "reduce_layers=1,2"),
    images=4,
)


# --- attention ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Masked:
    """A mask, and the first two axes of the queries that it is for."""

    mask: attention.Mask
    shape: tuple[int, int]


def masks(length: int, batch: int) -> dict[str, Masked]:
    """One mask of every kind that our layouts and reducers make."""
    rng = np.random.default_rng(0)
    place = np.arange(length)
    filled = rng.integers(length // 2, length + 1, (batch, 1))
    first = rng.integers(1, length // 2, (batch, 1))
    second = np.where(place < first, 0, np.where(place < filled, 1, NOBODY))
    seen = rng.integers(0, 2, (batch, length))
    seen[:, 0] = 1
    sizes = jnp.asarray(rng.integers(1, 5, (batch, length)), jnp.float32)
    one = jnp.asarray(np.where(place < filled, 0, NOBODY), jnp.int32)
    buckets = ((batch // 2, length), (batch - batch // 2, 2 * length // 3))
    images = np.arange(batch)[:, None]
    several = np.where(place < filled, images, NOBODY)
    ends = [several[: batch // 2], several[batch // 2 :, : buckets[1][1]]]
    joined = np.concatenate([part.reshape(-1) for part in ends])[None]
    found = {
        "nothing": attention.Mask(),
        "budget": attention.Mask(segments=one, single_segment=True, images=batch),
        "budget, two capacities": attention.Mask(
            segments=jnp.asarray(joined, jnp.int32),
            single_segment=True,
            length_buckets=buckets,
            images=batch,
        ),
        "rows": attention.Mask(
            segments=jnp.asarray(second, jnp.int32), max_segments=3, images=2 * batch
        ),
        "sizes (ToMe)": attention.Mask(sizes=sizes),
        "budget, sizes": attention.Mask(
            segments=one, single_segment=True, sizes=sizes, images=batch
        ),
        "weights": attention.Mask(weights=jnp.asarray(seen, jnp.float32)),
        "bias": attention.Mask(
            bias=jnp.asarray(rng.normal(size=(batch, HEADS, length, length)), jnp.float32)
        ),
    }
    flat = {"budget, two capacities": joined.shape}
    return {name: Masked(mask, flat.get(name, (batch, length))) for name, mask in found.items()}


def passes(attend: Callable[..., jax.Array], mask: attention.Mask, dtype: Any) -> Any:
    """Attention and the gradients of a function of it, where the mask holds tokens."""
    held = 1.0 if mask.segments is None else (mask.segments != NOBODY)[:, :, None, None]

    def run(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array) -> Any:
        def narrowed(query: jax.Array, key: jax.Array, value: jax.Array, bias: Any) -> jax.Array:
            given = (x.astype(dtype) for x in (query, key, value))
            own = dataclasses.replace(mask, bias=bias)
            return attend(*given, own).astype(jnp.float32) * held

        out, back = jax.vjp(narrowed, query, key, value, mask.bias)
        gradients = [g for g in back(cotangent) if g is not None]
        return {"forward": (out,), "backward": gradients}

    return jax.jit(run)


def ours(implementation: str) -> Callable[..., jax.Array]:
    """The library's attention, a function of queries, keys, values and the mask."""
    return lambda *given: attention.attention(*given, implementation=implementation)


def drawn(masked: Masked, seed: int) -> list[jax.Array]:
    """Queries, keys, values and a cotangent for a mask, in float32."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, (*masked.shape, HEADS, CHANNELS)) for key in keys]


def kinds(name: str) -> tuple[str, ...]:
    """Implementations that take a mask; weights, whose gradient is our own, have one."""
    return ("xla",) if name == "weights" else ("xla", "fused")


def check_attention() -> Iterator[dict[str, Any]]:
    """Errors of every implementation, as a share of the largest value; or what it says."""
    jobs = []
    for length in (197, 198):
        for name, masked in masks(length, 8).items():
            for kind in kinds(name):
                found = {"length": length, "mask": name, "implementation": kind}
                jobs.append((found, masked.mask, ours(kind), drawn(masked, length)))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # the compiler is what takes the time
        yield from pool.map(lambda job: job[0] | judged(*job[1:]), jobs)


def time_attention(scale: Scale) -> Iterator[dict[str, Any]]:
    """Milliseconds of every implementation, a mean over layers: forward, and with its gradient."""
    batch = scale.train
    jobs = [(n, m, k) for n, m in masks(198, batch).items() for k in kinds(n)]

    def compiled(job: tuple[str, Masked, str]) -> dict[str, Callable[[], Any]]:
        _, masked, kind = job
        given = [x.astype(scale.dtype) for x in drawn(masked, 0)[:3]]

        def layers(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            step = lambda x, _: (ours(kind)(x, key, value, masked.mask), None)  # noqa: E731
            return jax.lax.scan(step, query, length=LAYERS)[0]

        def gradient(*given: jax.Array) -> Any:
            return jax.grad(lambda *x: layers(*x).sum(dtype=jnp.float32), argnums=(0, 1, 2))(*given)

        found = {}
        for name, function in {"forward": layers, "with gradient": gradient}.items():
            run = jax.jit(function).lower(*given).compile()
            found[name] = functools.partial(run, *given)
        return found

    def tried(job: tuple[str, Masked, str]) -> dict[str, Callable[[], Any]] | str:
        try:
            return compiled(job)
        except Exception as error:  # whatever it is, it is the finding
            return shortly(error)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = list(pool.map(tried, jobs))
    for (name, _, kind), made in zip(jobs, programs, strict=True):
        found: dict[str, Any] = {"mask": name, "implementation": kind, "images": batch}
        if isinstance(made, str):
            yield found | {"error": made}
            continue
        for what, run in made.items():
            seconds = turns.time_interleaved([[sides.timed(run)]], scale.rounds)
            found[f"{what}, ms"] = 1e3 * float(np.median(seconds)) / LAYERS
        yield found


def judged(
    mask: attention.Mask, attend: Callable[..., jax.Array], given: Sequence[jax.Array]
) -> dict[str, Any]:
    """Largest differences of attention from XLA's in float32 on a processor, or its error."""
    there = jax.device_put((list(given), mask), jax.local_devices(backend="cpu")[0])
    with jax.default_matmul_precision("highest"):
        wanted = jax.device_get(passes(ours("xla"), there[1], jnp.float32)(*there[0]))
    try:
        answers = jax.device_get(passes(attend, mask, jnp.bfloat16)(*given))
    except Exception as error:  # whatever it is, it is the finding
        return {"error": shortly(error)}
    return {
        which: max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(answers[which], pair, strict=True)
        )
        for which, pair in wanted.items()
    }


def shortly(error: Exception) -> str:
    """An error's kind and first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def check_layouts(scale: Scale) -> Iterator[dict[str, Any]]:
    """Logits of every layout against those of slots, in float32."""
    options = Options(
        "msvit_deit_small_patch16_224", (8,), ("slots", "budget", "rows"), overrides=scale.overrides
    )
    work = sides.draw(options, 8)
    model = work.model
    shape = (8, *model.image_shape)
    images = jax.random.normal(jax.random.key(0), shape)
    variables = drawing.variables(model, jax.random.key(1), images[:1])
    coarse = jnp.asarray(forced.decisions(work.counts[0], work.coarse.shape[-1], 0))
    most = int(work.counts.max())
    forms = {
        "slots": model,
        "budget": model.clone(layout="budget", token_capacity=most),
        "rows": model.clone(layout="rows", rows=8, row_width=512),
    }

    def logits(form: Any) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            run = jax.jit(lambda v, x, c: form.apply(v, x, coarse=c).logits)
            return np.asarray(run(variables, images, coarse))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = dict(zip(forms, pool.map(logits, forms.values()), strict=True))
    for name, answer in answers.items():
        apart = np.abs(answer - answers["slots"]).max() / np.abs(answers["slots"]).max()
        yield {"layout": name, "error": float(apart)}


# --- speed ----------------------------------------------------------------------------------------


def named(options: Options, batch: int, names: dict[str, str]) -> list[sides.Case]:
    """Sides of a comparison that are wanted, with the names that they get in the table."""
    made = sides.forward_sides(options, sides.draw(options, batch), tuple(names))
    return [dataclasses.replace(side, layout=names[side.layout]) for side in made]


def compare_forward(scale: Scale, peer: peers.Peer | None, batch: int) -> Records:
    """Forward passes at one batch size, ours and timm's, in turns."""
    small = "deit_small_patch16_224"

    def options(model: str, layouts: tuple[str, ...], *overrides: str) -> Options:
        return Options(
            model,
            (batch,),
            layouts,
            dtype=scale.dtype,
            rounds=scale.rounds,
            spread=30 if batch > 1 else 0,  # one program for all images
            overrides=(*scale.overrides, *overrides),
        )

    dense = options(f"msvit_{small}", ("budget", "rows"))
    xla = "attention_impl=xla"
    wanted = [
        (dense, {"dense": "dense", "budget": "budget", "rows": "rows"}),
        (options(f"msvit_{small}", (), xla), {"dense": "dense, XLA"}),
        (options(f"mergence_{small}", ("reduced",)), {"reduced": "mergence"}),
        (options(small, ("reduced",), *scale.tome), {"reduced": "ToMe"}),
    ]

    def cases() -> list[sides.Case]:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            made = pool.map(lambda each: tried(each[0], each[1]), wanted)
            return [case for group in made for case in group]

    def tried(own: Options, names: dict[str, str]) -> list[sides.Case]:
        names = {layout: name for layout, name in names.items() if name not in _WITHOUT.value}
        try:
            return named(own, batch, names) if names else []
        except Exception as error:  # the others are worth having all the same
            print(f"{', '.join(names.values())}: {shortly(error)}", flush=True)
            return []

    return peers.compare(dense, batch, cases, peer, ("timm", "timm_compiled"))


def compare_parts(scale: Scale, batch: int) -> Records:
    """Forward passes of budget with several numbers of capacities, and of dense."""
    options = Options(
        "msvit_deit_small_patch16_224",
        (batch,),
        ("budget",),
        dtype=scale.dtype,
        rounds=scale.rounds,
        overrides=scale.overrides,
    )
    work = sides.draw(options, batch)

    def case(parts: int) -> list[sides.Case]:
        capacities = layout_sizes.fitting_capacities(
            work.counts[0], parts, 8, work.model.max_tokens
        )
        own = dataclasses.replace(options, token_capacity=capacities)
        names = {"budget": f"budget in {parts}"} | ({"dense": "dense"} if parts == 1 else {})
        made = sides.forward_sides(own, work, tuple(names))
        return [dataclasses.replace(side, layout=names[side.layout]) for side in made]

    def cases() -> list[sides.Case]:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return [side for group in pool.map(case, (1, 2, 4, 8)) for side in group]

    return peers.compare(options, batch, cases, None, ())


def compare_exits(scale: Scale, batch: int) -> Records:
    """A cascade with early exits against its last exit and the dense model."""
    overrides: dict[str, Any] = {"dtype": jnp.dtype(scale.dtype)}
    overrides |= {k: int(v) for k, v in (each.split("=") for each in scale.overrides)}
    stages = len(registry.create_model("dvt_deit_small", **overrides).exit_tokens)
    shares = (0.5, 0.3, 0.2) if stages == 3 else (0.6, 0.4)
    return exits.measure(
        "dvt_deit_small",
        batch=batch,
        images=scale.images,
        shares=shares,
        rounds=min(scale.rounds, 5),
        overrides=overrides,
    )


def compare_steps(scale: Scale) -> Records:
    """Training steps: dense, slots, trimmed."""
    options = Options(
        "msvit_deit_small_patch16_224",
        (scale.train,),
        ("slots", "trimmed"),
        train=True,
        dtype=scale.dtype,
        rounds=scale.rounds,
        overrides=scale.overrides,
    )
    return report.measure(options, scale.train)


# --- all of it ------------------------------------------------------------------------------------


def steps(scale: Scale, peer: peers.Peer | None) -> dict[str, Callable[[], Sequence[Any]]]:
    """Functions of all steps by name, in order."""
    batches = [b for b in scale.batches if b > 1]
    return {
        "attention": lambda: list(check_attention()),
        "times": lambda: list(time_attention(scale)),
        "layouts": lambda: list(check_layouts(scale)),
        **{f"forward, {b}": lambda b=b: compare_forward(scale, peer, b) for b in scale.batches},
        "train": lambda: compare_steps(scale),
        **{f"exits, {b}": lambda b=b: compare_exits(scale, b) for b in batches},
        **{f"parts, {b}": lambda b=b: compare_parts(scale, b) for b in batches if b % 8 == 0},
    }


def done(step: Callable[[], Sequence[Any]]) -> dict[str, Any]:
    """Does a step, prints what it found, and returns that or why there is nothing."""
    start = time.perf_counter()
    faulthandler.dump_traceback_later(_STUCK, repeat=True)  # what it waits for, should it hang
    try:
        records = step()
    except Exception as error:  # the steps after it are worth having all the same
        print(shortly(error), flush=True)
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        faulthandler.cancel_dump_traceback_later()
    for record in records:
        if "layout" in record and "images_per_second" in record:
            report.print_row(record)
        else:
            print({k: v for k, v in record.items() if not isinstance(v, list)})
    return {"seconds": time.perf_counter() - start, "records": records}


def main(argv: Sequence[str]) -> None:
    """The command."""
    errors.refuse_arguments(argv)
    logging.set_verbosity(logging.ERROR)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared
    begun = time.perf_counter()
    process_tuning.keep_freed_memory()
    scale = SMALL if _SMALL.value else Scale()
    if _BATCHES.value:
        scale = dataclasses.replace(scale, batches=tuple(map(int, _BATCHES.value)))
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    peer = peers.start_peer(device, scale.dtype, sys.executable)
    result: dict[str, Any] = {**machine.describe(), "peer": peer.about if peer else None}
    out = pathlib.Path(_OUT.value)
    for name, step in steps(scale, peer).items():
        if not any(name.startswith(wanted) for wanted in _STEPS.value):
            continue
        passed = time.perf_counter() - begun
        if passed > 60 * _MINUTES.value:
            result[name] = {"left out": f"{_MINUTES.value:g} minutes were over"}
        else:
            print(f"== {name} ({passed:.0f} s so far)", flush=True)
            result[name] = done(step)
        stats = jax.devices()[0].memory_stats() or {}
        result["device_peak_bytes"] = stats.get("peak_bytes_in_use")
        out.write_text(json.dumps(result, indent=1) + "\n")
    if peer:
        peer.close()
    print(f"written: {out}")


if __name__ == "__main__":
    errors.run(main)
