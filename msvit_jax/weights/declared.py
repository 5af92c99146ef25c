"""Reads what a source of weights states besides the arrays: its model, pixels and classes.

Width, depth, patch size and classes can be inferred from the arrays, and misfits are reported when
these are read. The number of heads, the norms' epsilon, the activation and the normalization of
pixels cannot (`UNSEEN`). They are adopted from the source, or compared with a given model.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from msvit_jax import config_rules, paths
from msvit_jax.errors import UserError
from msvit_jax.models.registry import BACKBONES, create_model
from msvit_jax.models.vit import ViT
from msvit_jax.weights import files, ours

# Attributes of a model that cannot be inferred from its arrays. Those in FREE may differ in a model
# that is trained further; differences are reported.
UNSEEN = ("heads", "norm_epsilon", "gelu", "pool", "mean", "std")
FREE = ("pool", "mean", "std")
# Attributes that can be inferred from arrays and that a description may contradict.
SEEN = ("width", "depth", "patch_size", "num_classes")
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_GELUS = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_tanh": "tanh",
}
# Names of files that transformers and timm save next to a config.json.
_SAVED_AS = ("model", "pytorch_model")
# Prefixes of a training program's settings, which are stored with the tensors.
_SETTINGS = ("args.", "hyper_parameters.")
# Model arguments among these settings.
_ARGUMENTS = (
    *("num_heads", "embed_dim", "mlp_ratio", "qkv_bias", "init_values", "reg_tokens"),
    *("class_token", "no_embed_class", "act_layer", "img_size", "patch_size", "global_pool"),
    "fc_norm",
)
# Model types of transformers that can be read.
_HF_KINDS = ("vit", "deit", "dinov2", "dinov2_with_registers")
_BICUBIC = (3, "bicubic", None)


@dataclasses.dataclass
class Declared:
    """What a source states about itself.

    Attributes:
      model: Attributes of `ViT`; some or all of them.
      name: Name of the model in our registry, if the source names one that is there; else None.
      complete: Whether a model can be built from this and the arrays alone.
      class_names: Names of the classes, in the order of the labels; empty if the source has none.
      crop: Share of an image's short side used in evaluation; None if the source does not state it.
      exif_orientation: Whether images are rotated upright by their EXIF data; None if the source
        does not state it.
      patch_grid: (rows, columns) of the patches of its images; None if it is not a model of ours.
      where: Description of the place that states an attribute, by the attribute's name.
      problems: Statements that our models cannot satisfy.
      notes: Statements that are not followed but worth reporting.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str | None = None
    complete: bool = False
    class_names: tuple[str, ...] = ()
    crop: float | None = None
    exif_orientation: bool | None = None
    patch_grid: tuple[int, int] | None = None
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def say(self, where: str, **values: Any) -> None:
        """Adds attributes of the model; None is ignored, and an invalid value becomes a problem."""
        for key, value in values.items():
            if value is None:
                continue
            try:
                config_rules.check(f"model.{key}", value, _TYPES[key])
            except UserError as error:
                self.problems.append(f"{where}: {str(error).removeprefix('model.')}")
            else:
                self.model[key] = value
                self.where[key] = where

    def take(self, where: str, given: Mapping[str, Any], **keys: str) -> None:
        """Adds attributes that a description has under other names.

        Args:
          where: Description of the place, for messages.
          given: The description.
          **keys: Names in the description, by our names.
        """
        for key, theirs in keys.items():
            value = given.get(theirs)
            if isinstance(value, float) and _TYPES[key] is int and value.is_integer():
                value = int(value)  # some programs write whole numbers as floats in JSON
            self.say(where if theirs == key else f"{where} ({theirs})", **{key: value})

    def refuse(self, where: str, key: str, value: Any, rule: config_rules.Rule) -> None:
        """Adds a problem: an invalid value that is not an attribute of the model."""
        self.problems.append(f"{where}: {key}={value!r}: {rule.wanted()} expected")

    def contradictions(self, seen: Mapping[str, Any]) -> list[str]:
        """Statements about the model that its arrays contradict."""
        return [
            f"{self.where[key]} says {key}={self.model[key]!r}, the arrays have {seen[key]!r}"
            for key in SEEN
            if key in self.model and key in seen and not same(self.model[key], seen[key])
        ]

    def differences(self, model: Any, keys: Sequence[str] = UNSEEN) -> dict[str, Any]:
        """Stated attributes, among `keys`, that differ from a model's."""
        trunk = model.backbone
        return {
            key: self.model[key]
            for key in keys
            if key in self.model and not same(getattr(trunk, key), self.model[key])
        }


