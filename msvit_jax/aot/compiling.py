"""Compiles one variant of a run and reports the compiler's figures."""

import dataclasses
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import config_dict

from msvit_jax import sharding
from msvit_jax.aot import hlo
from msvit_jax.aot.topology import GIB, Topology
from msvit_jax.aot.variants import Variant, with_frozen_gate
from msvit_jax.models.interface import SEGMENTATION
from msvit_jax.pixels import normalize
from msvit_jax.train import optimizer
from msvit_jax.train.loop import teacher_of
from msvit_jax.train.program import TrainProgram

TRAIN, PREDICT = WHAT = ("train", "predict")
# The schedule's length is a constant in the step and affects nothing else.
_STEPS_PER_EPOCH = 1000
# XLA's two messages for a program that needs more memory than there is.
_TOO_LARGE = (
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
)
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory on one chip, in bytes.

    Attributes:
      arguments: Bytes of the state or parameters, and of the batch.
      temporaries: Bytes of temporary values.
      outputs: Bytes of the outputs that do not reuse the memory of an argument.
      code: Bytes of the program.
    """

    arguments: int
    temporaries: int
    outputs: int
    code: int

    @classmethod
    def from_stats(cls, stats: Any) -> "Memory":
        """Reads `compiled.memory_analysis()`."""
        return cls(
            stats.argument_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.output_size_in_bytes - stats.alias_size_in_bytes,
            stats.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.arguments + self.temporaries + self.outputs + self.code


def too_large(message: str) -> tuple[float, float] | None:
    """Parses a compiler's message that a program does not fit: bytes needed, and available."""
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            return float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
    return None


def lower(variant: Variant, what: str, topology: Topology) -> jax.stages.Lowered:
    """Traces a variant's training step, as train.py runs it, or its forward pass.

    Raises:
      UserError: The config cannot be run on this number of chips.
    """
    # Freezing does not change the forward pass, and allows every layout.
    config = variant.config if what == TRAIN else with_frozen_gate(variant.config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices=topology.devices)
    schedule = optimizer.schedule(
        config.optimizer, round(config.epochs * _STEPS_PER_EPOCH), _STEPS_PER_EPOCH
    )
    program = TrainProgram.from_config(config, mesh, schedule)
    size, name = batch_of(config, what)
    microbatches = config.optimizer.accum_steps if what == TRAIN else 1
    sharding.check_batch(size, mesh, name, microbatches)
    split = sharding.batch_sharding(mesh)
    images = jax.ShapeDtypeStruct((size, *program.model.image_shape), jnp.uint8, sharding=split)
    labels = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split)
    with jax.set_mesh(mesh):
        if what == PREDICT:
            return _forward(program).lower(program.abstract_state.params["model"], images)
        batch = {"image": images, "label": labels}
        if program.model.task == SEGMENTATION:
            mask = jax.ShapeDtypeStruct(images.shape[:3], jnp.uint8, sharding=split)
            batch = {"image": images, "segmentation_mask": mask}
        return program.jit_step(variant.capacity).lower(
            program.abstract_state, batch, _teacher_shapes(config, mesh)
        )


def batch_of(config: config_dict.ConfigDict, what: str) -> tuple[int, str]:
    """Global batch size, and the config key that sets it."""
    if what == PREDICT and config.eval_batch_size:
        return config.eval_batch_size, "eval_batch_size"
    return config.batch_size, "batch_size"


def _forward(program: TrainProgram) -> jax.stages.Wrapped:
    model = program.model

    def forward(params: Any, images: Array) -> Any:
        pixels = normalize(images, model.mean, model.std)
        output = model.apply({"params": params}, pixels, train=False)
        return output.logits, output.tokens, output.within_capacity

    return jax.jit(forward, out_shardings=sharding.batch_sharding(program.mesh))


def _teacher_shapes(config: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> Any:
    teacher = teacher_of(config)
    whole = sharding.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), teacher)


