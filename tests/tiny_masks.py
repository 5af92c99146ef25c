"""A data set of masks and configs so small that a whole run of segmentation takes seconds."""

import atexit
import functools
import pathlib
import shutil
import tempfile

import numpy as np
from ml_collections import config_dict
from PIL import Image

from msvit_jax import config as configs
from msvit_jax.data import prepare_masks

SIDE = 16
TRAIN, VALIDATION = 24, 9
CLASSES = ("dark", "blue", "red")


@functools.cache
def data_dir() -> str:
    """Makes a TFDS data set of images of several sizes whose classes are colors of squares."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="msvit_jax_masks_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        for index in range(count):
            image, mask = example(rng, ((16, 24), (20, 16), (12, 30))[index % 3])
            for kind, pixels in (("images", image), ("masks", mask)):
                folder = root / "source" / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    (root / "classes.json").write_text('{"classes": ["dark", "blue", "red"]}')
    prepare_masks.prepare(
        [str(root / "source")],
        name="masks",
        data_dir=str(root / "tfds"),
        classes=str(root / "classes.json"),
    )
    return str(root / "tfds")


def example(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws an image and its mask; one corner has no class."""
    image = rng.integers(0, 60, (*size, 3), dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    for number, channel in ((1, 2), (2, 0)):
        top, left = rng.integers(0, size[0] - 7), rng.integers(0, size[1] - 7)
        square = (slice(top, top + 8), slice(left, left + 8))
        image[square] //= 2
        image[(*square, channel)] += 150
        mask[square] = number
    mask[:2, :2] = 255
    return image, mask


def config(encoder: str = "vit", **changes: object) -> config_dict.ConfigDict:
    """A config for `data_dir()`; changes are dotted keys written with '__' for the dots."""
    made = configs.base()
    made.model = {
        **{"name": "segmenter", "encoder": encoder, "decoder": "mask", "pos_init": "sincos"},
        **{"patch_size": 4, "width": 16, "depth": 2, "heads": 2},
    }
    made.data.name = "masks"
    made.data.data_dir = data_dir()
    made.data.target = "segmentation_mask"
    made.data.image_size = SIDE
    made.data.prefetch = 1
    made.data.scale_range = (0.75, 1.5)
    made.batch_size = 8
    made.eval_batch_size = 8
    made.epochs = 8.0
    made.eval_every_epochs = 4.0
    made.log_every_steps = 4
    made.log_images = 2
    made.optimizer.learning_rate = 5e-3
    if encoder == "msvit":
        made.loss.gate.kind = "gbas"
    for key, value in changes.items():
        configs.set_key(made, key.replace("__", "."), value)
    return made
