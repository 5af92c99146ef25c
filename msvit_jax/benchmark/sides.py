"""The cases of a comparison: compiled programs, ready to be timed, and their cost."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from msvit_jax import drawing, flops
from msvit_jax.benchmark import forced
from msvit_jax.benchmark.options import DENSE, Options, build
from msvit_jax.benchmark.sizes import Sizes, size_layout
from msvit_jax.benchmark.turns import Timed
from msvit_jax.errors import UserError
from msvit_jax.models.interface import ImageModel

SINGLES = 16  # images that are run one after the other at batch 1


@dataclasses.dataclass(frozen=True)
class CompiledFn:
    """A compiled function.

    Attributes:
      run: The compiled function.
      compile_seconds: Seconds for tracing, lowering and compilation.
      memory_bytes: Bytes of arguments, outputs and temporaries; None if the compiler does not
        report them.
    """

    run: Callable[..., Any]
    compile_seconds: float
    memory_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of a comparison: the dense model, or a dynamic one in a layout.

    Attributes:
      layout: "dense" or the name of a layout.
      model: Name of the model.
      calls: Timed calls, one for each batch.
      programs: Compiled programs that the calls use.
      sizes: Sizes of the layout, for each batch.
      tokens: [n, B], number of active patch tokens of each image.
      macs: [n, B], multiply-accumulates of a forward pass for each image.
      overflow: Share of the images that did not fit.
    """

    layout: str
    model: str
    calls: list[Timed]
    programs: list[CompiledFn]
    sizes: list[Sizes]
    tokens: np.ndarray
    macs: np.ndarray
    overflow: float


@dataclasses.dataclass(frozen=True)
class Work:
    """The inputs that all cases share.

    Attributes:
      model: The dynamic model, in the slots layout if it has layouts.
      dense: The plain model that it is built over.
      counts: [n, B], number of active patch tokens of each image, for n batches that are run one
        after the other.
      coarse: [n, B, R] float32, decisions, 1 = coarse; None without a gate.
    """

    model: ImageModel
    dense: nn.Module
    counts: np.ndarray
    coarse: np.ndarray | None


def draw(options: Options, batch: int) -> Work:
    """Draws token counts and decisions for the options' model."""
    model, dense = build(options), build(options, dense=True)
    number = SINGLES if batch == 1 and not options.train else 1
    if not options.gated:
        return Work(model, dense, np.full((number, batch), dense.max_tokens), None)
    regions = model.num_regions
    counts = forced.token_counts(
        number * batch, regions, tokens=options.tokens, spread=options.spread, seed=options.seed
    ).reshape(number, batch)
    return Work(model, dense, counts, forced.decisions(counts, regions, options.seed))


def compiled(function: Any, *arguments: Any) -> CompiledFn:
    """Compiles a jitted function for its arguments.

    Raises:
      UserError: The model does not accept the arguments.
    """
    start = time.perf_counter()
    try:
        lowered = function.lower(*arguments)
    except ValueError as error:
        raise UserError(f"The model cannot be run: {error}") from error
    program = lowered.compile()
    seconds = time.perf_counter() - start
    use = program.memory_analysis()
    total = use and (
        use.argument_size_in_bytes
        + use.output_size_in_bytes
        + use.temp_size_in_bytes
        - use.alias_size_in_bytes
    )
    return CompiledFn(program, seconds, total)


