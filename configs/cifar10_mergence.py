"""Token Mergence on CIFAR-10, fine-tuned from the dense ViT of cifar10_vit.py.

    python train.py --config=configs/cifar10_mergence.py --workdir=runs/cifar10_mergence \
        --config.init_from=runs/cifar10_vit

Features of 2 px patches beside those of 4 px; 70 % of the patch tokens stay in each of layers 3, 5
and 7 of 9. The recipe is ours, after EViT's. From scratch instead: leave init_from out, take the
epochs and learning rate of cifar10_vit.py, and let the keep rate fall, e.g.
--config.keep_rate.hold_epochs=10 --config.keep_rate.epochs=60.
Cost: as cifar10_vit.py for each epoch.
Expect: 74.5 % at 0.65 of dense's MACs after ten epochs from that config's shortened run of 75.1 %;
dense trained as long 75.8.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "cifar10_vit.py")
    config.model.name = "mergence"
    config.model.scales = (2, 4)
    config.model.reducer = "mergence"
    config.model.keep = 0.7
    config.epochs = 20.0
    config.eval_every_epochs = 1.0
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_epochs = 1.0
    return config