_TYPES = {field.name: field.type for field in dataclasses.fields(ViT)}


def same(one: Any, other: Any) -> bool:
    """Whether two values of an attribute are equal, numbers up to rounding."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    first, second = np.asarray(one, float), np.asarray(other, float)
    return first.shape == second.shape and np.allclose(first, second, rtol=1e-4, atol=0)


def of_run(workdir: str | pathlib.Path) -> Declared:
    """What a run's config states."""
    found = Declared()
    if not (pathlib.Path(workdir) / paths.CONFIG_FILE).is_file():
        return found
    from msvit_jax import checkpoint  # imports Orbax, which files do not need
    from msvit_jax import config as configs

    config = checkpoint.read_config(workdir)
    if "model" in config:
        _say_all(found, configs.build_model(config), "the run's config")
    return found


def of_file(file: pathlib.Path, contents: files.Contents) -> Declared:
    """What a weights file and descriptions next to it state.

    Args:
      file: Path of the weights file.
      contents: Contents of the file.

    Raises:
      UserError: A description is damaged.
    """
    found = Declared()
    try:
        _metadata(found, file)
        if file.name.split(".")[0].split("-")[0] in _SAVED_AS:
            _beside(found, file.parent)
        _settings(found, contents.values)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise UserError(
            f"What {str(file)!r} says of its model, in its header or in {CONFIG} and "
            f"{PREPROCESSOR} beside it, cannot be understood: {error}"
        ) from error
    return found


def _say_all(found: Declared, model: Any, where: str) -> None:
    trunk = model.backbone
    found.patch_grid = model.patch_grid
    found.say(where, **{key: getattr(trunk, key) for key in UNSEEN})


def _metadata(found: Declared, file: pathlib.Path) -> None:
    if file.suffix != ".safetensors":
        return
    texts = files.read_metadata(file)
    if "timm" in texts:
        _timm_arguments(found, files.read_json(texts["timm"], file), "its metadata")
        found.complete = True
    about = ours.describe(file)
    if about is not None:
        if about.get("model"):
            _say_all(found, _built(about, file), "its metadata")
        found.class_names = tuple(about.get("class_names") or ())
        found.crop = about.get("crop")
        found.exif_orientation = about.get("exif_orientation")


def _built(about: Mapping[str, Any], file: pathlib.Path) -> Any:
    try:
        return ours.build_model(about)
    except UserError as error:
        raise UserError(f"{str(file)!r} describes no model that there is: {error}") from error


def _beside(found: Declared, folder: pathlib.Path) -> None:
    """Reads descriptions by transformers or timm in the folder of a file."""
    config = _json(folder / CONFIG)
    if config is None:
        return
    if "architecture" in config or "pretrained_cfg" in config:
        _timm_config(found, config)
    elif "model_type" in config:
        _transformers(found, config)
    processor = _json(folder / PREPROCESSOR)
    if processor is not None:
        _processor(found, processor)


def _json(file: pathlib.Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    files.check_there(file)
    return files.read_json(file.read_text(errors="replace"), file)


def _transformers(found: Declared, config: Mapping[str, Any]) -> None:
    kind = config["model_type"]
    if kind not in _HF_KINDS:
        known = ", ".join(_HF_KINDS)
        found.problems.append(f"{CONFIG}: its model is {kind!r}; known are {known}")
        return
    dino = kind.startswith("dinov2")
    found.complete = True
    found.take(
        CONFIG,
        config,
        heads="num_attention_heads",
        norm_epsilon="layer_norm_eps",
        width="hidden_size",
        depth="num_hidden_layers",
        register_tokens="num_register_tokens",
        qkv_bias="qkv_bias",
    )
    hidden, width = config.get("intermediate_size"), config.get("hidden_size")
    if isinstance(hidden, int) and isinstance(width, int) and width > 0:
        found.say(CONFIG, mlp_ratio=hidden / width)
    found.say(
        CONFIG,
        image_size=_square(found, CONFIG, "image_size", config.get("image_size")),
        patch_size=_square(found, CONFIG, "patch_size", config.get("patch_size")),
        gelu=_gelu(found, CONFIG, config.get("hidden_act")),
        layer_scale=config.get("layerscale_value", 1.0) if dino else None,
        # transformers' DINOv2 with registers also antialiases; its other models do not.
        pos_resize="timm" if kind == "dinov2_with_registers" else "transformers",
    )
    if config.get("use_swiglu_ffn"):
        found.problems.append(f"{CONFIG}: use_swiglu_ffn: MLPs with SwiGLU are not known here")
    _check_channels(found, config.get("num_channels", 3))
    names = config.get("id2label") or {}
    if _listed(names):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping):
        found.problems.append(f"{CONFIG}: id2label is not a list of names: {names!r}")
    elif not all(isinstance(name, str | int | float) for name in names.values()):
        found.problems.append(f"{CONFIG}: id2label holds something else than names")
    elif any(str(v) != f"LABEL_{k}" for k, v in names.items()):
        order = sorted(names, key=_as_number)
        if list(map(_as_number, order)) != list(range(len(order))):
            found.problems.append(
                f"{CONFIG}: id2label has the labels {', '.join(map(str, order[:4]))}, ...; they "
                "are counted from 0 without a gap"
            )
        found.class_names = tuple(str(names[key]) for key in order)
        found.where["class_names"] = CONFIG


