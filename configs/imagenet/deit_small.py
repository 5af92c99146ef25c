"""DeiT-S on ImageNet, the recipe of Touvron et al. 2021; deit_tiny.py has the details.

    python train.py --config=configs/imagenet/deit_small.py --workdir=runs/deit_small

Cost: not yet measured.
Expect: not yet measured here; 79.8 % top-1 in the paper.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "deit_tiny.py")
    config.model.name = "deit_small_patch16_224"
    return config
