"""Segmenter over MSViT, ViT-S/16, on CamVid, fine-tuned from seg_small_mask.py.

    python train.py --config=configs/camvid/msvit_seg_small_mask.py --workdir=runs/camvid_msvit \
        --config.data.data_dir=data --config.init_from=runs/camvid

Fine patches of 16 px, coarse ones of 32 px: 121 to 484 tokens a window. A gate of a classification
run is kept with --config.optimizer.freeze=gate and that run as init_from.
Cost: not measured; half of the dense run.
Expect: not run by us, so no figure is promised.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "seg_small_mask.py")
    config.model.name = "msvit_seg_vit_small_mask"
    config.epochs = 40.0
    config.optimizer.learning_rate = 3e-4
    config.optimizer.encoder_learning_rate = 1e-4
    config.optimizer.gate_learning_rate = 1e-4
    config.loss.gate.kind = "gbas"
    config.loss.gate.weight = 4.0
    config.loss.gate.target = 0.45
    return config
