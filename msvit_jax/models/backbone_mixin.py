"""The attributes that models around a plain transformer share."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike

from msvit_jax.image_size import ImageSize
from msvit_jax.models.interface import ModelDefaults

if TYPE_CHECKING:
    from msvit_jax.models.reduction import ReductionSpec
    from msvit_jax.models.vit import ViT


class BackboneMixin(ModelDefaults):
    """Passes on attributes of a model's `backbone` that every model has."""

    if TYPE_CHECKING:
        backbone: ViT

        def clone(self, **changes: Any) -> Self:
            """Returns a copy with changed attributes."""

    @property
    def image_size(self) -> ImageSize:
        """Side of the training images in px, or their (height, width)."""
        return self.backbone.image_size

    @property
    def patch_size(self) -> int:
        """Side of the backbone's patches in px, the finest of the model."""
        return self.backbone.patch_size

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of the backbone's patches of a training image."""
        return self.backbone.patch_grid

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

    @property
    def reductions(self) -> Mapping[int, "ReductionSpec"]:
        """Layers of the backbone that reduce tokens, counted from 0."""
        return self.backbone.reductions

    def layer_tokens(self, tokens: ArrayLike) -> np.ndarray:
        """Counts the patch tokens that enter each layer's MLP: [...] -> [depth, ...]."""
        return self.backbone.layer_tokens(tokens)

    def with_backbone(self, **changes: Any) -> Self:
        """Returns a copy, for the same parameters, with changed attributes of the backbone."""
        return self.clone(backbone=self.backbone.clone(**changes))
