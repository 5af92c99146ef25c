"""DVT over T2T-ViT-12 on ImageNet, the official recipe.

    python train.py --config=configs/imagenet/dvt_t2t_vit_12.py --workdir=runs/dvt_t2t_vit_12

Needs the TFDS data set imagenet2012, prepared as array_record. One difference from the official
recipe: the learning rate warms up from 0 instead of 1e-6.
Cost: not yet measured.
Expect: not yet measured here; the paper's exits have 69.04, 75.65 and 80.00 % top-1 at 0.47, 1.46
and 3.50 GMACs (layer norms counted, as the paper counts; without them 1 % less).
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "deit_tiny.py")
    config.model = {"name": "dvt_t2t_vit_12", "drop_path": 0.1}
    config.batch_size = 1024
    config.epochs = 310.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.cooldown_epochs = 10.0
    config.optimizer.weight_decay = 0.03
    return config
