"""The official Segmenter (PyTorch): a ViT below `encoder.` and a decoder below `decoder.`.

Its encoder has timm's names, and a head over 1,000 classes that segmentation does not use.
"""

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from msvit_jax.errors import UserError
from msvit_jax.weights import timm
from msvit_jax.weights.entries import Entry, Flat, State, linear, norm, same, squeezed

NAME = "segmenter"
ENCODER, DECODER = "encoder.", "decoder/"
_HEADS = ("encoder.head.", "encoder.head_dist.")
_HEAD_CLASSES = 1000
# Attributes of the encoder that the official one has.
_USUAL = {
    "class_token": True,
    "register_tokens": 0,
    "layer_scale": None,
    "qkv_bias": True,
    "prefix_positions": True,
}
_DECODER_BLOCK = types.SimpleNamespace(qkv_bias=True, layer_scale=None)


def table(model: Any) -> list[Entry]:
    """All parameters of a segmenter over a plain transformer.

    Raises:
      UserError: The format cannot express the model.
    """
    encoder = model.backbone
    timm.check(encoder, NAME)
    for attribute, usual in _USUAL.items():
        if (value := getattr(encoder, attribute)) != usual:
            raise UserError(f"{NAME} has no encoder with {attribute}={value}.")
    return [*_encoder(encoder), *_decoder(model)]


def _encoder(encoder: Any) -> Iterator[Entry]:
    for entry in timm.table(encoder):
        if not entry.ours.startswith(("head/", "head_dist/")):
            theirs = tuple(ENCODER + name for name in entry.theirs)
            yield dataclasses.replace(entry, theirs=theirs)


def _decoder(model: Any) -> Iterator[Entry]:
    if model.decoder == "linear":
        yield from linear("decoder.head", "decoder/head")
        return
    yield squeezed("decoder.cls_emb", "decoder/class_embed")
    yield from linear("decoder.proj_dec", "decoder/proj_dec")
    for layer in range(model.decoder_depth):
        yield from timm.block(_DECODER_BLOCK, f"decoder.blocks.{layer}", f"decoder/layers_{layer}")
    yield from norm("decoder.decoder_norm", "decoder/norm")
    # Plain matrices that tokens are multiplied with from the left, as our kernels.
    yield same("decoder.proj_patch", "decoder/proj_patch/kernel")
    yield same("decoder.proj_classes", "decoder/proj_class/kernel")
    yield from norm("decoder.mask_norm", "decoder/mask_norm")


def canonical(state: State, model: Any) -> tuple[Flat, list[str]]:
    """Leaves out the head of the encoder; the format has no other variants."""
    del model
    unused = [name for name in state if name.startswith(_HEADS)]
    return {name: x for name, x in state.items() if name not in unused}, unused


def unused_heads(encoder: Any) -> Flat:
    """Zeros for the heads of the encoder, which the official code wants to find in a file."""
    return {
        f"{head}{part}": np.zeros(shape, np.float32)
        for head in _HEADS[: 1 + encoder.distilled]
        for part, shape in (("weight", (_HEAD_CLASSES, encoder.width)), ("bias", (_HEAD_CLASSES,)))
    }
