"""Configs: files that change some of the defaults, and command-line overrides.

One config file is one result: it defines `get_config()`, which starts from `base()`, changes what
it needs and states in its docstring how to run it, what that costs and what to expect.
"""

import ast
import dataclasses
import json
import pathlib
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from msvit_jax import (
    config_aliases,
    config_defaults,
    config_rules,
    extras,
    labels,
    losses,
    paths,
)
from msvit_jax.errors import UserError, nearest
from msvit_jax.image_size import is_square, simplified
from msvit_jax.models import registry
from msvit_jax.models.interface import ImageModel

with extras.needed("train"):
    from ml_collections import config_dict

# Keys that may differ between a run and its resumption: where things are stored and how often they
# are shown, never what is computed.
FREE_TO_CHANGE = (
    "steps",
    "log_every_steps",
    "log_images",
    "terminal",
    "mesh.data",
    "mesh.fsdp",
    "checkpoint.keep_latest",
    "checkpoint.every_steps",
    "data.data_dir",
    "data.match_classes",
    "data.workers",
    "data.prefetch",
    "data.cache",
)

# Keys that may differ between the processes of a run.
OF_ONE_PROCESS = ("terminal", "data.data_dir", "data.workers", "data.prefetch", "data.cache")


def packaged_folder() -> pathlib.Path:
    """Returns the folder of the configs that come with the library.

    In a wheel it is in the package, in the repository beside it.
    """
    package = pathlib.Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def base() -> config_dict.ConfigDict:
    """Returns every key with its default, see `config_defaults`."""
    return config_defaults.make(_gate_loss_defaults())


def _gate_loss_defaults() -> dict[str, Any]:
    """Returns attributes of `losses.GateLoss` with defaults; the loss is off by default."""
    fields = dataclasses.fields(losses.GateLoss)
    ours = ("parent", "name", "region_grid")  # the grid is the model's
    defaults = {f.name: f.default for f in fields if f.name not in ours}
    return {**defaults, "kind": "none"}


