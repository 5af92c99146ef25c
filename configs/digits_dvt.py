"""DVT on scattered digits, fine-tuned from the dense ViT of digits_vit.py: 25 or 64 tokens.

    python train.py --config=configs/digits_dvt.py --workdir=runs/digits_dvt \
        --config.init_from=runs/digits_vit

Two stages of that backbone, at 64 px on grids of 5 and 8, trained together, both reuses. Channels
of the reused features are an eighth of a token's, as in DeiT-S.
Cost: 6 epochs, about 15 minutes on one CPU core, after the dense run.
Expect: top-1 of the exits 95.45 and 98.15 % with seed 0, 94.85 and 98.10 with seed 1, 95.35 and
97.70 with seed 2 (docs/results/dvt.md). The last step's: use --which=latest.
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "digits_vit.py")
    config.model = {
        "name": "dvt",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "image_size": 64,
        "grid_sizes": (5, 8),
        "width": 64,
        "depth": 4,
        "heads": 4,
        "pos_init": "sincos",
        "feature_width": 8,
        "feature_hidden": 32,
    }
    config.epochs = 6.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 0.25
    config.eval_every_epochs = 1.0
    return config
