"""The model to export, its parameters, and the information needed to use them."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from msvit_jax import checkpoint, paths
from msvit_jax import config as configs
from msvit_jax.tree import flat_names
from msvit_jax.weights import ours


@dataclasses.dataclass(frozen=True)
class ExportBundle:
    """A trained model.

    Attributes:
      name: Name of the model in the registry.
      options: Options for `create_model`, as JSON values.
      params: Arrays by our names, such as 'blocks_0/attn/qkv/kernel'.
      class_names: Names of the classes, in the order of the labels; empty if they are not known.
      crop: Share of the short side of image files that the model was evaluated on.
      exif_orientation: Whether image files were rotated upright by their EXIF data.
      step: Step of the checkpoint; None if the model is not from a checkpoint.
      workdir: Workdir of the run; None if the model is not from a run.
    """

    name: str
    options: dict[str, Any]
    params: dict[str, np.ndarray]
    class_names: Sequence[str] = ()
    crop: float = 1.0
    exif_orientation: bool = True
    step: int | None = None
    workdir: pathlib.Path | None = None

    @classmethod
    def load(cls, workdir: str | pathlib.Path, which: str = "best") -> "ExportBundle":
        """Loads a run: the moving average of its parameters if it has one, else the parameters.

        Args:
          workdir: Workdir of the run.
          which: Checkpoint: 'best', 'latest', or a step.

        Raises:
          UserError: The run cannot be loaded, see `checkpoint.load_run`.
        """
        config = checkpoint.read_config(workdir)
        step = checkpoint.find_step(workdir, which)
        params = flat_names(checkpoint.load_params(workdir, str(step)))
        about = checkpoint.read_about(workdir, str(step))
        options = configs.model_attributes(config)
        return cls(
            name=config.model.name,
            options={**options, "dtype": str(options["dtype"])},
            params={name: np.asarray(value) for name, value in params.items()},
            class_names=tuple(about.get("class_names") or ()),
            crop=config.data.eval_crop,
            exif_orientation=config.data.exif_orientation,
            step=step,
            workdir=paths.parse(workdir),
        )

    @property
    def model(self) -> Any:
        """The model."""
        return ours.build_model({"model": {"name": self.name, **self.options}})

    @property
    def about(self) -> dict[str, Any]:
        """Metadata to store with the parameters, as JSON values; see `weights.ours.save`."""
        model = self.model
        return {
            "model": {"name": self.name, **self.options},
            "mean": list(model.mean),
            "std": list(model.std),
            "crop": self.crop,
            "exif_orientation": self.exif_orientation,
            "class_names": list(self.class_names),
            "step": self.step,
        }
