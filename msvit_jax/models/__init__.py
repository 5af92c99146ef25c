"""Models: one backbone, and models that spend its tokens where the image needs them."""

from msvit_jax.models.dvt import DVT
from msvit_jax.models.mergence import Mergence
from msvit_jax.models.msvit import MSViT
from msvit_jax.models.output import GateOutput, Output
from msvit_jax.models.registry import create_model, list_models
from msvit_jax.models.vit import ViT

__all__ = ["DVT", "GateOutput", "MSViT", "Mergence", "Output", "ViT", "create_model", "list_models"]
