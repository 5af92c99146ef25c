"""Registry of the library's models by name; names are timm's where timm has the model."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from msvit_jax import config_aliases, config_rules, reducers
from msvit_jax.errors import UserError, nearest
from msvit_jax.image_size import simplified
from msvit_jax.models.dvt import DVT
from msvit_jax.models.mergence import Mergence
from msvit_jax.models.msvit import MSViT
from msvit_jax.models.segmenter import DECODERS, Segmenter
from msvit_jax.models.t2t import T2TViT
from msvit_jax.models.vit import ViT

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "heads": 3},
    "small": {"width": 384, "heads": 6},
    "base": {"width": 768, "heads": 12},
}
# AugReg's ViTs (timm's vit_*_patch16) were trained on pixels scaled to -1..1.
_AUGREG = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
# T2T-ViT's official sizes; the blocks' hidden width is `mlp_ratio` times as large.
_T2T_SIZES: dict[int, dict[str, Any]] = {
    12: {"width": 256, "heads": 4, "mlp_ratio": 2.0},
    14: {"width": 384, "heads": 6, "mlp_ratio": 3.0},
    19: {"width": 448, "heads": 7, "mlp_ratio": 3.0},
    24: {"width": 512, "heads": 8, "mlp_ratio": 3.0},
}
_T2T = {"qkv_bias": False, "norm_epsilon": 1e-5, "pos_init": "fixed"}
_DINOV2 = {"patch_size": 14, "image_size": 518, "layer_scale": 1e-5}
_DINOV2_REGISTERS = {**_DINOV2, "register_tokens": 4, "prefix_positions": False}


def _backbones() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for size, shape in _SIZES.items():
        table[f"deit_{size}_patch16_224"] = shape
        table[f"deit_{size}_distilled_patch16_224"] = {**shape, "distilled": True}
        table[f"vit_{size}_patch16_224"] = {**shape, **_AUGREG}
        table[f"vit_{size}_patch16_384"] = {**shape, **_AUGREG, "image_size": 384}
        if size != "tiny":
            table[f"vit_{size}_patch14_dinov2"] = {**shape, **_DINOV2}
            table[f"vit_{size}_patch14_reg4_dinov2"] = {**shape, **_DINOV2_REGISTERS}
    table["vit"] = _AUGREG  # of any size: give width, depth, heads and patch_size
    for depth, shape in _T2T_SIZES.items():
        table[f"t2t_vit_{depth}"] = {"depth": depth, **shape, **_T2T}
    return table


BACKBONES = _backbones()
T2T = {name for name in BACKBONES if name.startswith("t2t_")}


def _over_vits() -> dict[str, str]:
    """Returns the name of a mixed-scale model over each ViT: 'vit_' becomes 'msvit_'."""
    names = (name for name in BACKBONES if name not in T2T)
    return {f"ms{name}" if name.startswith("vit") else f"msvit_{name}": name for name in names}


MIXED_SCALE = _over_vits()
# Multi-scale features, and tokens merged after each quarter of the layers.
MERGENCE = {name.replace("msvit", "mergence"): dense for name, dense in MIXED_SCALE.items()}
# Cascades, and the model of each of their stages.
CASCADES = {
    "dvt": "vit",
    "dvt_deit_small": "deit_small_patch16_224",
    "dvt_t2t_vit_12": "t2t_vit_12",
    "dvt_t2t_vit_14": "t2t_vit_14",
    "dvt_small_dinov2": "vit_small_patch14_dinov2",
}


def _segmenters() -> dict[str, str]:
    """Returns the name of the encoder of each segmenter; "segmenter" takes it as an option."""
    names = {
        f"{scales}seg_vit_{size}_{decoder}": f"{kind}_{size}_patch16_224"
        for scales, kind in (("", "vit"), ("msvit_", "msvit"))
        for size in _SIZES
        for decoder in DECODERS
    }
    return {**names, "segmenter": "vit"}


SEGMENTERS = _segmenters()
# Where the usual defaults do not fit: a side that coarse patches divide, scales that divide the
# side, and a last grid of about the pretrained patches.
_OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    **{name: {"image_size": 504} for name in MIXED_SCALE if "patch14" in name},
    **{name: {"scales": (7, 14)} for name in MERGENCE if "patch14" in name},
    "dvt_small_dinov2": {"image_size": 224, "grid_sizes": (7, 11, 16)},
    **{
        name: {"image_size": 512, "decoder": name.rpartition("_")[2]}
        for name in SEGMENTERS
        if name != "segmenter"
    },
}
_NOT_OPTIONS = {
    "parent",
    "name",
    "backbone",
    "encoder",
    "reducer_options",
    "hold_level",
    "gate_gradient",
}
_REDUCING = {"reducer", "reduce_layers", "keep", "remove", "unmerge", *reducers.option_types()}
_NOT_OF_STAGES = {*_REDUCING, "patch_size", "fixed_grid_size", "scan_layers", "distilled"}


def list_models() -> list[str]:
    """Lists the names that `create_model` takes, sorted."""
    return sorted([*BACKBONES, *MIXED_SCALE, *MERGENCE, *CASCADES, *SEGMENTERS])


def dense_model(name: str) -> str:
    """Returns the name of the plain model under a model; its own name if it is plain."""
    if name in SEGMENTERS:
        return name.removeprefix("msvit_")
    return {**MIXED_SCALE, **MERGENCE, **CASCADES}.get(name, name)


def dense_options(name: str) -> set[str]:
    """Returns the overrides of a model that its dense model takes too and stays dense with."""
    return model_options(dense_model(name)) - _REDUCING


def _attributes(module: type[nn.Module]) -> dict[str, Any]:
    """Returns the types of a module's own fields."""
    fields = {field.name: field.type for field in dataclasses.fields(module)}
    options = {name: kind for name, kind in fields.items() if name not in _NOT_OPTIONS}
    return options | reducers.option_types() if module is ViT else options


