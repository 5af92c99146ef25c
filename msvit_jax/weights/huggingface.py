"""Hugging Face transformers: ViT, DeiT with its two heads, DINOv2 with and without registers.

Models may have a head or not: files of headless models lack the first part of each name ('vit.').
Poolers and mask tokens are not used.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from msvit_jax.errors import UserError
from msvit_jax.weights import timm
from msvit_jax.weights.entries import Entry, Flat, State, conv, linear, norm, one, same, squeezed

NAME = "huggingface"
_KINDS = ("vit", "deit", "dinov2", "dinov2_with_registers")
_UNUSED = re.compile(r"(^|\.)(pooler\.dense\.(weight|bias)|embeddings\.mask_token)$")
# Module names of transformers 5 and, as it saves them, of version 4.
_NEW_NAMES = (
    (r"^(\w+\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"^((?:vit|deit)\..*)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^((?:vit|deit)\..*)\.mlp\.fc2\.", r"\1.output.dense."),
)


def kind(model: Any) -> str:
    """The transformers architecture that corresponds to a plain model.

    Raises:
      UserError: No architecture corresponds to the model.
    """
    timm.check(model, NAME)
    if model.pool != "token":
        raise UserError(f"Models of {NAME} classify by the class token, not with pool='mean'.")
    if model.distilled and (model.layer_scale is not None or model.register_tokens):
        raise UserError(f"{NAME} has no distilled model with LayerScale or registers.")
    if model.register_tokens and model.layer_scale is None:
        raise UserError(f"{NAME} has no model with registers and without LayerScale.")
    if model.layer_scale is not None:
        return "dinov2_with_registers" if model.register_tokens else "dinov2"
    return "deit" if model.distilled else "vit"


def seen(state: State) -> dict[str, Any]:
    """Attributes of `ViT`: inferred from arrays, or the defaults of transformers."""
    shapes = {
        re.sub(r"^(vit|deit|dinov2(_with_registers)?)\.", "", n): x.shape for n, x in state.items()
    }
    layers = {
        match[1]
        for match in map(re.compile(r"(?:encoder\.)?layers?\.(\d+)\.").match, shapes)
        if match
    }
    mlp = ("intermediate.dense.weight", "mlp.fc1.weight")
    hidden = next(shape[0] for name, shape in shapes.items() if name.endswith(mlp))
    heads = ("classifier.weight", "cls_classifier.weight")
    width = shapes["embeddings.cls_token"][-1]
    registers = shapes.get("embeddings.register_tokens")
    scaled = any(name.endswith("layer_scale1.lambda1") for name in shapes)
    return {
        "width": width,
        "depth": len(layers),
        "patch_size": shapes["embeddings.patch_embeddings.projection.weight"][-1],
        "mlp_ratio": hidden / width,
        "num_classes": next((shapes[head][0] for head in heads if head in shapes), 0),
        "qkv_bias": any(name.endswith(("query.bias", "q_proj.bias")) for name in shapes),
        "distilled": "embeddings.distillation_token" in shapes,
        "register_tokens": 0 if registers is None else registers[1],
        "layer_scale": 1.0 if scaled else None,
        "norm_epsilon": 1e-6 if scaled else 1e-12,
        "heads": 12,
    }


def table(model: Any) -> list[Entry]:
    """All parameters of a plain model.

    Raises:
      UserError: The format cannot express the model.
    """
    return list(_entries(model, kind(model)))


def _entries(model: Any, kind: str) -> Iterator[Entry]:
    embeddings = f"{kind}.embeddings"
    yield squeezed(f"{embeddings}.cls_token", "cls_token")
    yield _positions(model, f"{embeddings}.position_embeddings")
    if model.distilled:
        yield squeezed(f"{embeddings}.distillation_token", "dist_token")
    if model.register_tokens:
        yield squeezed(f"{embeddings}.register_tokens", "reg_tokens")
    yield from conv(f"{embeddings}.patch_embeddings.projection", "patch_embed/proj")
    for layer in range(model.depth):
        theirs, ours = f"{kind}.encoder.layer.{layer}", f"blocks_{layer}"
        dino = kind.startswith("dinov2")
        yield from norm(f"{theirs}.{'norm1' if dino else 'layernorm_before'}", f"{ours}/norm1")
        yield from _joint(f"{theirs}.attention.attention", f"{ours}/attn/qkv", bias=model.qkv_bias)
        yield from linear(f"{theirs}.attention.output.dense", f"{ours}/attn/proj")
        yield from norm(f"{theirs}.{'norm2' if dino else 'layernorm_after'}", f"{ours}/norm2")
        yield from linear(
            f"{theirs}.{'mlp.fc1' if dino else 'intermediate.dense'}", f"{ours}/mlp/fc1"
        )
        yield from linear(f"{theirs}.{'mlp.fc2' if dino else 'output.dense'}", f"{ours}/mlp/fc2")
        if dino:
            yield same(f"{theirs}.layer_scale1.lambda1", f"{ours}/ls1/gamma")
            yield same(f"{theirs}.layer_scale2.lambda1", f"{ours}/ls2/gamma")
    yield from norm(f"{kind}.layernorm", "norm")
    if kind == "deit":
        yield from linear("cls_classifier", "head")
        yield from linear("distillation_classifier", "head_dist")
    elif kind == "vit":
        yield from linear("classifier", "head")
    else:
        yield one("classifier.weight", "head/kernel", lambda w: w[:, : w.shape[1] // 2].T, _wide)
        yield same("classifier.bias", "head/bias")


def _wide(kernel: np.ndarray) -> np.ndarray:
    """Pads a head [D, classes] to [classes, 2 D].

    transformers' DINOv2 classifies by the class token and the mean of the patches, ours by the
    class token alone.
    """
    return np.concatenate([kernel.T, np.zeros_like(kernel.T)], axis=1)


def _positions(model: Any, theirs: str) -> Entry:
    """Positions [1, 1 + N, D]; zeros for the class token if ours has no position."""
    if model.prefix_positions:
        return squeezed(theirs, "pos_embed")
    pad = lambda x: np.concatenate([np.zeros_like(x[:1]), x])  # noqa: E731
    return one(theirs, "pos_embed", lambda x: x[0, 1:], lambda x: pad(x)[None])


def _joint(theirs: str, ours: str, *, bias: bool) -> Iterator[Entry]:
    """Queries, keys and values: three layers there, one joint kernel here."""
    for their, our in (("weight", "kernel"), ("bias", "bias"))[: 1 + bias]:
        yield Entry(
            tuple(f"{theirs}.{part}.{their}" for part in ("query", "key", "value")),
            f"{ours}/{our}",
            lambda *parts: np.concatenate([part.T for part in parts], axis=-1),
            lambda x: [part.T for part in np.split(x, 3, axis=-1)],
        )


def canonical(state: State, model: Any) -> tuple[Flat, list[str]]:
    """Renames parameters that have several names in the format.

    Names of a headless file get their missing first part. A DINOv2 classifier that also uses the
    patches is left out, because ours does not. The class token's position is added to the token if
    the model has no such position.

    Returns:
      The state by the names of `table`, and the names that the model does not use.
    """
    wanted, flat, unused = kind(model), {}, []
    prefix = next((k for k in _KINDS if f"{k}.embeddings.cls_token" in state), "")
    for name, x in state.items():
        if _UNUSED.search(name):
            unused.append(name)
            continue
        new = name if prefix or "classifier" in name else f"{wanted}.{name}"
        for pattern, by in _NEW_NAMES:
            new = re.sub(pattern, by, new)
        flat[new] = x
    head = flat.get("classifier.weight")
    if wanted.startswith("dinov2") and head is not None and head[:, head.shape[1] // 2 :].any():
        unused += [
            name
            for name in ("classifier.weight", "classifier.bias")
            if flat.pop(name, None) is not None
        ]
    position, token = (f"{wanted}.embeddings.{n}" for n in ("position_embeddings", "cls_token"))
    if not model.prefix_positions and {position, token} <= flat.keys():
        flat[token] = flat[token] + flat[position][:, :1]
    return flat, unused
