"""What is exported: a model, its parameters, and what others must know to use them."""

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
class Source:
    """A trained model.

    Attributes:
      name: of the model in the registry.
      options: that `create_model` made it with, as JSON has them.
      params: arrays by our names, 'blocks_0/attn/qkv/kernel'.
      class_names: in the order of the labels; empty where they are not known.
      crop: share of the short side of image files that the model was evaluated on.
      exif_orientation: whether image files were turned upright for it.
      step: of the checkpoint; None if it is from none.
      workdir: of the run; None if it is from none.
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
    def load(cls, workdir: str | pathlib.Path, which: str = "best") -> "Source":
        """Loads a run: the moving average of its parameters where it has one.

        Args:
          workdir: of the run.
          which: 'best', 'latest', or a step.

        Raises:
          UserError: see `checkpoint.load_run`.
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
        """What travels with the parameters, as JSON has it; see `weights.ours.save`."""
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
