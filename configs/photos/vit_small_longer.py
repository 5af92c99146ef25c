"""The dense model of photos/vit_small.py, fine-tuned for as long as the models that start from it.

    python train.py --config=configs/photos/vit_small_longer.py \
        --workdir=runs/photos/vit_small_longer --config.data.data_dir=DATA \
        --config.init_from=runs/photos/vit_small

What it gains is what fine-tuning alone is worth. Lower resolutions are the same with
--config.data.image_size=84 (36 tokens), 98 (49) or 70 (25).
Cost: as photos/vit_small.py, after it.
Expect: 96.1 % after eight epochs in batches of 128 (docs/results/photos.md).
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "vit_small.py")
    config.optimizer.learning_rate = 1e-4
    return config
