"""Trees of parameters as flat dictionaries: the name of a leaf is its path."""

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
