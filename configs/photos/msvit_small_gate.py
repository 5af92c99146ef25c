"""A gate alone on photographs: the backbone of photos/vit_small.py stays frozen.

    python train.py --config=configs/photos/msvit_small_gate.py \
        --workdir=runs/photos/msvit_small_gate --config.data.data_dir=DATA \
        --config.init_from=runs/photos/vit_small

The start for a gate that others can use with their own backbone, and the cheapest fine-tuning:
nothing of the backbone changes, so that the dense model's weights can be shared.
Cost: two thirds of photos/msvit_small.py.
Expect: 88.6 % at 32 of 64 tokens after eight epochs in batches of 128 (docs/results/photos.md).
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "msvit_small.py")
    config.optimizer.freeze = ("backbone/",)
    config.model.drop_path = 0.0
    return config
