"""Trees: parameters as flat dictionaries, where the name of a leaf is its path, and records."""

import math
from collections.abc import Mapping
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """Writes a key path of `jax.tree_util` as 'model/backbone/blocks_0/attn/qkv/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flat_names(tree: Any) -> dict[str, Any]:
    """Returns {'a/b/c': leaf} of a tree."""
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_names(function: Any, tree: Any) -> Any:
    """Maps function(name, leaf) over a tree."""
    return jax.tree_util.tree_map_with_path(lambda p, leaf: function(path_name(p), leaf), tree)


def for_json(record: Any) -> Any:
    """Returns a record with None for numbers that are not finite, for which JSON has no word."""
    if isinstance(record, Mapping):  # not by JAX, which would sort the keys
        return {key: for_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [for_json(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record
