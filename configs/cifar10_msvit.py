"""MSViT on CIFAR-10, fine-tuned from the dense ViT of cifar10_vit.py.

    python train.py --config=configs/cifar10_msvit.py --workdir=runs/cifar10_msvit \
        --config.init_from=runs/cifar10_vit

Fine patches of 4 px, coarse ones of 8 px: 16 regions, 16 to 64 tokens an image. The recipe is ours.
Cost: as cifar10_vit.py for each epoch.
Expect: 72.9 % at 39.6 of 64 tokens after ten epochs from that config's shortened run of 75.1 %;
dense trained as long 75.8.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "cifar10_vit.py")
    config.model.name = "msvit"
    config.epochs = 20.0
    config.eval_every_epochs = 1.0
    config.optimizer.learning_rate = 1e-4
    config.optimizer.gate_learning_rate = 1e-3
    config.optimizer.warmup_epochs = 1.0
    config.loss.gate.kind = "gbas"
    config.loss.gate.weight = 4.0
    config.loss.gate.target = 0.5
    return config