def _check_channels(found: Declared, count: Any) -> None:
    if count != 3:
        found.problems.append(f"{CONFIG}: images of {count} channels, not 3")


def _as_number(key: Any) -> int:
    try:
        return int(key)
    except ValueError as error:
        raise UserError(f"{CONFIG}: id2label has {key!r} for a label, not a number.") from error


def _processor(found: Declared, given: Mapping[str, Any]) -> None:
    """Translates transformers' image preparation into the terms of our evaluation."""
    factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1
    positive = config_rules.Number(0, above=True)
    if not positive.fits(factor):
        found.refuse(PREPROCESSOR, "rescale_factor", factor, positive)
        return
    scale = 255 * float(factor)
    if given.get("do_normalize", True):
        mean, std = given.get("image_mean"), given.get("image_std")
    else:
        mean, std = [0.0] * 3, [1.0] * 3
    for name, value in (("mean", mean), ("std", std)):
        colors = _colors(found, PREPROCESSOR, f"image_{name}", value)
        if colors is not None:
            found.say(PREPROCESSOR, **{name: tuple(x / scale for x in colors)})
    crop = given.get("crop_size") if given.get("do_center_crop") else None
    size = given.get("size")
    side = _square(found, PREPROCESSOR, "size", _lengths(crop if crop is not None else size))
    if side is not None and side % found.model.get("patch_size", 1) == 0:
        found.say(PREPROCESSOR, image_size=side)
    short = _lengths(size)
    if crop is not None and side and isinstance(short, int) and short >= side:
        found.crop = side / short
    elif crop is None and isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        found.notes.append(f"{PREPROCESSOR}: whole images are squeezed there; here a square is cut")
        found.crop = 1.0
    if given.get("resample") not in _BICUBIC:
        found.notes.append(f"{PREPROCESSOR}: images are resized there with another filter")


def _lengths(size: Any) -> Any:
    """The lengths in a size: [h, w] for {'height': h, 'width': w}, s for {'shortest_edge': s}."""
    if not isinstance(size, Mapping):
        return size
    if "shortest_edge" in size:
        return size["shortest_edge"]
    return [size.get("height"), size.get("width")]


def _timm_config(found: Declared, config: Mapping[str, Any]) -> None:
    _named(found, config.get("architecture"), CONFIG)
    pixels = {**config, **(config.get("pretrained_cfg") or {})}
    _timm_pixels(found, pixels, CONFIG)
    _timm_arguments(found, config.get("model_args") or {}, CONFIG)
    if config.get("num_classes"):
        found.take(CONFIG, config, num_classes="num_classes")
    size = pixels.get("input_size")
    if _listed(size) and size:
        _check_channels(found, size[0])
    names = config.get("label_names") or pixels.get("label_names") or ()
    found.class_names = tuple(map(str, names))
    if found.class_names:
        found.where["class_names"] = CONFIG


def _timm_pixels(found: Declared, given: Mapping[str, Any], where: str) -> None:
    size, mean, std = (given.get(key) for key in ("input_size", "mean", "std"))
    found.say(
        where,
        # A single number is something else, such as the std of the initial weights.
        mean=_colors(found, where, "mean", mean if _listed(mean) else None),
        std=_colors(found, where, "std", std if _listed(std) else None),
        image_size=_square(found, where, "input_size", _last_two(size)),
    )
    crop = given.get("crop_pct")
    if isinstance(crop, int | float) and 0 < crop <= 1:
        found.crop = float(crop)


def _last_two(size: Any) -> Any:
    """Height and width of [channels, height, width]."""
    return size[-2:] if isinstance(size, list | tuple) else size


