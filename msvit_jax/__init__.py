"""Vision transformers whose number of tokens depends on the image, in JAX."""

from msvit_jax.models import create_model, list_models

__all__ = ["create_model", "list_models"]
__version__ = "0.1.0"