def compile_variant(variant: Variant, what: str, topology: Topology) -> dict[str, Any]:
    """Compiles one variant and collects its figures.

    Returns:
      A record with figures per chip, and MACs also per image. `fits` is whether the program fits
      the chip's memory; if not, the only figures are `needs_gib` and `has_gib`.
    """
    size, _ = batch_of(variant.config, what)
    record: dict[str, Any] = {
        "layout": variant.name,
        "capacity": variant.tokens,
        "model": variant.config.model.name,
        "what": what,
        "batch": size,
        "chip_gib": topology.chip.memory,
    }
    lowered = lower(variant, what, topology)
    print(f"compiling {variant.name}: {variant.tokens}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = too_large(str(error))
        if sizes is None:
            raise
        needs, has = (round(s / GIB, 2) for s in sizes)
        return {**record, "fits": False, "needs_gib": needs, "has_gib": has}
    record["compile_seconds"] = round(time.perf_counter() - start, 1)
    found = figures(compiled, size // len(topology.devices))
    return {**record, "fits": True, **found, "limits": limits(found, topology)}


def limits(found: dict[str, Any], topology: Topology) -> dict[str, float]:
    """Computes what a program's figures take at a chip's published rates.

    Args:
      found: Figures of the program, from `figures`.
      topology: Slice that it was compiled for.

    Returns:
      Milliseconds of 'products', the least that a step can take; of 'memory', for the bytes that
      the compiler counts, more than fused operations move; of 'links', as of a ring of all chips;
      'links_share', at most the links' share: beside products alone, without overlap; and of
      'kernels', the longer of a Pallas kernel's products and bytes, the least that it can take.
    """
    chip, count = topology.chip, len(topology.devices)
    sent = {"all-reduce": 2 * (count - 1) / count, "reduce-scatter": count - 1}
    moved = sum(
        c["bytes"] * sent.get(kind, (count - 1) / count) for kind, c in found["collectives"].items()
    )
    products = 2 * found["gmacs"] / chip.tflops
    memory = 1e3 * found["gbytes_accessed"] / chip.memory_gbps
    links = 1e3 * moved / 1e9 / chip.link_gbps
    whole = links + products
    flops, moved_by_kernels = found["kernels"]["flops"], found["kernels"]["moved_bytes"]
    kernels = max(flops / chip.tflops / 1e9, moved_by_kernels / chip.memory_gbps / 1e6)
    return {
        "products": round(products, 3),
        "memory": round(memory, 3),
        "links": round(links, 3),
        "kernels": round(kernels, 3),
        "links_share": round(links / whole, 4) if whole else 0.0,
    }


def largest_batch(fits: Callable[[int], bool], unit: int, start: int) -> int:
    """Finds the largest batch size that fits, within an eighth of it; 0 if none does.

    Args:
      fits: Function that compiles for a batch size and tells whether that fits.
      unit: Number that batch sizes are multiples of.
      start: Batch size to begin with.
    """
    good = max(unit, start // unit * unit)
    if fits(good):
        while fits(2 * good):
            good *= 2
        bad = 2 * good
    else:
        bad, good = good, good // 2 // unit * unit
        while good and not fits(good):
            bad, good = good, good // 2 // unit * unit
        if not good:
            return 0
    while bad - good > max(unit, good // 8):
        middle = (good + bad) // 2 // unit * unit
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def figures(compiled: Any, images: int) -> dict[str, Any]:
    """Collects the compiler's figures for a program.

    Args:
      compiled: A `jax.stages.Compiled`.
      images: Number of images per chip.
    """
    memory = Memory.from_stats(compiled.memory_analysis())
    cost = compiled.cost_analysis()
    module = hlo.parse(compiled.as_text())
    cycles = hlo.cycles(module)
    macs = cost["flops"] / 2
    return {
        "memory_gib": round(memory.total / GIB, 3),
        "memory_bytes": dataclasses.asdict(memory),
        "gmacs": round(macs / 1e9, 2),
        "gmacs_per_image": round(macs / 1e9 / images, 3),
        "gbytes_accessed": round(cost["bytes accessed"] / 1e9, 3),
        "mcycles": round(cycles.total / 1e6, 3),
        "kernels": dataclasses.asdict(cycles.kernels),
        "loops": cycles.loops,
        "loops_of_unknown_length": cycles.unknown,
        "collectives": {k: dataclasses.asdict(c) for k, c in hlo.collectives(module).items()},
    }
