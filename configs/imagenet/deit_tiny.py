"""DeiT-Ti on ImageNet, the recipe of Touvron et al. 2021, table 9.

    python train.py --config=configs/imagenet/deit_tiny.py --workdir=runs/deit_tiny

Needs the TFDS data set imagenet2012, prepared as array_record. Two differences from the paper: no
repeated augmentation, and the learning rate warms up from 0 instead of 1e-6.
Cost: not yet measured.
Expect: not yet measured here; 72.2 % top-1 in the paper.
"""

from ml_collections import config_dict

from msvit_jax.config import base


def get_config() -> config_dict.ConfigDict:
    config = base()
    config.model = {"name": "deit_tiny_patch16_224", "drop_path": 0.1}
    config.dtype = "bfloat16"
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.crop_scale = (0.08, 1.0)
    config.data.flip = True
    config.data.randaugment = {"num_ops": 2, "magnitude": 9.0, "std": 0.5}
    config.data.erasing = 0.25
    config.data.eval_crop = 0.875
    config.data.mixup = 0.8
    config.data.cutmix = 1.0
    config.data.workers = 16
    config.batch_size = 1024
    config.epochs = 300.0
    config.eval_every_epochs = 5.0
    config.ema_decay = 0.99996
    config.optimizer.learning_rate = 5e-4 * 1024 / 512
    config.optimizer.min_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 0.0
    config.loss.label_smoothing = 0.1
    config.checkpoint.every_steps = 1000
    return config
