"""Counts the instructions of our TPU kernels and writes docs/results/kernel_schedules.md.

    python studies/kernel_schedules.py

Needs libtpu (pip install 'jax[tpu]') and no TPU. The compiler writes down each kernel's schedule:
bundles of instructions, one a cycle, and how many of each unit's slots they fill. What a step waits
for memory is not in them.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

DUMPS = tempfile.mkdtemp()
# Before libtpu starts.
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={DUMPS} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas.ops.tpu import flash_attention  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import (  # noqa: E402
    splash_attention_kernel,
    splash_attention_mask,
)

from msvit_jax import errors, sharding  # noqa: E402
from msvit_jax.aot import topology  # noqa: E402
from msvit_jax.models import attention_kernel, block_kernel  # noqa: E402
from msvit_jax.models.attention import Mask  # noqa: E402

RESULT = pathlib.Path(__file__).parents[1] / "docs" / "results" / "kernel_schedules.json"
BATCH = 1024  # so that inputs lie in the chip's main memory, as in a model
FLOPS_A_CYCLE = {"v5e": 4 * 2 * 128**2, "v5p": 4 * 2 * 128**2, "v6e": 2 * 2 * 256**2}
SMALL, BASE, LARGE = (384, 6), (768, 12), (1024, 16)  # channels, heads
HEAD = """# Schedules of the TPU kernels

What the TPU compiler (libtpu {libtpu}, jax {jax}) makes of the kernels in `models/block_kernel.py`
and `models/attention_kernel.py`, in bfloat16, compiled without a TPU. "Cycles" are bundles of
instructions, one a cycle, counted in its schedules: what one image takes, all heads, without
waiting for memory. "Products" is the share of them in which the matrix units could not have been
busier, "to the least" the cycles over those that the stated products need at the chip's published
rate; heads of 64 channels fill half of a unit in two of attention's products. Made by
`python studies/kernel_schedules.py`.

JAX's own kernels, for comparison, take attention alone, from arrays with the heads first and the
length padded to whole blocks of 128.

| kernel | chip | tokens | channels, heads | mask | cycles an image | products | to the least |
|---|---|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
      kernel: Name of the kernel, as in `KERNELS`.
      tokens: Number of tokens of an image.
      size: Channels and heads.
      mask: Kind of mask.
      chip: Kind of chip.
    """

    kernel: str
    tokens: int
    size: tuple[int, int] = SMALL
    mask: str = "none"
    chip: str = "v5e"


def cases() -> Iterator[Case]:
    """What is compiled."""
    for tokens in (64, 128, 197, 257, 577):
        yield Case("attention_half", tokens)
        yield Case("mlp_half", tokens)
    for mask in ("weights", "segments", "single segment", "sizes"):
        yield Case("attention_half", 197, mask=mask)
    for size in (BASE, LARGE):
        yield Case("attention_half", 197, size)
        yield Case("mlp_half", 197, size)
    for chip in ("v5p", "v6e"):
        yield Case("attention_half", 197, chip=chip)
        yield Case("mlp_half", 197, chip=chip)
    for tokens in (128, 197, 577):
        yield Case("short_attention_forward", tokens)
        yield Case("short_attention_backward", tokens)
    yield Case("short_attention_forward", 197, mask="weights")
    yield Case("short_attention_backward", 197, mask="weights")
    yield Case("splash", 256)
    yield Case("flash", 256)


@functools.cache
def device(chip: str) -> Any:
    """A chip to compile for."""
    return topology.find({"v5p": "v5p:2x2x1"}.get(chip, f"{chip}:1x1")).devices[0]


def shape(case: Case, *sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array on the chip."""
    place = jax.sharding.SingleDeviceSharding(device(case.chip))
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)


def mask_of(case: Case) -> Mask:
    """The case's mask."""
    of = functools.partial(shape, case, BATCH, case.tokens)
    return {
        "none": lambda: Mask(),
        "weights": lambda: Mask(weights=of(dtype=jnp.float32)),
        "segments": lambda: Mask(segments=of(dtype=jnp.int32)),
        "single segment": lambda: Mask(segments=of(dtype=jnp.int32), single_segment=True),
        "sizes": lambda: Mask(sizes=of(dtype=jnp.float32)),
    }[case.mask]()


