"""Token Mergence over DeiT-S on ImageNet, fine-tuned for 30 epochs from dense weights.

    python train.py --config=configs/imagenet/mergence_deit_small.py \
        --workdir=runs/mergence_deit_small --config.init_from=runs/deit_small

Keeps 70 % of the patch tokens in layers 4, 7 and 10; features of 8 px patches beside those of
16 px. Everything but the abstract's idea is our reconstruction; the recipe is EViT's (30 epochs, a
learning rate of 2e-5 for a batch of 1024).
Cost: not yet measured.
Expect: not yet measured here. The abstract states 33 % fewer
MACs for 0.1 points on DeiT-S; EViT, whose schedule this is, 79.5 % at the same keep rate.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "deit_small.py")
    config.model.name = "mergence_deit_small_patch16_224"
    config.batch_size = 1024
    config.epochs = 30.0
    config.eval_every_epochs = 1.0
    config.ema_decay = 0.0
    config.optimizer.learning_rate = 2e-5
    config.optimizer.min_learning_rate = 1e-6
    config.optimizer.warmup_epochs = 0.0
    return config
