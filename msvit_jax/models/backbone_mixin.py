"""The attributes that models around a plain transformer share."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msvit_jax.models.vit import ViT


class BackboneMixin:
    """Passes on attributes of a model's `backbone` that every model has."""

    if TYPE_CHECKING:
        backbone: ViT

    @property
    def image_size(self) -> int:
        """Side of the training images in px."""
        return self.backbone.image_size

    @property
    def patch_size(self) -> int:
        """Side of the backbone's patches in px, the finest of the model."""
        return self.backbone.patch_size

    @property
    def num_classes(self) -> int:
        """Classes of the heads."""
        return self.backbone.num_classes

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean that images are normalized with."""
        return self.backbone.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation that images are normalized with."""
        return self.backbone.std


def backbone_of(model: Any) -> Any:
    """Returns the plain transformer of a model: its backbone, or the model itself."""
    return getattr(model, "backbone", model)
