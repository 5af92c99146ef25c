"""ViT-S/16 on ImageNet, fine-tuned from its ImageNet-21k weights (AugReg, Steiner et al. 2021).

    python train.py --config=configs/imagenet/vit_small.py --workdir=runs/vit_small \
        --config.init_from=<weights of vit_small_patch16_224, ImageNet-21k>

Needs the TFDS data set imagenet2012, prepared as array_record. AugReg fine-tunes for 20,000 steps
of batch 512 with SGD and no weight decay; AdamW, its learning rate and layer decay are ours.
Cost: not yet measured.
Expect: not yet measured.
"""

from ml_collections import config_dict

from msvit_jax.config import base


def get_config() -> config_dict.ConfigDict:
    config = base()
    config.model = {"name": "vit_small_patch16_224"}
    config.dtype = "bfloat16"
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.crop_scale = (0.05, 1.0)
    config.data.flip = True
    config.data.eval_crop = 0.9
    config.data.workers = 16
    config.batch_size = 512
    config.epochs = 8.0
    config.optimizer.learning_rate = 1e-4
    config.optimizer.min_learning_rate = 1e-6
    config.optimizer.warmup_epochs = 0.2
    config.optimizer.weight_decay = 0.0
    config.optimizer.layer_decay = 0.75
    config.checkpoint.every_steps = 1000
    return config
