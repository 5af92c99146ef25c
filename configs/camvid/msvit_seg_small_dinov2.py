"""Segmenter over MSViT, DINOv2 ViT-S/14, on CamVid, trained on from camvid/seg_small_dinov2.py.

    python train.py --config=configs/camvid/msvit_seg_small_dinov2.py \
        --workdir=runs/camvid_msvit_dinov2 --config.data.data_dir=data \
        --config.init_from=runs/camvid_dinov2

Patches of 14 and 28 px: 169 to 676 tokens a window, 45 % of the regions fine: 397 tokens
on average. A gate that learns nothing: --config.model.gate=entropy --config.loss.gate.kind=none.
Cost: as camvid/seg_small_dinov2_longer.py, or somewhat more.
Expect: mIoU 62.1 % on test at 397 of 676 tokens (docs/results/camvid.md).
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "seg_small_dinov2_longer.py")
    config.model.encoder = "msvit_small_patch14_dinov2"
    config.model.decode = "mixed"
    config.optimizer.gate_learning_rate = 1e-3
    config.loss.gate.kind = "gbas"
    config.loss.gate.weight = 4.0
    config.loss.gate.target = 0.45
    return config
