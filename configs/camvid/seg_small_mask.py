"""Segmenter with a mask transformer, ViT-S/16, on CamVid: 11 classes, 360 x 480 px.

    msvit prepare --source=camvid.zip --name=camvid --classes=camvid_classes.json --data_dir=data
    python train.py --config=configs/camvid/seg_small_mask.py --workdir=runs/camvid \
        --config.data.data_dir=data --config.init_from=vit_small_patch16_224.safetensors

The zip has train/, trainannot/, val/, valannot/ and so on, as the tutorials' CamVid has them; the
JSON names the classes, see docs/segmentation.md. Images are resized to a short side of 352 px and
looked at in square windows of 352 px; whole frames, one window each, by
--config.data.image_size=336,448 --config.data.short_side=336.
Cost: not measured; minutes on a GPU, days on a laptop.
Expect: not run by us, so no figure is promised.
"""

from ml_collections import config_dict

from msvit_jax.config import base


def get_config() -> config_dict.ConfigDict:
    config = base()
    config.model = {"name": "seg_vit_small_mask", "drop_path": 0.1}
    config.data.name = "camvid"
    config.data.target = "segmentation_mask"
    config.data.eval_split = "val"
    config.data.image_size = 352
    config.data.short_side = 352
    config.data.scale_range = (0.5, 2.0)
    config.data.max_class_share = 0.75
    config.data.flip = True
    config.data.photometric = True
    config.data.cache = True
    config.batch_size = 8
    config.epochs = 80.0
    config.eval_every_epochs = 10.0
    config.optimizer.schedule = "poly"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.encoder_learning_rate = 1e-4
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_epochs = 2.0
    return config
