"""Mixed scale, then merged: MSViT over DINOv2 ViT-S/14 whose layers merge tokens, on photographs.

    python train.py --config=configs/photos/msvit_mergence_small.py \
        --workdir=runs/photos/msvit_mergence_small --config.data.data_dir=DATA \
        --config.init_from=runs/photos/vit_small

Fine-tuned from photos/vit_small.py. Half of the regions fine (40 tokens), 70 % of the tokens stay
in each of layers 4, 7 and 10.
Cost: as photos/vit_small.py, after it.
Expect: 94.1 % at half of dense's MACs after eight epochs in batches of 128
(docs/results/photos.md).
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "msvit_small.py")
    config.model.reducer = "mergence"
    config.model.keep = 0.7
    config.loss.gate.target = 0.5
    return config
