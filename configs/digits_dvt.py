"""DVT on scattered digits, from scratch: 16, 36 or 64 tokens an image, both reuses.

    python train.py --config=configs/digits_dvt.py --workdir=runs/digits_dvt

Three stages of the backbone of digits_vit.py, at 64 px on grids of 4, 6 and 8, trained together.
Channels of the reused features are an eighth of a token's, as in DeiT-S.
Cost: 12 epochs, about twice those of digits_vit.py.
Expect: not yet measured.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "digits_vit.py")
    config.model = {
        "name": "dvt_deit_small",
        "image_size": 64,
        "grids": (4, 6, 8),
        "width": 64,
        "depth": 4,
        "heads": 4,
        "pos_init": "sincos",
        "feature_width": 8,
        "feature_hidden": 32,
    }
    return config