def model_options(name: str) -> set[str]:
    """Returns the names of the overrides that `create_model(name, ...)` takes."""
    return set(model_types(name))


def model_types(name: str) -> dict[str, Any]:
    """Returns the overrides that `create_model(name, ...)` takes, with the types of their values.

    Raises:
      UserError: The model is unknown.
    """
    if name in BACKBONES:
        return _attributes(ViT)
    if name in MIXED_SCALE:
        return _attributes(ViT) | _attributes(MSViT)
    if name in MERGENCE:
        return _attributes(ViT) | _attributes(Mergence)
    if name in CASCADES:
        of_stages = {k: v for k, v in _attributes(ViT).items() if k not in _NOT_OF_STAGES}
        return of_stages | _attributes(DVT)
    if name in SEGMENTERS:
        encoders = [SEGMENTERS[name]] if name != "segmenter" else ["msvit", "mergence"]
        options = {k: v for encoder in encoders for k, v in model_types(encoder).items()}
        chosen = {"encoder": str} if name == "segmenter" else {}
        return options | _attributes(Segmenter) | chosen
    raise UserError(
        f"There is no model {name!r}.{nearest(name, list_models())} "
        "msvit_jax.list_models() names them all."
    )


def create_model(name: str, **overrides: Any) -> Any:
    """Makes a Flax module by name.

    Args:
      name: Name of the model, one of `list_models()`.
      **overrides: Attributes of the module, and of its backbone where it has one.

    Raises:
      UserError: The model or an override is unknown, or values do not fit together.
    """
    options = model_types(name)
    for key, value in overrides.items():
        if key not in options:
            renamed = config_aliases.current_key(f"model.{key}").removeprefix("model.")
            hint = f" It is {renamed!r} now." if renamed in options else nearest(key, options)
            raise UserError(f"Model {name!r} has no option {key!r}.{hint}")
        _check_value(name, key, value, options[key])
    given = {**_OWN_DEFAULTS.get(name, {}), **overrides}
    if "image_size" in given:
        given["image_size"] = simplified(given["image_size"])
    return _segmenter(name, given) if name in SEGMENTERS else _classifier(name, given)


def _check_value(name: str, key: str, value: Any, kind: Any) -> None:
    """Raises UserError for a value that no model can have, as a damaged description states."""
    try:
        config_rules.check(f"model.{key}", _dtype_name(value) if key == "dtype" else value, kind)
    except UserError as error:
        raise UserError(f"Model {name!r}: {str(error).removeprefix('model.')}") from error


def _dtype_name(value: Any) -> Any:
    try:
        return value if isinstance(value, str) else jnp.dtype(value).name
    except TypeError:
        return value


def _segmenter(name: str, given: dict[str, Any]) -> Any:
    """Makes a segmenter of the given attributes, its own and those of its encoder."""
    given = {**given}
    encoder = given.pop("encoder", SEGMENTERS[name])
    if encoder in SEGMENTERS or encoder in CASCADES:
        raise UserError(f"Model {name!r}: encoder={encoder!r} has no features to decode.")
    outer = {key: given.pop(key) for key in _attributes(Segmenter) if key in given}
    model = Segmenter(encoder=create_model(encoder, **given, num_classes=0), **outer)
    try:
        model.check()
    except ValueError as error:
        raise UserError(f"Model {name!r}: {error}") from error
    return model


def _classifier(name: str, given: dict[str, Any]) -> Any:
    """Makes any other model of the given attributes, its own and those of its backbone."""
    inner = {key: value for key, value in given.items() if key in _attributes(ViT)}
    outer = {key: value for key, value in given.items() if key not in inner}
    shape = BACKBONES[dense_model(name)]
    if name in MERGENCE:
        shape = {**shape, "reducer": "mergence"}
    if chosen := {key: inner.pop(key) for key in reducers.option_types() if key in inner}:
        inner["reducer_options"] = FrozenDict(chosen)  # hashable, as attributes have to be
    make = T2TViT if dense_model(name) in T2T else ViT
    backbone: Any = make(**{**shape, **inner}, parent=None)
    model = backbone
    if name in MERGENCE:
        model = Mergence(backbone=backbone, **outer)
    elif name in MIXED_SCALE:
        model = MSViT(backbone=backbone, **outer)
    elif name in CASCADES:  # a cascade checks its stages with their own grids
        model = backbone = DVT(backbone=backbone, **outer)
    try:
        backbone.check()
        model.check()
    except ValueError as error:
        raise UserError(f"Model {name!r}: {error}") from error
    return model
