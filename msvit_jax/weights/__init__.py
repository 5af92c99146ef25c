"""Reads and writes weights: other projects' formats, converted key by key, and our own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msvit_jax.weights.formats import FORMATS, LoadedWeights, to_theirs
    from msvit_jax.weights.loading import (
        Loaded,
        class_names,
        declared_options,
        load,
        load_model,
        load_params,
        read,
    )
    from msvit_jax.weights.opened import file_of
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


def __getattr__(name: str) -> Any:
    # Imported on first use: reading runs needs Orbax, and some modules here are also commands.
    if name in __all__:
        from msvit_jax.weights import formats, loading, opened, ours

        return next(
            vars(module)[name]
            for module in (formats, opened, loading, ours)
            if name in vars(module)
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
