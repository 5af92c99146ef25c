"""Segmenter over MSViT on scattered digits, fine-tuned from digits_segmenter.py.

    python train.py --config=configs/digits_msvit_segmenter.py \
        --workdir=runs/digits_msvit_segmenter --config.init_from=runs/digits_segmenter

Fine patches of 8 px, coarse ones of 16 px: 16 regions, 16 to 64 tokens an image. The decoder sees
all 64 cells, with coarse tokens repeated over theirs.
Cost: 2 epochs, 3 to 5 minutes on one CPU core, after the dense run.
The patches of coarse regions keep features of their own (model.unmerge).
Expect: mIoU 81.8 % at 31.8 of 64 tokens, 0.1 below the dense one trained as long; with
model.unmerge=copy 80.7 % (docs/results/masks.md).
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "digits_segmenter.py")
    config.model.encoder = "msvit"
    config.model.unmerge = "residual"
    config.epochs = 2.0
    config.eval_every_epochs = 1.0
    config.optimizer.learning_rate = 1e-3
    config.loss.gate.kind = "gbas"
    config.loss.gate.weight = 4.0
    config.loss.gate.target = 0.32
    return config