def _listed(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _colors(found: Declared, where: str, key: str, value: Any) -> tuple[float, ...] | None:
    """Three numbers, one for each color; a single one is repeated."""
    if value is None:
        return None
    listed = list(value) if _listed(value) else [value]
    colors = listed * 3 if len(listed) == 1 else listed
    rule = config_rules.Numbers(config_rules.Number(), 3)
    if not rule.fits(colors):
        found.refuse(where, key, value, rule)
        return None
    return tuple(map(float, colors))


def _timm_arguments(found: Declared, given: Mapping[str, Any], where: str) -> None:
    """Adds arguments of timm's `VisionTransformer`."""
    pool = given.get("global_pool")
    prefix = given.get("no_embed_class")
    found.take(
        where,
        given,
        heads="num_heads",
        width="embed_dim",
        depth="depth",
        mlp_ratio="mlp_ratio",
        qkv_bias="qkv_bias",
        layer_scale="init_values",
        class_token="class_token",
        register_tokens="reg_tokens",
    )
    found.say(
        where,
        prefix_positions=None if prefix is None else not prefix,
        pool={"token": "token", "avg": "mean"}.get(str(pool)),
        gelu=_gelu(found, where, given.get("act_layer")),
        image_size=_square(found, where, "img_size", given.get("img_size")),
        patch_size=_square(found, where, "patch_size", given.get("patch_size")),
    )
    if given.get("fc_norm"):
        found.problems.append(f"{where}: fc_norm: a norm behind the pooling is not known here")
    if pool not in (None, "", "token", "avg"):
        found.problems.append(f"{where}: global_pool={pool!r} is not known here")


def _settings(found: Declared, values: Mapping[str, Any]) -> None:
    """Adds a training program's settings that are stored with the tensors."""
    for prefix in _SETTINGS:
        given = {n.removeprefix(prefix): x for n, x in values.items() if n.startswith(prefix)}
        if not given:
            continue
        where = f"the {prefix.rstrip('.')} beside the tensors"
        _named(found, given.get("model") or given.get("arch"), where)
        _timm_pixels(found, given, where)
        # timm's training script passes model_kwargs to the model.
        arguments = {
            name.removeprefix(start): value
            for start in ("", "model_kwargs.", "model.")
            for name, value in given.items()
            if name.startswith(start) and name.removeprefix(start) in _ARGUMENTS
        }
        size = _last_two(arguments.get("img_size"))
        _timm_arguments(found, {**arguments, "img_size": size}, where)
        names = given.get("class_names")
        if _listed(names) and all(isinstance(name, str) for name in names):
            found.class_names = tuple(names)
            found.where["class_names"] = where


def _named(found: Declared, name: Any, where: str) -> None:
    """Adds the attributes of a named model if it is in the registry."""
    if not isinstance(name, str):
        return
    short = name.split(".")[0]
    if short in BACKBONES:
        found.name = short
        known = create_model(short)
        found.say(where, **{key: getattr(known, key) for key in ("heads", "norm_epsilon", "gelu")})
    else:
        found.notes.append(f"{where} names the model {name!r}, which has another name here or none")


def _square(found: Declared, where: str, key: str, value: Any) -> int | None:
    """The side of a square size; a size that is not square becomes a problem."""
    if value is None or isinstance(value, bool):
        return None
    sides = [x for x in (value if _listed(value) else [value]) if isinstance(x, int)]
    if not sides:
        return None
    if len(set(sides)) > 1:
        by = " x ".join(map(str, sides))
        found.problems.append(f"{where}: {key} is {by}; images and patches are square in files")
        return None
    return sides[0]


def _gelu(found: Declared, where: str, name: Any) -> str | None:
    if name is None:
        return None
    if not isinstance(name, str) or name not in _GELUS:
        known = ", ".join(_GELUS)
        found.problems.append(f"{where}: the activation {name!r} is not known here; {known} are")
        return None
    return _GELUS[name]


def build(found: Declared, seen: Mapping[str, Any]) -> Any:
    """Builds the model of a source that describes it sufficiently.

    Args:
      found: Statements of the source.
      seen: Attributes inferred from the arrays, and the defaults of the source's project.

    Raises:
      UserError: The source does not describe its model, or the attributes do not fit together.
    """
    if found.name is None and not found.complete:
        raise UserError("The weights file does not name its model; give it with model=.")
    if found.name is not None:
        return create_model(found.name, **{**found.model, "num_classes": seen["num_classes"]})
    try:
        model = ViT(**{**seen, **found.model, "num_classes": seen["num_classes"]})
        model.check()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"What the source says of its model does not fit together: {error}"
        ) from error
    return model
