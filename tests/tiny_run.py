"""A data set, models and configs so small that a whole run takes seconds."""

import atexit
import functools
import pathlib
import shutil
import tempfile

import numpy as np
from ml_collections import config_dict
from PIL import Image

from msvit_jax import config as configs
from msvit_jax.data import prepare

SIDE = 16
TRAIN, VALIDATION = 48, 21
CLASSES = ("blue", "green", "red")


@functools.cache
def data_dir() -> str:
    """Makes a TFDS data set of 16 px images whose class is the color of a noisy square."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="msvit_jax_tiny_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        for index in range(count):
            label = index % len(CLASSES)
            folder = root / "images" / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_image(rng, label)).save(folder / f"{index:03d}.png")
    prepare.prepare([str(root / "images")], name="tiny", data_dir=str(root / "tfds"))
    return str(root / "tfds")


def _image(rng: np.random.Generator, label: int) -> np.ndarray:
    image = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    top, left = rng.integers(0, SIDE // 2, 2)
    image[top : top + 8, left : left + 8, 2 - label] += 150
    return image


def config(name: str = "vit_tiny_patch16_224", **changes: object) -> config_dict.ConfigDict:
    """A config for `data_dir()`; changes are dotted keys written with '__' for the dots."""
    made = configs.base()
    made.model = {"name": name, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
    made.data.name = "tiny"
    made.data.data_dir = changes.get("data__data_dir") or data_dir()
    made.data.image_size = SIDE
    made.data.prefetch = 1
    made.batch_size = 16
    made.eval_batch_size = 16
    made.epochs = 4.0
    made.eval_every_epochs = 2.0
    made.log_every_steps = 2
    made.log_images = 2
    made.optimizer.learning_rate = 3e-3
    for key, value in changes.items():
        configs.set_key(made, key.replace("__", "."), value)
    return made


def msvit(**changes: object) -> config_dict.ConfigDict:
    """A mixed-scale config with the gate's loss on."""
    defaults = {"loss__gate__kind": "gbas", "model__gate_bias": 0.5}
    return config("msvit_tiny_patch16_224", **{**defaults, **changes})


def dvt(**changes: object) -> config_dict.ConfigDict:
    """A config of a cascade of two stages."""
    made = config("dvt_deit_small")
    made.model = {
        **{"name": "dvt_deit_small", "width": 16, "depth": 2, "heads": 2, "grid_sizes": (2, 4)},
        **{"feature_width": 4, "feature_hidden": 8},
    }
    for key, value in changes.items():
        configs.set_key(made, key.replace("__", "."), value)
    return made
