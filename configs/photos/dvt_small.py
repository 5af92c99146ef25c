"""DVT over DINOv2 ViT-S/14 on photographs: 16, 36 or 64 tokens, from photos/vit_small.py.

    python train.py --config=configs/photos/dvt_small.py \
        --workdir=runs/photos/dvt_small --config.data.data_dir=DATA \
        --config.init_from=runs/photos/vit_small

Three stages with both reuses, trained together; two stages: --config.model.grid_sizes=5,8.
Cost: twice photos/vit_small.py, after it.
Expect: two stages 96.0 % at 0.62 of dense's MACs after eight epochs in batches of 128, dense
trained as long 96.1 (docs/results/photos.md); three stages not measured.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "vit_small_longer.py")
    config.model.name = "dvt_small_dinov2"
    config.model.grid_sizes = (4, 6, 8)
    return config