def half(case: Case) -> tuple[Callable[..., Any], Sequence[Any], int]:
    """A half of a block: function, arguments, and floating point operations of an image."""
    width, heads = case.size
    n = case.tokens
    of = functools.partial(shape, case, dtype=jnp.float32)
    layer = lambda a, b: {"kernel": of(a, b), "bias": of(b)}  # noqa: E731
    norm = {"scale": of(width), "bias": of(width)}
    x = shape(case, BATCH, n, width)
    if case.kernel == "mlp_half":
        mlp = {"fc1": layer(width, 4 * width), "fc2": layer(4 * width, width)}
        run = lambda x, params: block_kernel.mlp_half(  # noqa: E731
            x, params, gelu="exact", epsilon=1e-6, by_parts=lambda x, params: x
        )
        return run, (x, {"norm2": norm, "mlp": mlp}), 16 * n * width**2
    attn = {"qkv": layer(width, 3 * width), "proj": layer(width, width)}

    def run_attention(x: Any, params: Any, mask: Mask) -> Any:
        return block_kernel.attention_half(
            x, params, mask, heads=heads, epsilon=1e-6, by_parts=lambda x, params, mask: x
        )

    arguments = (x, {"norm1": norm, "attn": attn}, mask_of(case))
    return run_attention, arguments, 2 * n * width * (4 * width + 2 * n)


def attention(case: Case) -> tuple[Callable[..., Any], Sequence[Any], int]:
    """Attention alone, forward or backward."""
    width, heads = case.size
    x = shape(case, BATCH, case.tokens, width)
    weights = None
    if case.mask == "weights":
        weights = shape(case, BATCH, case.tokens, dtype=jnp.float32)

    def run(query: Any, key: Any, value: Any, weights: Any) -> Any:
        mask = attention_kernel.KernelMask(weights=weights)
        return attention_kernel.attend(query, key, value, mask, heads)

    def backward(cotangent: Any, *arrays: Any) -> Any:
        return jax.vjp(run, *arrays)[1](cotangent)

    product = 2 * case.tokens**2 * width
    if case.kernel == "short_attention_backward":
        return backward, (x, x, x, x, weights), 5 * product
    return run, (x, x, x, weights), 2 * product


def peer(case: Case) -> tuple[Callable[..., Any], Sequence[Any], int]:
    """JAX's splash and flash attention; masks by segment ids, which both take."""
    width, heads = case.size
    n = case.tokens
    x = shape(case, BATCH, heads, n, width // heads)
    ids = shape(case, BATCH, n, dtype=jnp.int32)
    if case.kernel == "flash":
        segments = flash_attention.SegmentIds(q=ids, kv=ids)
        run = lambda *qkv, ids: flash_attention.flash_attention(*qkv, segment_ids=ids)  # noqa: E731
        return lambda q, k, v, ids: run(q, k, v, ids=ids), (x, x, x, segments), 4 * n * n * width
    full = [splash_attention_mask.FullMask((n, n)) for _ in range(heads)]
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask(full),
        block_sizes=splash_attention_kernel.BlockSizes(block_q=n, block_kv=n, block_kv_compute=n),
        head_shards=1,
        q_seq_shards=1,
    )
    splash = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))
    return splash, (x, x, x, splash_attention_kernel.SegmentIds(ids, ids)), 4 * n * n * width


