"""MSViT over DeiT-Ti on ImageNet, fine-tuned for 20 epochs from dense weights (MSViT, section 4).

    python train.py --config=configs/imagenet/msvit_deit_tiny.py --workdir=runs/msvit_deit_tiny \
        --config.init_from=runs/deit_tiny

Scales of 16 and 32 px at 224 px: 49 regions, 49 to 196 tokens an image. From the paper: 20 epochs
and the backbone's own augmentation. Ours: batch 512, AdamW's learning rates, the gate's loss
weight and target (facts without a verified source).
Cost: not yet measured.
Expect: not yet measured.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "deit_tiny.py")
    config.model.name = "msvit_deit_tiny_patch16_224"
    config.batch_size = 512
    config.epochs = 20.0
    config.eval_every_epochs = 1.0
    config.ema_decay = 0.0
    config.optimizer.learning_rate = 5e-5
    config.optimizer.min_learning_rate = 1e-6
    config.optimizer.gate_learning_rate = 1e-3
    config.optimizer.warmup_epochs = 1.0
    config.loss.gate.kind = "gbas"
    config.loss.gate.weight = 4.0
    config.loss.gate.target = 0.5
    return config
