"""DVT over DeiT-S on ImageNet; dvt_t2t_vit_12.py has the details.

    python train.py --config=configs/imagenet/dvt_deit_small.py --workdir=runs/dvt_deit_small

Batch size, learning rate and weight decay are DeiT's (1e-3 for a batch of 1024, 0.05): those that
DVT used with DeiT-S are not known to us.
Cost: not yet measured.
Expect: not yet measured here; in the paper 79.30 % top-1 at 2.37 GMACs and 81.20 % at 3.61, with
exits chosen image by image.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "dvt_t2t_vit_12.py")
    config.model.name = "dvt_deit_small"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    return config
