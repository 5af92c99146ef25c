"""The two halves of a block as kernels for TPUs, written in Pallas, for inference.

x + attention(norm(x)) and x + MLP(norm(x)) of one image after the other: the weights lie in the
chip's fast memory (VMEM), and queries, keys, values, scores and the MLP's hidden channels never
leave it. XLA stores each of these, moves it into another layout and loads it again; here nothing
but the tokens is loaded and stored. Our design; docs/results/kernel_schedules.md has what the
compiler makes of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from msvit_jax import sharding
from msvit_jax.models import attention_kernel
from msvit_jax.models.attention import (
    Mask,
    join_buckets,
    kernel_mask,
    may_run_kernel,
    split_buckets,
)
from msvit_jax.models.attention_kernel import LOG2_E, dot, padded_bytes, reciprocal
from msvit_jax.tokens.packing import NOBODY

Params = Mapping[str, Any]

# With fewer tokens, loading weights into the matrix unit for an image takes longer than products.
_FEWEST_TOKENS = 48
# Beyond, the code for an image is so long that compiling it takes minutes: attention is left to
# others, and the MLP takes so many tokens at a time.
_MOST_TOKENS = 640
_MOST_IMAGES = 4  # images in a step
_SHORT = 256  # tokens up to which two images are computed side by side: 5 % fewer cycles
_SCORE_BYTES = 4 << 20  # scores of the heads that are computed side by side
_HIDDEN = 256  # hidden channels of the MLP that are computed at a time
_SPARE = 12 << 20  # bytes of fast memory that are left to the compiler
_ROWS = (((1,), (0,)), ((), ()))  # a product of tokens and a kernel


def may_be_used(x: Array, implementation: str) -> bool:
    """Tells whether kernels may be used for tokens [B, N, D] where attention is to be `auto`."""
    return implementation == "auto" and may_run_kernel(x) and x.dtype == jnp.bfloat16


def attention_half(
    x: Array,
    params: Params,
    mask: Mask | None,
    *,
    heads: int,
    epsilon: float,
    by_parts: Callable[[Array, Params, Mask], Array],
) -> Array:
    """Computes x + attn(norm1(x)), the latter times ls1 if there is one.

    Args:
      x: [B, N, D] tokens.
      params: Parameters of `norm1`, `attn` and, if the block has it, `ls1`.
      mask: Attention mask; None if all tokens of a row see each other.
      heads: Number of heads.
      epsilon: Term that keeps the layer norm from dividing by zero.
      by_parts: Function that computes the same from x, params and mask. It takes the place of the
        kernel where a gradient is wanted, on other platforms, for a mask with a bias to each score,
        and for lengths and widths that do not suit the kernel.

    Returns:
      [B, N, D] in the dtype of x. Products take that dtype; all else is float32.
    """
    mask = mask or Mask()
    lengths = [length for _, length in mask.length_buckets] or [x.shape[1]]
    width = x.shape[2]
    fits = lambda n: (  # noqa: E731
        _FEWEST_TOKENS <= n <= _MOST_TOKENS
        and _attention_bytes((n, width), x.dtype, heads, images=1) <= _room()
    )
    if mask.bias is not None or not all(map(fits, lengths)):
        return by_parts(x, params, mask)

    def of_rows(x: Array, params: Params, mask: Mask) -> Array:
        arrays = {"x": x, **kernel_mask(mask).arrays()}
        if mask.segments is not None:
            arrays["empty"] = (mask.segments == NOBODY).astype(jnp.float32)[:, :, None]
        length = x.shape[1]
        call = functools.partial(
            _call,
            name="attention_half",
            kernel=functools.partial(_attention_kernel, heads=heads, epsilon=epsilon),
            scratch=("query", "key", "value", "out"),
            rows=length,
            needed=functools.partial(_attention_bytes, (length, width), x.dtype, heads),
            flops=2 * length * width * (4 * width + 2 * length),
            transcendentals=heads * length**2,
        )
        constants = _norm_constants(params["norm1"]) | _attention_constants(params, x.dtype)
        return sharding.map_devices(call, shared=True)(arrays, constants)

    # The mask as a dictionary: what JAX makes of trees for their structure alone is no mask.
    fields = {"weights": mask.weights, "segments": mask.segments, "sizes": mask.sizes}
    whole = lambda fields: dataclasses.replace(mask, **fields)  # noqa: E731

    def kernel(x: Array, params: Params, fields: dict[str, Array | None]) -> Array:
        own = whole(fields)
        buckets = split_buckets(own, x) if own.length_buckets else [(own, [x])]
        return join_buckets([of_rows(x, params, own) for own, (x,) in buckets], x.shape[0])

    without = lambda x, params, fields: by_parts(x, params, whole(fields))  # noqa: E731
    return _on_tpus(kernel, without, x, params, fields)


def mlp_half(
    x: Array,
    params: Params,
    *,
    gelu: str,
    epsilon: float,
    by_parts: Callable[[Array, Params], Array],
) -> Array:
    """Computes x + mlp(norm2(x)), the latter times ls2 if there is one.

    Args:
      x: [B, N, D] tokens.
      params: Parameters of `norm2`, `mlp` and, if the block has it, `ls2`.
      gelu: Form of the GELU, "exact" or "tanh".
      epsilon: Term that keeps the layer norm from dividing by zero.
      by_parts: Function that computes the same from x and params. It takes the place of the kernel
        where a gradient is wanted, on other platforms, and for widths that do not suit it.

    Returns:
      [B, N, D] in the dtype of x. Products take that dtype; all else is float32.
    """
    hidden = params["mlp"]["fc1"]["kernel"].shape[1]
    _, length, width = x.shape
    parts = pl.cdiv(length, _MOST_TOKENS)
    rows = length if parts == 1 else pl.cdiv(length, 16 * parts) * 16  # whole tiles
    needed = functools.partial(_mlp_bytes, (rows, width), x.dtype, hidden)
    if length < _FEWEST_TOKENS or needed(1) > _room():
        return by_parts(x, params)

    def kernel(x: Array, params: Params) -> Array:
        call = functools.partial(
            _call,
            name="mlp_half",
            kernel=functools.partial(_mlp_kernel, gelu=_GELUS[gelu], epsilon=epsilon),
            rows=rows,
            needed=needed,
            flops=4 * length * width * hidden,
            transcendentals=length * hidden,
        )
        constants = _norm_constants(params["norm2"]) | _mlp_constants(params, x.dtype)
        return sharding.map_devices(call, shared=True)({"x": x}, constants)

    return _on_tpus(kernel, by_parts, x, params)


def _on_tpus(kernel: Callable[..., Array], by_parts: Callable[..., Array], *arrays: Any) -> Array:
    """Calls a kernel on TPUs, and what computes the same elsewhere and for a gradient."""
    inference = jax.custom_vjp(kernel)
    inference.defvjp(functools.partial(jax.vjp, by_parts), lambda vjp, cotangent: vjp(cotangent))
    return lax.platform_dependent(*arrays, tpu=inference, default=by_parts)


# What the kernels take.


def _row(x: Array) -> Array:
    return x.astype(jnp.float32)[None]


def _norm_constants(params: Params) -> dict[str, Array]:
    return {"norm_scale": _row(params["scale"]), "norm_bias": _row(params["bias"])}


def _attention_constants(params: Params, dtype: Any) -> dict[str, Array]:
    qkv, proj = params["attn"]["qkv"], params["attn"]["proj"]
    width = proj["kernel"].shape[0]
    found = {
        "qkv_kernel": qkv["kernel"].astype(dtype).reshape(width, 3, width).swapaxes(0, 1),
        "proj_kernel": proj["kernel"].astype(dtype),
        "proj_bias": _row(proj["bias"]),
    }
    if "bias" in qkv:
        found["qkv_bias"] = qkv["bias"].astype(jnp.float32).reshape(3, 1, width)
    if "ls1" in params:
        found["layer_scale"] = _row(params["ls1"]["gamma"])
    return found


def _mlp_constants(params: Params, dtype: Any) -> dict[str, Array]:
    first, second = params["mlp"]["fc1"], params["mlp"]["fc2"]
    found = {
        "fc1_kernel": first["kernel"].astype(dtype),
        "fc1_bias": _row(first["bias"]),
        "fc2_kernel": second["kernel"].astype(dtype),
        "fc2_bias": _row(second["bias"]),
    }
    if "ls2" in params:
        found["layer_scale"] = _row(params["ls2"]["gamma"])
    return found


# Bytes of VMEM that a step takes, as upper bounds. Of what is loaded and stored there are two, one
# of them for the next step; of what is in between there are two for images side by side.


def _attention_bytes(shape: tuple[int, int], dtype: Any, heads: int, images: int) -> int:
    length, width = shape
    weights = 2 * padded_bytes((width, 4 * width), dtype)
    tokens = images * padded_bytes(shape, dtype)
    head = padded_bytes((length, length), jnp.float32)
    together = attention_kernel.heads_together(heads, width // heads)
    scores = 3 * min(heads * head, max(_SCORE_BYTES, together * head))
    between = _side_by_side(length, images) * (scores + 6 * padded_bytes(shape, jnp.float32))
    return weights + (4 + 4) * tokens + between


def _mlp_bytes(shape: tuple[int, int], dtype: Any, hidden: int, images: int) -> int:
    rows, width = shape
    weights = 2 * 2 * padded_bytes((width, hidden), dtype)
    tokens = images * padded_bytes(shape, dtype)
    channels = 6 * padded_bytes((rows, min(hidden, _HIDDEN)), jnp.float32)
    between = _side_by_side(rows, images) * (channels + 6 * padded_bytes(shape, jnp.float32))
    return weights + 4 * tokens + between


def _room() -> int:
    """Bytes of VMEM that a step may take; nearly none on a v4, which keeps a block by parts."""
    return sharding.vmem_bytes() - _SPARE


def _side_by_side(rows: int, images: int) -> int:
    """Number of images that are computed side by side, of those in a step."""
    return 2 if rows <= _SHORT and images % 2 == 0 else 1


def _call(
    arrays: dict[str, Array],
    constants: dict[str, Array],
    *,
    name: str,
    kernel: Callable[[Array, Any], None],
    rows: int,
    scratch: tuple[str, ...] = (),
    needed: Callable[[int], int],
    flops: int,
    transcendentals: int,
) -> Array:
    """Runs a kernel over all images.

    Args:
      arrays: Inputs by name, [B, ...]; `x` is [B, N, D].
      constants: Inputs by name that are the same for all images.
      name: Name of the kernel.
      kernel: Function of an image's index in the step and a namespace of references, which writes
        `result`.
      rows: Number of tokens of an image that the kernel takes at a time.
      scratch: Names of arrays like `x` that the kernel has for itself.
      needed: Function from the number of images in a step to bytes of VMEM.
      flops: Floating point operations of an image's products.
      transcendentals: Number of an image's exponentials.

    Returns:
      [B, N, D], the result.
    """
    x = arrays["x"]
    batch = x.shape[0]
    divisors = [n for n in range(2, _MOST_IMAGES + 1) if batch % n == 0 and needed(n) <= _room()]
    images = max(divisors, default=1)
    masks = {name: a for name, a in arrays.items() if name != "x"}
    names = ("x", *masks, *constants, "result", *scratch)

    def step(*references: Any) -> None:
        named = SimpleNamespace(**dict(zip(names, references, strict=True)))
        run = lambda image, _: kernel(image, named)  # noqa: E731
        lax.fori_loop(0, images, run, None, unroll=_side_by_side(rows, images))

    shape = images, rows, x.shape[2]
    tokens = pl.BlockSpec(shape, lambda i, j: (i, j, 0))
    of_image = lambda a: pl.BlockSpec((images, *a.shape[1:]), lambda i, j: (i, 0, 0))  # noqa: E731
    of_all = lambda a: pl.BlockSpec(a.shape, lambda i, j: (0,) * a.ndim)  # noqa: E731
    everything = [x, x, *masks.values(), *constants.values()]
    return pl.pallas_call(
        step,
        grid=(batch // images, pl.cdiv(x.shape[1], rows)),
        in_specs=[tokens, *map(of_image, masks.values()), *map(of_all, constants.values())],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(shape, x.dtype)] * len(scratch),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=needed(images) + (8 << 20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=batch * flops,
            transcendentals=batch * transcendentals,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in everything),
        ),
        name=name,
    )(x, *masks.values(), *constants.values())


# The kernels, for one image.


def _attention_kernel(image: Array, references: Any, *, heads: int, epsilon: float) -> None:
    dtype = references.x.dtype
    x = references.x[image].astype(jnp.float32)
    normed = _norm(x, references, epsilon)
    if hasattr(references, "empty"):
        # Zero times NaN is NaN, so what an empty position holds is replaced, not just hidden.
        normed = jnp.where(references.empty[image] > 0, 0.0, normed)
    normed = normed.astype(dtype)
    for index, name in enumerate(("query", "key", "value")):
        part = dot(normed, references.qkv_kernel[index], _ROWS)
        if hasattr(references, "qkv_bias"):
            part += references.qkv_bias[index]
        getattr(references, name)[image] = part.astype(dtype)
    together = attention_kernel.heads_together(heads, x.shape[1] // heads)
    of_group = together * padded_bytes((x.shape[0],) * 2, jnp.float32)
    several = together * max(1, _SCORE_BYTES // of_group)
    for first in range(0, heads, several):
        some = range(first, min(first + several, heads))
        attention_kernel.forward_kernel(image, heads, references, some)
    branch = dot(references.out[image], references.proj_kernel[...], _ROWS)
    _add(image, references, x, branch + references.proj_bias[...])


def _mlp_kernel(
    image: Array, references: Any, *, gelu: Callable[[Array], Array], epsilon: float
) -> None:
    dtype = references.x.dtype
    x = references.x[image].astype(jnp.float32)
    normed = _norm(x, references, epsilon).astype(dtype)
    branch = references.fc2_bias[...]
    hidden = references.fc1_kernel.shape[1]
    for first in range(0, hidden, _HIDDEN):
        some = slice(first, min(first + _HIDDEN, hidden))
        before = dot(normed, references.fc1_kernel[:, some], _ROWS) + references.fc1_bias[:, some]
        branch = branch + dot(gelu(before).astype(dtype), references.fc2_kernel[some], _ROWS)
    _add(image, references, x, branch)


def _norm(x: Array, references: Any, epsilon: float) -> Array:
    """Computes the layer norm of tokens [N, D] in float32."""
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
    normed = centered * lax.rsqrt(variance + epsilon) * references.norm_scale[...]
    return normed + references.norm_bias[...]


def _add(image: Array, references: Any, x: Array, branch: Array) -> None:
    """Writes the result of a half block."""
    if hasattr(references, "layer_scale"):
        branch = branch * references.layer_scale[...]
    references.result[image] = (x + branch).astype(references.result.dtype)


def _gelu(x: Array) -> Array:
    """Computes the exact GELU, to 2e-7 in its error function.

    The error function is that of Abramowitz and Stegun, 7.1.26: half the operations of XLA's, which
    would keep the vector unit busy for longer than the products take.
    """
    size = jnp.abs(x)
    t = reciprocal(1.0 + np.float32(0.3275911 * math.sqrt(0.5)) * size)
    polynomial = jnp.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = (polynomial + np.float32(0.5 * factor)) * t
    tail = polynomial * jnp.exp2(x * x * np.float32(-0.5 * LOG2_E))  # of the normal distribution
    return x * jnp.where(x < 0, tail, 1.0 - tail)


def _tanh_gelu(x: Array) -> Array:
    """Computes GELU's tanh approximation: x times the logistic function of twice the argument."""
    argument = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    # Where the exponential overflows, the result is -0 as it should be.
    return x / (1.0 + jnp.exp2(np.float32(-2 * LOG2_E) * argument))


_GELUS = {"exact": _gelu, "tanh": _tanh_gelu}