KERNELS = {
    "attention_half": half,
    "mlp_half": half,
    "short_attention_forward": attention,
    "short_attention_backward": attention,
    "splash": peer,
    "flash": peer,
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Bundles of a kernel's innermost loop and of the loop around it, and use of slots.

    Attributes:
      inner: Bundles in a turn of the innermost loop.
      outer: Bundles in a turn of the loop over steps, without the innermost one's.
      slots: Bundles of the innermost loop that each unit needs at least.
    """

    inner: int
    outer: int
    slots: dict[str, float]


def schedule(name: str) -> Schedule:
    """Reads what the compiler has written of the kernel whose name begins so."""
    [bundles] = [
        path
        for path in pathlib.Path(DUMPS).glob(f"*{name}*-final_bundles.txt")
        if "schedule-analysis" not in path.name
    ]
    [usage] = pathlib.Path(DUMPS).glob(f"*{name}*-final_hlo-static-per-bundle-utilization.txt")
    lines = re.findall(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})?: *(>*)", bundles.read_text(), re.M)
    depths = [len(marks) for marks in lines]
    _, names, capacity, _, *rows = usage.read_text().splitlines()
    deepest = max(depths)
    used = [
        [int(n) for n in row.split()]
        for row, depth in zip(rows, depths, strict=False)
        if depth == deepest
    ]
    totals = [sum(column) for column in zip(*used, strict=True)]
    each = zip(names.split(", "), totals, map(int, capacity.split()), strict=True)
    return Schedule(
        depths.count(deepest),
        depths.count(1) if deepest > 1 else 0,
        {name: total / most for name, total, most in each},
    )


class Turns:
    """Counts how often a kernel's loops turn, while it is traced.

    Attributes:
      steps: Steps of the grid.
      inner: Turns of the loop in a step.
    """

    def __init__(self) -> None:
        self.steps = self.inner = 1
        self._call, self._loop = pl.pallas_call, lax.fori_loop

    def __enter__(self) -> "Turns":
        def call(kernel: Any, *args: Any, **options: Any) -> Any:
            spec = options.get("grid_spec")
            self.steps = math.prod(options["grid"] if spec is None else spec.grid)
            return self._call(kernel, *args, **options)

        def loop(first: Any, last: Any, *args: Any, **options: Any) -> Any:
            if isinstance(last, int):
                self.inner = (last - first) // int(options.get("unroll") or 1)
            return self._loop(first, last, *args, **options)

        pl.pallas_call, lax.fori_loop = call, loop
        return self

    def __exit__(self, *raised: Any) -> None:
        pl.pallas_call, lax.fori_loop = self._call, self._loop


def measure(case: Case) -> dict[str, Any]:
    """Compiles one case and reads its schedule."""
    for path in pathlib.Path(DUMPS).iterdir():
        path.unlink()
    function, arguments, flops = KERNELS[case.kernel](case)
    # What is meant for a TPU is traced for one, whatever this machine has.
    with Turns() as turns, mock.patch.object(sharding, "platform", return_value="tpu"):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    if case.kernel in ("splash", "flash"):
        turns.steps *= BATCH if case.kernel == "splash" else 1  # which `vmap` adds
    lowered.compile()
    found = schedule(case.kernel)
    cycles = turns.steps * (found.outer + turns.inner * found.inner) / BATCH
    if not found.outer:  # one loop alone, that over steps
        cycles = turns.steps * found.inner / BATCH
    return {
        **dataclasses.asdict(case),
        "cycles": round(cycles),
        "products": round(found.slots["MATMUL"] / found.inner, 3),
        "vector": round(found.slots["VALU"] / found.inner, 3),
        "to_least": round(cycles * FLOPS_A_CYCLE[case.chip] / flops, 2),
    }


def page(result: dict[str, Any]) -> str:
    """The page."""
    rows = [
        f"| {r['kernel']} | {r['chip']} | {r['tokens']} | {', '.join(map(str, r['size']))} | "
        f"{r['mask']} | {r['cycles']:,} | {r['products']:.0%} | {r['to_least']:.2f} |"
        for r in result["cases"]
    ]
    return HEAD.format(**result["versions"]) + "\n".join(rows) + "\n"


def main(argv: Sequence[str]) -> None:
    """Compiles every case and writes both files."""
    del argv
    topology.without_a_tpu()
    versions = {name: importlib.metadata.version(name) for name in ("libtpu", "jax")}
    found = []
    for case in cases():
        found.append(measure(case))
        print(found[-1], flush=True)
    result = {"versions": versions, "cases": found}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    errors.run(main)
