"""Segmenter on scattered digits: which pixels are digit, 64 px, patches of 8 px, 64 wide.

    python train.py --config=configs/digits_segmenter.py --workdir=runs/digits_segmenter

Starts from scratch; --config.init_from=runs/digits_vit starts from a classifier.
Cost: 4 epochs, 3 to 5 minutes on one CPU core.
Expect: mIoU of digit and background 81.3 %, 81.9 % after two epochs more at 1e-3; with merging at
0.7 of the MACs 81.8 % (docs/results/masks.md).
"""

from ml_collections import config_dict

from msvit_jax.config import base


def get_config() -> config_dict.ConfigDict:
    config = base()
    config.model = {
        "name": "segmenter",
        "encoder": "vit",
        "decoder": "mask",
        "patch_size": 8,
        "width": 64,
        "depth": 4,
        "heads": 4,
        "pos_init": "sincos",
    }
    config.data.name = "scattered_digits"
    config.data.target = "segmentation_mask"
    config.data.image_size = 64
    config.data.pad_shift = 4
    config.data.cache = True
    config.batch_size = 64
    config.epochs = 4.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_epochs = 0.25
    config.eval_every_epochs = 1.0
    return config
