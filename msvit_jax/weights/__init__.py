"""Reads and writes weights: other projects' formats, converted key by key, and our own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msvit_jax.weights.formats import (
        FORMATS,
        Loaded,
        LoadedWeights,
        class_names,
        declared_options,
        file_of,
        load,
        load_model,
        load_params,
        read,
        to_theirs,
    )
    from msvit_jax.weights.ours import build_model, describe, save

__all__ = [
    "FORMATS",
    "Loaded",
    "LoadedWeights",
    "build_model",
    "class_names",
    "declared_options",
    "describe",
    "file_of",
    "load",
    "load_model",
    "load_params",
    "read",
    "save",
    "to_theirs",
]
_OURS = ("build_model", "describe", "save")


def __getattr__(name: str) -> Any:
    # Imported on first use: reading runs needs Orbax, and some modules here are also commands.
    if name in __all__:
        from msvit_jax.weights import formats, ours

        return getattr(ours if name in _OURS else formats, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
