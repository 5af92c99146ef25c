"""A pretrained DINOv2 ViT-S/14, fine-tuned on photographs at 112 px: the start of the others.

    python train.py --config=configs/photos/vit_small.py \
        --workdir=runs/photos/vit_small --config.data.data_dir=DATA --config.init_from=WEIGHTS

WEIGHTS is a DINOv2 ViT-S/14 in any format that the library reads, DATA holds a data set "photos"
that `msvit prepare` made of folders train/class/file and val/class/file. 64 patch tokens an
image. Learning rate, layer decay and crops are ours, for some 10,000 images and ten classes.
Cost: 2 epochs in batches of 32 (--config.batch_size) take about 40 minutes on two CPU cores.
Expect: 92.8 to 93.0 % on Imagenette after two epochs in batches of 128.
"""

from ml_collections import config_dict

from msvit_jax.config import base


def get_config() -> config_dict.ConfigDict:
    config = base()
    config.model = {"name": "vit_small_patch14_dinov2", "drop_path": 0.1}
    config.data.name = "photos"
    config.data.eval_split = "val"
    config.data.image_size = 112
    config.data.crop_scale = (0.35, 1.0)
    config.data.flip = True
    config.batch_size = 32
    config.eval_batch_size = 64
    config.epochs = 2.0
    config.eval_every_epochs = 1.0
    config.optimizer.learning_rate = 2e-4
    config.optimizer.min_learning_rate = 1e-6
    config.optimizer.warmup_epochs = 0.1
    config.optimizer.layer_decay = 0.75
    config.loss.label_smoothing = 0.1
    return config
