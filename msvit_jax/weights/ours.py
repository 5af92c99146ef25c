"""Our own weights files: .safetensors under our names, with a description of the model."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from msvit_jax import config_aliases, config_rules, digests, paths
from msvit_jax.errors import UserError, short
from msvit_jax.models.registry import create_model
from msvit_jax.weights import files

NAME = "ours"
KEY = "msvit_jax"  # key of our entry in the file's metadata
_DIGESTS = "msvit_jax_digests"  # key of the digests of all arrays
# What a description states besides the model and its pixels.
_RULES: dict[str, config_rules.Rule] = {
    "class_names": config_rules.Texts(),
    "crop": config_rules.RULES["data.eval_crop"],
    "exif_orientation": config_rules.RULES["data.exif_orientation"],
}


def save(
    path: str | pathlib.Path, flat: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> None:
    """Writes weights with their description.

    Args:
      path: Path of the .safetensors file; it appears complete or not at all.
      flat: Arrays by our names, joined by '/'.
      about: Description, as JSON values. Entries that are read back: `model` (`name` and options of
        `create_model`), `mean` and `std` of the pixels, `class_names`, `crop` and
        `exif_orientation`. Other entries are stored as well.
    """
    path = paths.parse(path)
    arrays = {name: np.ascontiguousarray(x) for name, x in flat.items()}
    with paths.whole(path) as part:
        found = {KEY: json.dumps(about), _DIGESTS: json.dumps(digests.of_tree(arrays))}
        save_file(arrays, part, metadata=found)


def check_unchanged(path: str | pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Raises UserError unless a file's arrays are those that `save` wrote; other files pass."""
    path = paths.fetch(path)
    text = None if path.suffix != ".safetensors" else files.read_metadata(path).get(_DIGESTS)
    if text is None:
        return
    saved, found = files.read_json(text, path), digests.of_tree(dict(arrays))
    changed = [name for name in {**saved, **found} if saved.get(name) != found.get(name)]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{str(path)!r} is damaged: {changed[0]}{more} changed after it was saved. Copy it or "
            "export it anew."
        )


def describe(path: str | pathlib.Path) -> dict[str, Any] | None:
    """Reads the description that `save` wrote; None for other files.

    Raises:
      UserError: The file or the description is damaged.
    """
    path = paths.fetch(path)
    if path.suffix != ".safetensors":
        return None
    text = files.read_metadata(path).get(KEY)
    if text is None:
        return None
    about = files.read_json(text, path)
    if isinstance(about.get("model"), Mapping):
        about |= config_aliases.current({"model": about["model"]})
    for key, rule in _RULES.items():
        if about.get(key) is not None and not rule.fits(about[key]):
            raise UserError(
                f"{str(path)!r} says {key}={short(about[key])}: {rule.wanted()} expected. Its "
                "description is damaged, or was written by something else."
            )
    return about


def build_model(about: Mapping[str, Any]) -> Any:
    """Builds the model that a description names, with its mean and std of the pixels.

    Raises:
      UserError: The model or an option is unknown, or no model is named.
    """
    options = dict(about.get("model") or {})
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError("The weights file does not name its model; give it with model=.")
    for key in ("mean", "std"):
        if about.get(key) is not None:
            options.setdefault(key, about[key])
    return create_model(name, **{key: _value(key, value) for key, value in options.items()})


def _value(key: str, value: Any) -> Any:
    """Converts a JSON value: lists to tuples, and the dtype's name to a dtype."""
    if key == "dtype":
        return jnp.dtype(value)
    return tuple(_value("", v) for v in value) if isinstance(value, list) else value
