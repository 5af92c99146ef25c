"""DVT over T2T-ViT-14 on ImageNet, the official recipe; dvt_t2t_vit_12.py has the details.

    python train.py --config=configs/imagenet/dvt_t2t_vit_14.py --workdir=runs/dvt_t2t_vit_14

Cost: not yet measured.
Expect: not yet measured here.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "dvt_t2t_vit_12.py")
    config.model.name = "dvt_t2t_vit_14"
    config.batch_size = 512
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.05
    return config
