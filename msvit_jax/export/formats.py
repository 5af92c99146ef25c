"""Writers of weights: our format, timm, Hugging Face, big_vision, DVT, Segmenter, and Orbax."""

import json
import pathlib
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from msvit_jax import weights
from msvit_jax.export.bundle import ExportBundle
from msvit_jax.weights import huggingface, ours, segmenter
from msvit_jax.weights.formats import trunk_names, trunk_of


def write_ours(bundle: ExportBundle, path: pathlib.Path) -> str:
    """Writes all parameters under our names, with the model's metadata."""
    ours.save(path, bundle.params, bundle.about)
    return ""


def write_orbax(bundle: ExportBundle, path: pathlib.Path) -> str:
    """Writes {'params': ...}, variables for `model.apply`, as an Orbax checkpoint."""
    tree = {"params": unflatten_dict(bundle.params, sep="/")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree, custom_metadata=bundle.about)
    return ""


def write_timm(bundle: ExportBundle, path: pathlib.Path) -> str:
    """Writes the dense trunk under timm's names; the metadata has VisionTransformer's arguments."""
    vit, theirs, left_out = _trunk(bundle, "timm")
    metadata = {"msvit_jax": bundle.about, "timm": _timm_arguments(vit)}
    save_file(theirs, path, {"format": "pt", **{k: json.dumps(v) for k, v in metadata.items()}})
    return left_out


def _timm_arguments(vit: Any) -> dict[str, Any]:
    """Arguments of timm's `VisionTransformer`, or of `VisionTransformerDistilled`."""
    arguments = {
        "img_size": vit.image_size,
        "patch_size": vit.effective_patch_size,
        "num_classes": vit.num_classes,
        "embed_dim": vit.width,
        "depth": vit.depth,
        "num_heads": vit.heads,
        "mlp_ratio": vit.mlp_ratio,
        "qkv_bias": vit.qkv_bias,
        "init_values": vit.layer_scale,
        "class_token": vit.class_token,
        "no_embed_class": not vit.prefix_positions,
        "reg_tokens": vit.register_tokens,
        # Our norm precedes the pooling in either case.
        "global_pool": "token" if vit.pool == "token" else "avg",
        "fc_norm": False,
    }
    if vit.gelu == "tanh":
        arguments["act_layer"] = "gelu_tanh"
    return arguments


def write_big_vision(bundle: ExportBundle, path: pathlib.Path) -> str:
    """Writes the dense trunk as big_vision's .npz."""
    _, theirs, left_out = _trunk(bundle, "big_vision")
    np.savez(path, allow_pickle=False, **theirs)
    return left_out


def write_dvt(bundle: ExportBundle, path: pathlib.Path) -> str:
    """Writes a cascade under the names of the official DVT."""
    theirs = weights.to_theirs("dvt", bundle.params, bundle.model)
    save_file(theirs, path, {"format": "pt", "msvit_jax": json.dumps(bundle.about)})
    return ""


def write_segmenter(bundle: ExportBundle, path: pathlib.Path) -> str:
    """Writes a segmenter under the names of the official code, with the heads that it expects."""
    trunk, theirs, left_out = _trunk(bundle, "segmenter")
    theirs |= segmenter.unused_heads(trunk.backbone)
    save_file(theirs, path, {"format": "pt", "msvit_jax": json.dumps(bundle.about)})
    return left_out


def write_huggingface(bundle: ExportBundle, path: pathlib.Path) -> str:
    """Writes the dense trunk as a directory for transformers' `from_pretrained`."""
    vit, theirs, left_out = _trunk(bundle, "huggingface")
    kind = huggingface.kind(vit)
    if kind.startswith("dinov2"):  # unused, but transformers expects it
        theirs[f"{kind}.embeddings.mask_token"] = np.zeros((1, vit.width), np.float32)
    path.mkdir()
    metadata = {"format": "pt", "msvit_jax": json.dumps(bundle.about)}
    save_file(theirs, path / "model.safetensors", metadata)
    _write_json(path / "config.json", _huggingface_config(vit, kind, bundle))
    _write_json(path / "preprocessor_config.json", _preprocessor(vit, bundle.crop))
    return left_out


_ARCHITECTURES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassificationWithTeacher",
    "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
}


def _huggingface_config(vit: Any, kind: str, bundle: ExportBundle) -> dict[str, Any]:
    names = list(bundle.class_names) or [f"LABEL_{label}" for label in range(vit.num_classes)]
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "image_size": vit.image_size,
        "patch_size": vit.effective_patch_size,
        "num_channels": 3,
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "hidden_act": "gelu" if vit.gelu == "exact" else "gelu_pytorch_tanh",
        "layer_norm_eps": vit.norm_epsilon,
        "qkv_bias": vit.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "dtype": "float32",
    }
    if kind in ("vit", "deit"):
        config["intermediate_size"] = vit.mlp_hidden
    else:
        whole = float(vit.mlp_ratio).is_integer()
        config["mlp_ratio"] = int(vit.mlp_ratio) if whole else vit.mlp_ratio
        config["layerscale_value"] = vit.layer_scale
    if vit.register_tokens:
        config["num_register_tokens"] = vit.register_tokens
    return config


def _preprocessor(vit: Any, crop: float) -> dict[str, Any]:
    """The evaluation's central crop: resizes the short side to S / crop, then crops S x S."""
    side = vit.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / crop)},
        "resample": 3,  # Pillow's constant for bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vit.mean),
        "image_std": list(vit.std),
    }


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _trunk(bundle: ExportBundle, format_name: str) -> tuple[Any, dict[str, Any], str]:
    """A model's plain trunk, its parameters under a format's names, and what is left out."""
    model = bundle.model
    theirs = weights.to_theirs(format_name, bundle.params, model)
    trunk, prefix = trunk_of(model, format_name)
    inside = set(trunk_names(bundle.params, prefix, format_name))
    others = [name for name in bundle.params if name not in inside]
    left_out = [
        f"{part} ({sum(name.startswith(part + '/') or name == part for name in others)} arrays)"
        for part in sorted({name.split("/")[0] for name in others})
    ]
    if trunk.backbone.reducer != "none":
        left_out.append(f"reducer={trunk.backbone.reducer!r}, which has no parameters")
    return trunk, theirs, ", ".join(left_out)
