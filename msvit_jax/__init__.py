"""Vision transformers whose number of tokens depends on the image, in JAX."""

from typing import TYPE_CHECKING, Any

from msvit_jax.models import create_model, list_models

if TYPE_CHECKING:
    from msvit_jax.inference import Predictor

__all__ = ["Predictor", "create_model", "list_models"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # On first use: they bring Orbax and the data pipeline, which a model alone does not need.
    if name == "Predictor":
        from msvit_jax.inference import Predictor

        return Predictor
    if name == "export":
        import msvit_jax.export as export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
