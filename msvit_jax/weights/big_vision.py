"""JAX checkpoints of vision_transformer (AugReg) and of big_vision, as .npz files.

Models whose class token has a position, as in all of vision_transformer, are written under
vision_transformer's names, others under big_vision's. The loaders of big_vision and timm read both.
Both projects train with the tanh approximation of GELU, so a model with `gelu="tanh"` reproduces
them; timm uses the exact GELU instead.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from msvit_jax.errors import UserError
from msvit_jax.tokens import grid
from msvit_jax.weights import timm
from msvit_jax.weights.entries import Entry, Flat, State, one, same, squeezed

NAME = "big_vision"
# Before linen, Flax numbered a module's parts consecutively, regardless of type.
_NUMBERED_THROUGH = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}
_POSITIONS = (
    "pos_embedding",
    "Transformer/posembed_input/pos_embedding",
    "Transformer/pos_embedding",
)
_SCANNED = "Transformer/encoderblock/"


def table(model: Any) -> list[Entry]:
    """All parameters of a plain model.

    Raises:
      UserError: The format cannot express the model.
    """
    timm.check(model, NAME)
    for attribute, usual in (("distilled", False), ("register_tokens", 0), ("layer_scale", None)):
        if getattr(model, attribute) != usual:
            raise UserError(f"{NAME} has no model with {attribute}={getattr(model, attribute)}.")
    if not model.qkv_bias:
        raise UserError(f"{NAME} has no model without biases of queries, keys and values.")
    if model.class_token and model.pool == "mean":
        raise UserError(f"{NAME} has no class token beside pool='mean'; take class_token=False.")
    return list(_entries(model))


def _with_class_position(model: Any) -> bool:
    return model.class_token and model.prefix_positions


def _entries(model: Any) -> Iterator[Entry]:
    old = _with_class_position(model)
    prefix, names = ("", _NUMBERED_THROUGH) if old else ("params/", {})
    yield squeezed(prefix + _POSITIONS[old], "pos_embed")
    if model.class_token:
        yield squeezed(f"{prefix}cls", "cls_token")
    yield from _both(f"{prefix}embedding", "patch_embed/proj", "kernel")
    for layer in range(model.depth):
        for entry in _block(model, f"{prefix}Transformer/encoderblock_{layer}", f"blocks_{layer}"):
            renamed = tuple(_renamed(name, names) for name in entry.theirs)
            yield dataclasses.replace(entry, theirs=renamed)
    yield from _both(f"{prefix}Transformer/encoder_norm", "norm", "scale")
    yield from _both(f"{prefix}head", "head", "kernel")


def _both(theirs: str, ours: str, first: str) -> Iterator[Entry]:
    yield same(f"{theirs}/{first}", f"{ours}/{first}")
    yield same(f"{theirs}/bias", f"{ours}/bias")


def _block(model: Any, theirs: str, ours: str) -> Iterator[Entry]:
    attention = f"{theirs}/MultiHeadDotProductAttention_0"
    yield from _both(f"{theirs}/LayerNorm_0", f"{ours}/norm1", "scale")
    yield _joint(f"{attention}/{{}}/kernel", f"{ours}/attn/qkv/kernel", model.heads)
    yield _joint(f"{attention}/{{}}/bias", f"{ours}/attn/qkv/bias", model.heads)
    yield one(
        f"{attention}/out/kernel",
        f"{ours}/attn/proj/kernel",
        lambda x: x.reshape(-1, x.shape[-1]),
        lambda x: x.reshape(model.heads, -1, x.shape[-1]),
    )
    yield same(f"{attention}/out/bias", f"{ours}/attn/proj/bias")
    yield from _both(f"{theirs}/LayerNorm_1", f"{ours}/norm2", "scale")
    yield from _both(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}/mlp/fc1", "kernel")
    yield from _both(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}/mlp/fc2", "kernel")


def _joint(theirs: str, ours: str, heads: int) -> Entry:
    """Queries, keys and values: three arrays [..., heads, D / heads] there, one array here."""
    return Entry(
        tuple(theirs.format(part) for part in ("query", "key", "value")),
        ours,
        lambda *parts: np.concatenate([p.reshape(*p.shape[:-2], -1) for p in parts], axis=-1),
        lambda x: [p.reshape(*p.shape[:-1], heads, -1) for p in np.split(x, 3, axis=-1)],
    )


def _renamed(name: str, names: Mapping[str, str]) -> str:
    return "/".join(names.get(part, part) for part in name.split("/"))


def canonical(state: State, model: Any) -> tuple[Flat, list[str]]:
    """Renames the format's variants to the names of `table`.

    Layers stacked for a scan are separated, and both numbering schemes are unified. Positions
    missing from the file because they were never trained (posemb="sincos2d") are computed. The
    class token's position is added to the token if the model has no such position, and is zero if
    the file has none. A head that follows another layer (`pre_logits`), which our models lack, is
    left out.

    Returns:
      The state by the names of `table`, and the names that the model does not use.
    """
    flat = dict(state)
    unused: list[str] = []
    if any(n.startswith("pre_logits/") for n in flat):
        left_out = [n for n in flat if n.startswith(("pre_logits/", "head/"))]
        unused += left_out
        flat = {n: x for n, x in flat.items() if n not in left_out}
    for name in [n for n in flat if n.startswith(_SCANNED)]:
        for layer, part in enumerate(flat.pop(name)):
            flat[name.replace("encoderblock", f"encoderblock_{layer}", 1)] = part
    old = _with_class_position(model)
    found = [flat.pop(name) for name in _POSITIONS if name in flat]
    computed = grid.sincos(model.patch_grid, model.width, row_first=False)
    positions = found[0] if found else computed[None].astype(np.float32)
    flat[_POSITIONS[old]] = positions
    if old and positions.ndim == 3 and timm.is_square(positions.shape[1]):
        flat[_POSITIONS[old]] = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
    timm.join_prefix_position(flat, model, _POSITIONS[0], "cls")
    back = {there: here for here, there in _NUMBERED_THROUGH.items()}
    prefix, names = ("", _NUMBERED_THROUGH) if old else ("params/", back)
    return {prefix + _renamed(name, names): x for name, x in flat.items()}, unused
