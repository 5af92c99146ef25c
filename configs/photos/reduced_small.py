"""Another reducer over DINOv2 ViT-S/14 on photographs, fine-tuned from photos/vit_small.py.

    python train.py --config=configs/photos/reduced_small.py \
        --workdir=runs/photos/reduced_small --config.data.data_dir=DATA \
        --config.init_from=runs/photos/vit_small

ToMe; or --config.model.reducer=topk (or evit) --config.model.keep=0.6.
Cost: as photos/vit_small.py, after it.
Expect: 94.5 % for ToMe at 0.67 of dense's MACs after five epochs in batches of 128.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "vit_small_longer.py")
    config.model.reducer = "tome"
    config.model.remove = 3
    return config
