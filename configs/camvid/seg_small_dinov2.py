"""Segmenter with a mask transformer over a pretrained DINOv2 ViT-S/14, on CamVid.

    msvit prepare --source=camvid.zip --name=camvid --classes=camvid_classes.json --data_dir=data
    python train.py --config=configs/camvid/seg_small_dinov2.py --workdir=runs/camvid_dinov2 \
        --config.data.data_dir=data --config.init_from=WEIGHTS

WEIGHTS is a DINOv2 ViT-S/14 in any format that the library reads. Images of 360 x 480 px are
enlarged by a hundredth and looked at in two windows of 364 px: 26 x 26 patches each.
Cost: two minutes on an H200 that other runs shared, days on a laptop.
Expect: mIoU 64.1 % on test, 72.2 % on val, without photometric distortion and with the training
split on the device (docs/results/camvid.md).
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "seg_small_mask.py")
    config.model = {
        "name": "segmenter",
        "encoder": "vit_small_patch14_dinov2",
        "decoder": "mask",
        "drop_path": 0.1,
    }
    config.data.image_size = 364
    config.data.short_side = None
    config.batch_size = 16
    config.epochs = 30.0
    return config
