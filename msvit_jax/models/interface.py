"""The interface of a model: what training, evaluation, inference, export and measurement ask it.

Whoever runs a model asks these attributes instead of looking at its class, so that a new model is
its own file and a line in the registry.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from msvit_jax.image_size import ImageSize, height_and_width
from msvit_jax.models.layout import Layout

if TYPE_CHECKING:
    from msvit_jax.models.reduction import ReductionSpec


CLASSIFICATION, SEGMENTATION = "classification", "segmentation"  # values of `ImageModel.task`


@runtime_checkable
class ImageModel(Protocol):
    """A Flax module that classifies images or their pixels, with what every model has.

    `ModelDefaults` has them for a model without a gate, layouts and early exits.
    """

    @property
    def task(self) -> str:
        """What the model answers: CLASSIFICATION of images, or SEGMENTATION of their pixels."""

    @property
    def num_classes(self) -> int:
        """Number of classes of the head; 0 for a model that answers with features."""

    @property
    def image_size(self) -> ImageSize:
        """Side of the training images in px, or their (height, width)."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of a training image: (height, width, 3)."""

    @property
    def patch_size(self) -> int:
        """Side of the finest patches in px."""

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of the finest patches of a training image."""

    @property
    def max_tokens(self) -> int:
        """Largest number of patch tokens that a training image can have."""

    @property
    def side_multiple(self) -> int:
        """Number of px that both sides of an image must be a multiple of."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of the pixels that images are normalized with, on the scale of 0 to 1."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of the pixels that images are normalized with, on that scale."""

    @property
    def backbone(self) -> Any:
        """The plain transformer of the model; the model itself if it is one."""

    @property
    def gate(self) -> str | None:
        """Kind of the gate ("mlp" learns); None for a model without one."""

    @property
    def has_gate(self) -> bool:
        """Whether a gate decides which regions of an image get fine tokens."""

    @property
    def region_grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the regions that a gate decides on; None without a gate."""

    @property
    def num_regions(self) -> int:
        """Number of regions that a gate decides on; 0 without a gate."""

    @property
    def has_threshold(self) -> bool:
        """Whether the gate decides by a threshold, which `__call__` then takes."""

    @property
    def threshold(self) -> float:
        """Probability of coarse above which a region is coarse; unused without a gate."""

    @property
    def layout(self) -> str:
        """Layout of tokens in memory, one of `models.layout.LAYOUTS`."""

    @property
    def token_capacity(self) -> int | tuple[int, ...] | None:
        """Capacity for each image's tokens; None if the layout has room for all, or sets none."""

    @property
    def row_groups(self) -> int:
        """Number of equal parts of a batch that the layout packs on their own."""

    @property
    def packing_layout(self) -> Layout:
        """The layout with all its sizes."""

    @property
    def max_capacity(self) -> int:
        """Largest number of patch tokens of an image that training can compute."""

    def check_layout(self) -> None:
        """Raises ValueError for a layout whose sizes do not fit the model."""

    @property
    def is_cascade(self) -> bool:
        """Whether images can leave at several exits; it is run by `run_stage`, exit by exit."""

    @property
    def exit_tokens(self) -> np.ndarray:
        """Number of patch tokens at each exit: [exits]."""

    def exit_macs(self) -> np.ndarray:
        """Counts multiply-accumulates up to each exit: [exits], increasing."""

    @property
    def reductions(self) -> Mapping[int, "ReductionSpec"]:
        """Layers that reduce tokens, counted from 0; empty if none does."""

    def macs(self, tokens: ArrayLike) -> np.ndarray:
        """Counts multiply-accumulates for images with the given numbers of patch tokens."""

    def layer_tokens(self, tokens: ArrayLike) -> np.ndarray:
        """Counts the patch tokens that enter each layer's MLP: [...] -> [depth, ...]."""

    def with_backbone(self, **changes: Any) -> Self:
        """Returns a copy, for the same parameters, with changed attributes of the backbone."""

    def with_dense_layout(self) -> Self:
        """Returns a copy, for the same parameters, whose layout has room for every image."""

    def clone(self, **changes: Any) -> Self:
        """Returns a copy with changed attributes."""

    def init(self, *arguments: Any, **options: Any) -> Any:
        """Makes variables, see `flax.linen.Module.init`."""

    def init_with_output(self, *arguments: Any, **options: Any) -> Any:
        """Makes an answer and variables, see `flax.linen.Module.init_with_output`."""

    def apply(self, *arguments: Any, **options: Any) -> Any:
        """Computes the answer, a `models.output.Output`, see `flax.linen.Module.apply`."""


class ModelDefaults:
    """Answers the interface's questions for a model without a gate, layouts and early exits."""

    task: str = CLASSIFICATION
    gate: str | None = None
    threshold: float = 0.5
    layout: str = "slots"
    token_capacity: int | tuple[int, ...] | None = None
    row_groups: int = 1

    if TYPE_CHECKING:

        @property
        def image_size(self) -> ImageSize:
            """Side of the training images in px, or their (height, width)."""

        @property
        def patch_size(self) -> int:
            """Side of the finest patches in px."""

        @property
        def patch_grid(self) -> tuple[int, int]:
            """(rows, columns) of the finest patches of a training image."""

        def macs(self, tokens: ArrayLike) -> np.ndarray:
            """Counts multiply-accumulates for images with the given numbers of patch tokens."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of a training image: (height, width, 3)."""
        return (*height_and_width(self.image_size), 3)

    @property
    def grid_size(self) -> int:
        """Number of the finest patches along one side of a square training image.

        Raises:
          ValueError: The images are rectangles; `patch_grid` has both numbers.
        """
        rows, columns = self.patch_grid
        if rows != columns:
            raise ValueError(f"{rows} x {columns} patches are no square; use `patch_grid`.")
        return rows

    @property
    def max_tokens(self) -> int:
        """Largest number of patch tokens that a training image can have."""
        rows, columns = self.patch_grid
        return rows * columns

    @property
    def side_multiple(self) -> int:
        """Number of px that both sides of an image must be a multiple of."""
        return self.patch_size

    @property
    def region_grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the regions that a gate decides on; None without a gate."""
        return None

    @property
    def has_gate(self) -> bool:
        """Whether a gate decides which regions of an image get fine tokens."""
        return self.region_grid is not None

    @property
    def num_regions(self) -> int:
        """Number of regions that a gate decides on; 0 without a gate."""
        return 0 if self.region_grid is None else self.region_grid[0] * self.region_grid[1]

    @property
    def has_threshold(self) -> bool:
        """Whether the gate decides by a threshold, which `__call__` then takes."""
        return False

    @property
    def packing_layout(self) -> Layout:
        """The layout with all its sizes."""
        return Layout(self.layout)

    @property
    def max_capacity(self) -> int:
        """Largest number of patch tokens of an image that training can compute."""
        return self.max_tokens

    def check_layout(self) -> None:
        """Does nothing: every size fits without layouts."""

    @property
    def is_cascade(self) -> bool:
        """Whether images can leave at several exits."""
        return False

    @property
    def exit_tokens(self) -> np.ndarray:
        """Number of patch tokens at each exit: [exits]."""
        return np.asarray([self.max_tokens])

    def exit_macs(self) -> np.ndarray:
        """Counts multiply-accumulates up to each exit: [exits]."""
        return self.macs(self.exit_tokens)

    def with_dense_layout(self) -> Self:
        """Returns a copy, for the same parameters, whose layout has room for every image."""
        return self