def load(path: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> config_dict.ConfigDict:
    """Reads a config file and applies overrides.

    Args:
      path: Python file that defines `get_config()`. Where there is no such file,
        'configs/digits_vit.py' and 'digits_vit' name a config that comes with the library, and a
        line on stderr says so.
      overrides: Dict such as {'data.mixup': 0.8}, or texts such as 'data.mixup=0.8'.

    Raises:
      UserError: There is no such file, a key does not exist (the message names the nearest that
        does), or a value has the wrong type.
    """
    config = _read(path)
    _rename(config)
    _check_keys(config, base(), path)
    items = overrides.items() if isinstance(overrides, Mapping) else map(split_override, overrides)
    for key, value in items:
        set_key(config, key, value)
    _check_names(config)
    check(config)
    config.lock()
    return config


def check(config: config_dict.ConfigDict) -> None:
    """Checks that every value is valid, see `config_rules`.

    Raises:
      UserError: A value is not valid; the message says which values are. Images are rectangles
        and something in the config makes squares.
    """
    _check_values(config, "")
    if is_square(config.data.image_size):
        return
    if config.data.target == "label" and config.data.crop_scale is not None:
        raise UserError(
            f"data.image_size={config.data.image_size} is a rectangle, and random crops "
            "(data.crop_scale) are resized to squares. Set data.crop_scale to None, which cuts the "
            "central rectangle, or data.image_size to one number."
        )
    build_model(config)  # refuses models that take squares alone, before data are read


def _check_values(config: config_dict.ConfigDict, prefix: str) -> None:
    """Checks the values of the keys that begin with `prefix`."""
    types = registry.model_types(config.model.name)
    for key, value in flatten(config).items():
        if key.startswith(prefix):
            config_rules.check(key, value, types.get(key.removeprefix("model.")))


def sibling(config_file: str, name: str) -> config_dict.ConfigDict:
    """Reads the config `name` beside another one, given that one's `__file__`."""
    return _read(str(paths.parse(config_file).with_name(name)))


def take_overrides(argv: list[str], sections: Iterable[str] = ("config",)) -> list[str]:
    """Removes `--config.key=value` arguments from argv and returns them as 'key=value'.

    Args:
      argv: Command line; changed in place.
      sections: Prefixes to take. All but 'config' stay part of the key: '--model.gate=random'
        becomes 'model.gate=random'.
    """
    taken, rest = [], []
    prefixes = {f"--{s}.": "" if s == "config" else f"{s}." for s in sections}
    for argument in argv:
        prefix = next((p for p in prefixes if argument.startswith(p)), None)
        if prefix is None:
            rest.append(argument)
        else:
            taken.append(prefixes[prefix] + argument.removeprefix(prefix))
    argv[:] = rest
    return taken


def set_key(config: config_dict.ConfigDict, key: str, value: Any) -> None:
    """Sets one dotted key; texts are read as Python literals of the type the key has.

    Raises:
      UserError: The key does not exist, or the value does not fit its type.
    """
    key = config_aliases.current_key(key)
    *parents, leaf = key.split(".")
    known = list(flatten(config))
    section = config
    for parent in parents:
        if not isinstance(section.get(parent), config_dict.ConfigDict):
            raise UserError(f"Unknown config key {key!r}.{nearest(key, known)}")
        section = section[parent]
    if isinstance(section.get(leaf), config_dict.ConfigDict):
        raise UserError(
            f"{key!r} is a section of the config; set one of its keys, e.g. {key}.<key>."
        )
    if leaf in section:
        read = config_aliases.current_value(key, _coerce(key, value, section.get_type(leaf)))
        config_rules.check(key, read)
        with config.ignore_type():  # a size is a number or two; other types were checked
            section[leaf] = read
    elif parents == ["model"]:
        # Any attribute of the model; build_model knows them.
        section[leaf] = config_aliases.current_value(key, _literal(value))
    else:
        raise UserError(f"Unknown config key {key!r}.{nearest(key, known)}")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {'optimizer.learning_rate': 1e-3, ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | config_dict.ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def model_attributes(config: config_dict.ConfigDict) -> dict[str, Any]:
    """Returns the attributes that the config gives its model, without the name."""
    _check_values(config, "model.")  # other keys do not matter for a run that is over
    attributes = {**config.model.to_dict()}
    attributes.pop("name")
    attributes.setdefault("dtype", config.dtype)
    attributes["dtype"] = jnp.dtype(attributes["dtype"])
    size = simplified(config.data.image_size)
    given = simplified(attributes.setdefault("image_size", size))
    if given != size:
        raise UserError(
            f"model.image_size is {given} but data.image_size is {size}; "
            "set both to the same size, or only data.image_size."
        )
    return {**attributes, "image_size": size}


def build_model(config: config_dict.ConfigDict) -> ImageModel:
    """Builds the config's model at the size of the config's images.

    Raises:
      UserError: The model is unknown, it lacks an attribute, or sizes do not fit.
    """
    attributes = model_attributes(config)
    try:
        return registry.create_model(config.model.name, **attributes)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"Model {config.model.name!r} cannot be built: {error}") from error


def build_gate_loss(config: config_dict.ConfigDict, model: ImageModel) -> nn.Module:
    """Builds the config's `losses.GateLoss` for the model's regions."""
    options = {k: v for k, v in config.loss.gate.items() if k not in ("weight", "correction")}
    return losses.GateLoss(**options, region_grid=model.region_grid or (1, 1))


def resolve(config: config_dict.ConfigDict, num_classes: int) -> config_dict.ConfigDict:
    """Returns a copy with what was left to the data set filled in: class count, image size.

    Raises:
      UserError: A value is not valid, or the config states another number of classes.
    """
    check(config)
    named = config.model.get("num_classes", num_classes)
    remedy = "Leave model.num_classes to the data set, or choose the data set that it is for."
    labels.check_count(named, num_classes, of="The config's model", remedy=remedy)
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        size = simplified(config.data.image_size)
        for key, value in (("num_classes", num_classes), ("image_size", size)):
            if key not in resolved.model:
                resolved.model[key] = value
    return resolved


def with_model_options(
    config: config_dict.ConfigDict, options: Mapping[str, Any]
) -> config_dict.ConfigDict:
    """Returns a copy with more options of the model."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        for key, value in options.items():
            changed.model[key] = value
    return changed


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Lists the keys in which two configs would compute something else, with both values."""
    left, right = (flatten(json.loads(to_json(c))) for c in (ours, theirs))
    missing = "(not set)"
    return [
        f"{key}: {left.get(key, missing)!r} here, {right.get(key, missing)!r} in the workdir"
        for key in sorted(left.keys() | right.keys())
        if key not in FREE_TO_CHANGE and left.get(key, missing) != right.get(key, missing)
    ]


def to_json(config: Mapping[str, Any]) -> str:
    """Writes a config as JSON that `from_json` reads back."""
    plain = config.to_dict() if isinstance(config, config_dict.ConfigDict) else config
    return json.dumps(plain, indent=2)


def from_json(text: str) -> config_dict.ConfigDict:
    """Reads what `to_json` wrote, by any version; lists become tuples, as in the config files."""
    return config_dict.ConfigDict(_tuples(config_aliases.current(json.loads(text))))


def with_defaults(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """Returns a copy with the keys that are newer than the config, at their defaults.

    A new key's default is the behavior from before the key existed.
    """
    filled = base()
    with filled.unlocked(), filled.ignore_type():
        filled.update(config)
    return filled


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read(path: str) -> config_dict.ConfigDict:
    file = _find(path)
    try:
        if paths.is_address(file):
            names: dict[str, Any] = {"__file__": str(file), "__name__": "<config>"}
            exec(compile(file.read_text(), str(file), "exec"), names)
            return names["get_config"]()
        return runpy.run_path(str(file))["get_config"]()
    except KeyError as error:
        raise UserError(f"{path} does not define get_config().") from error
    except (AttributeError, TypeError) as error:
        hint = config_aliases.hint(str(error))
        raise UserError(f"{path} is not a valid config: {error}{hint}") from error


def _rename(config: config_dict.ConfigDict) -> None:
    """Brings the keys and values that a file has set under earlier names to their current ones."""
    for key, value in flatten(config).items():
        name = config_aliases.current_key(key)
        changed = config_aliases.current_value(name, value)
        if (name, changed) != (key, value):
            with config.unlocked():
                section, leaf = _section(config, name)
                section[leaf] = changed
                if name != key:
                    section, leaf = _section(config, key)
                    del section[leaf]


def _section(config: config_dict.ConfigDict, key: str) -> tuple[config_dict.ConfigDict, str]:
    """Returns the section that a dotted key is in, and the key's name there."""
    *parents, leaf = key.split(".")
    for parent in parents:
        config = config[parent]
    return config, leaf


def _find(path: str) -> pathlib.Path:
    """Returns the file that a path names, or the packaged config."""
    file = paths.parse(path)
    if file.is_file():
        return file
    packaged = _packaged(path)
    if packaged is not None:
        print(f"No file {path!r}; using the packaged {packaged}.", file=sys.stderr, flush=True)
        return packaged
    there = [str(p) for p in sorted(file.parent.glob("*.py"))]
    ours = sorted(packaged_folder().rglob("*.py"))
    there += [f.relative_to(packaged_folder()).with_suffix("").as_posix() for f in ours]
    raise UserError(f"No config file {path!r}.{nearest(path, there)}")


def _packaged(path: str) -> pathlib.Path | None:
    """Returns the packaged config named by 'configs/imagenet/x.py' or 'imagenet/x', or None."""
    name = path.removeprefix("configs/").removesuffix(".py") + ".py"
    file = packaged_folder() / name
    inside = not name.startswith("/") and ".." not in file.parts
    return file if inside and file.is_file() else None


def _check_keys(config: config_dict.ConfigDict, known: config_dict.ConfigDict, path: str) -> None:
    names = flatten(known)
    for key in flatten(config):
        if key not in names and not key.startswith("model."):
            raise UserError(f"Unknown config key {key!r} in {path}.{nearest(key, names)}")


def _check_names(config: config_dict.ConfigDict) -> None:
    """Checks the model's name and its overrides."""
    options = registry.model_options(config.model.name)
    for key in config.model:
        if key != "name" and key not in options:
            names = [f"model.{option}" for option in sorted(options)]
            raise UserError(f"Unknown config key 'model.{key}'.{nearest(f'model.{key}', names)}")


def split_override(text: str) -> tuple[str, str]:
    """Splits 'key=value'."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"Override {text!r} has no value; write {key}=<value>.")
    return key, value


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    if value.lower().lstrip("+-") in _NO_NUMBERS:
        return float(value)  # for the rules to refuse
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _coerce(key: str, value: Any, wanted: type) -> Any:
    """Reads `value` as the type `wanted`; None is for keys that may be unset, and for tuples."""
    if wanted is str and isinstance(value, str):
        return value
    read = _literal(value)
    if isinstance(config_rules.rule_of(key), config_rules.Size):
        if isinstance(read, float) and read.is_integer():
            return int(read)
        return tuple(read) if isinstance(read, list) else read
    if wanted is type(None) or (read is None and wanted is not bool):
        return read
    if wanted is tuple:
        return _as_tuple(read)
    if wanted is float and isinstance(read, int | float) and not isinstance(read, bool):
        return float(read)
    if wanted is int and isinstance(read, float) and read.is_integer():
        return int(read)
    if type(read) is not wanted:
        raise UserError(f"{key}={value} is not a valid value: {wanted.__name__} expected.")
    return read


_NO_NUMBERS = ("nan", "inf", "infinity")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if isinstance(value, list | tuple):
        return tuple(value)
    return tuple(value.split(",")) if isinstance(value, str) else (value,)
