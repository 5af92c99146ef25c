"""MSViT over DINOv2 ViT-S/14 on photographs, fine-tuned from photos/vit_small.py.

    python train.py --config=configs/photos/msvit_small.py \
        --workdir=runs/photos/msvit_small --config.data.data_dir=DATA \
        --config.init_from=runs/photos/vit_small

Patches of 14 and 28 px: 16 regions, 16 to 64 tokens an image, a third of the regions fine: 32
tokens on average. Gates that learn nothing: --config.model.gate=entropy (or random, center) with
--config.loss.gate.kind=none and --config.model.fine_share=0.375.
Cost: as photos/vit_small.py, after it.
Expect: 93.7 % at 32 of 64 tokens, 95.5 at 48 after eight epochs in batches of 128, dense trained as
long 96.1; at 168 px 96.7 at 87 of 144 tokens, dense 97.3 (docs/results/photos.md).
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "vit_small_longer.py")
    config.model.name = "msvit_small_patch14_dinov2"
    config.model.gate_hidden = 96  # half a megabyte, and no worse than the backbone's 384
    config.optimizer.gate_learning_rate = 1e-3
    config.loss.gate.kind = "gbas"
    config.loss.gate.weight = 4.0
    config.loss.gate.target = 1 / 3
    return config
