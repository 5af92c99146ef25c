"""Segmenter over MSViT, ViT-S/16, on ADE20K, fine-tuned from seg_small_mask.py.

    python train.py --config=configs/ade20k/msvit_seg_small_mask.py --workdir=runs/ade20k_msvit \
        --config.data.data_dir=data --config.init_from=runs/ade20k

Fine patches of 16 px, coarse ones of 32 px: 256 to 1,024 tokens a window; the gate's loss asks for
a share of fine regions that gives about 600.
Cost: not measured; half of the dense run.
Expect: not run by us, so no figure is promised.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "seg_small_mask.py")
    config.model.name = "msvit_seg_vit_small_mask"
    config.epochs = 32.0
    config.optimizer.clip_norm = 1.0
    config.loss.gate.kind = "gbas"
    config.loss.gate.weight = 4.0
    config.loss.gate.target = 0.45
    return config