def timed(run: Callable[..., Any], *arguments: Any) -> Timed:
    """Returns a call that waits for its result and returns its seconds."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        return time.perf_counter() - start

    return once


def forward_sides(options: Options, work: Work, layouts: Sequence[str] | None = None) -> list[Case]:
    """Compiles forward passes with the same weights and images.

    Args:
      options: Options of the comparison.
      work: Inputs that all cases share.
      layouts: "dense" and names of layouts; by default "dense" and those of the options.
    """
    key = jax.random.key(options.seed)
    shape = work.model.image_shape
    # Parameters do not depend on the attention implementation; slots, which mask keys, need "auto".
    plain = build(options, {"attention_impl": "auto"})
    variables = drawing.variables(plain, key, jnp.zeros((1, *shape), jnp.float32))
    images = [
        jax.random.normal(jax.random.fold_in(key, index), (work.counts.shape[1], *shape))
        for index in range(work.counts.shape[0])
    ]
    params = variables["params"]
    dense = {"params": _dense_params(params)}
    return [
        _forward_side(layout, options, work, dense if layout == DENSE else variables, images)
        for layout in layouts or (DENSE, *options.layouts)
    ]


def _dense_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The dense model's part of a dynamic one's parameters: the backbone, and a decoder beside."""
    if "backbone" not in params:
        return dict(params)
    decoder = {"decoder": params["decoder"]} if "decoder" in params else {}
    return {**params["backbone"], **decoder}


def _forward_side(
    layout: str, options: Options, work: Work, variables: Any, images: list[jax.Array]
) -> Case:
    programs: dict[Any, CompiledFn] = {}
    calls, sizes = [], []
    for index, (counts, pixels) in enumerate(zip(work.counts, images, strict=True)):
        size = size_layout(layout, work.model, counts, options)
        coarse = None if layout == DENSE else work.coarse
        forced_decisions = () if coarse is None else (jnp.asarray(coarse[index]),)
        arguments = (variables, pixels, *forced_decisions)
        key = tuple(size.attributes.values())
        if key not in programs:
            model = build(options, size.attributes, dense=layout == DENSE)
            programs[key] = compiled(jax.jit(forward(model)), *arguments)
        check_capacity(programs[key].run(*arguments).get("within_capacity"), size)
        calls.append(timed(programs[key].run, *arguments))
        sizes.append(size)
    return make_side(layout, options, work, calls, list(programs.values()), sizes)


def forward(model: ImageModel) -> Callable[..., dict[str, jax.Array]]:
    """Returns a function of variables, images and, unless the model is dense, forced decisions.

    The gate's decisions are not used then, but its logits are returned, so that it still runs.
    """

    def run(variables: Any, images: jax.Array, *coarse: jax.Array) -> dict[str, jax.Array]:
        options = {"coarse": coarse[0]} if coarse else {}
        output = model.apply(variables, images, train=False, **options)
        if output.gate is None:
            return {"logits": output.logits}
        known = {"logits": output.logits, "gate": output.gate.logits}
        if output.within_capacity is not None:
            known["within_capacity"] = output.within_capacity
        return known

    return run


def side_name(layout: str, options: Options) -> str:
    """Name of a case's model."""
    return options.dense if layout == DENSE else options.model


def check_capacity(within_capacity: jax.Array | None, size: Sizes) -> None:
    """Raises UserError unless all images fit."""
    if within_capacity is not None and not (held := np.asarray(within_capacity)).all():
        raise no_room(f"{(~held).sum()} of {held.size} images", size)


def no_room(images: str, size: Sizes) -> UserError:
    """The error for images that do not fit the sizes."""
    given = ", ".join(f"{key}={value}" for key, value in size.attributes.items())
    return UserError(
        f"{images} do not fit {given}; give more capacity, or leave the sizes to be chosen from "
        "the token counts."
    )


def make_side(
    layout: str,
    options: Options,
    work: Work,
    calls: list[Timed],
    programs: list[CompiledFn],
    sizes: list[Sizes],
    overflow: float = 0.0,
) -> Case:
    """Assembles a case and counts its multiply-accumulates."""
    name, model, tokens = side_name(layout, options), work.model, work.counts
    if layout == DENSE:
        model = work.dense
        tokens = np.full_like(tokens, model.max_tokens)
    macs = flops.macs_per_image(model, tokens)
    return Case(layout, name, calls, programs, sizes, tokens, macs, overflow)
