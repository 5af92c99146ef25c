"""timm's vision transformers: DeiT (also distilled), AugReg's, DINOv2 with and without registers.

DeiT's own files and DINOv2's use the same names, except for two of DINOv2's: see `canonical`.
"""

from collections.abc import Iterator
from typing import Any

from msvit_jax.errors import UserError
from msvit_jax.models.t2t import T2TViT
from msvit_jax.weights.entries import Entry, Flat, State, conv, linear, norm, same, squeezed

NAME = "timm"


def check(model: Any, form: str = NAME) -> None:
    """Raises UserError if a format's plain vision transformers cannot express a model."""
    if isinstance(model, T2TViT):
        raise UserError(f"{form} has no T2T-ViT: its tokenizer has no names in this format.")
    if any(model.padding):
        raise UserError(
            f"fixed_grid_size={model.fixed_grid_size} puts zeros around the image, which {form} "
            "cannot."
        )


def seen(state: State) -> dict[str, Any]:
    """Attributes of `ViT` that can be inferred from arrays."""
    hidden, width = state["blocks.0.mlp.fc1.weight"].shape
    head, registers = state.get("head.weight"), state.get("reg_token", state.get("register_tokens"))
    return {
        "width": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "mlp_ratio": hidden / width,
        "num_classes": 0 if head is None else len(head),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "class_token": "cls_token" in state,
        "distilled": "dist_token" in state,
        "register_tokens": 0 if registers is None else registers.shape[1],
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in state else None,
    }


def table(model: Any) -> list[Entry]:
    """All parameters of a plain model.

    Raises:
      UserError: The format cannot express the model.
    """
    check(model)
    return list(_entries(model))


def _entries(model: Any) -> Iterator[Entry]:
    yield squeezed("pos_embed", "pos_embed")
    if model.class_token:
        yield squeezed("cls_token", "cls_token")
    if model.distilled:
        yield squeezed("dist_token", "dist_token")
    if model.register_tokens:
        yield squeezed("reg_token", "reg_tokens")
    yield from conv("patch_embed.proj", "patch_embed/proj")
    for layer in range(model.depth):
        yield from block(model, f"blocks.{layer}", f"blocks_{layer}")
    # A norm after the pooling (`fc_norm`) is another model: it is reported as a misfit.
    yield from norm("norm", "norm")
    yield from linear("head", "head")
    if model.distilled:
        yield from linear("head_dist", "head_dist")


def block(model: Any, theirs: str, ours: str) -> Iterator[Entry]:
    """One transformer block; the official DVT uses the same names."""
    yield from norm(f"{theirs}.norm1", f"{ours}/norm1")
    yield from linear(f"{theirs}.attn.qkv", f"{ours}/attn/qkv", bias=model.qkv_bias)
    yield from linear(f"{theirs}.attn.proj", f"{ours}/attn/proj")
    yield from norm(f"{theirs}.norm2", f"{ours}/norm2")
    yield from linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc1")
    yield from linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2")
    if model.layer_scale is not None:
        yield same(f"{theirs}.ls1.gamma", f"{ours}/ls1/gamma")
        yield same(f"{theirs}.ls2.gamma", f"{ours}/ls2/gamma")


def canonical(state: State, model: Any) -> tuple[Flat, list[str]]:
    """Renames parameters that have two names in the format.

    DINOv2's own files call timm's `reg_token` `register_tokens`, and hold a mask token that only
    training uses. They have a position of the class token even with registers; for a model without
    it (`prefix_positions=False`) the position is added to the token, as in timm.

    Returns:
      The state by the names of `table`, and the names that the model does not use.
    """
    flat = dict(state)
    unused = [name for name in ("mask_token",) if flat.pop(name, None) is not None]
    if "register_tokens" in flat:
        flat["reg_token"] = flat.pop("register_tokens")
    join_prefix_position(flat, model, "pos_embed", "cls_token")
    return flat, unused


def join_prefix_position(flat: Flat, model: Any, positions: str, token: str) -> None:
    """Adds the class token's position to the token, for a model without such a position.

    The positions [1, 1 + N, D] become [1, N, D]. The model's outputs stay the same, because the
    position would be added to that token in every forward pass.
    """
    if model.prefix_positions or model.distilled or not {positions, token} <= flat.keys():
        return
    embedded = flat[positions]
    count = embedded.shape[1] if embedded.ndim == 3 else 0
    if count > 1 and not is_square(count) and is_square(count - 1):
        flat[token] = flat[token] + embedded[:, :1]
        flat[positions] = embedded[:, 1:]


def is_square(count: int) -> bool:
    """Whether a square grid can have this many cells."""
    return round(count**0.5) ** 2 == count
