"""The segmenter of camvid/seg_small_dinov2.py, trained on as long as those that start from it.

    python train.py --config=configs/camvid/seg_small_dinov2_longer.py \
        --workdir=runs/camvid_longer --config.data.data_dir=data \
        --config.init_from=runs/camvid_dinov2

What it gains is what training alone is worth. Lower resolutions are the same with
--config.data.image_size=280 and --config.data.short_side=280 (400 tokens a window), 308 (484) or
252 (324). Merging: --config.model.reducer=algm (or mergence, tome) with keep or remove, and
--config.model.decode=mixed, so that the decoder, too, has fewer tokens.
Cost: as camvid/seg_small_dinov2.py, after it.
Expect: mIoU 64.3 % on test as it is, 61.2 % at 280 px, 60.7 % with ALGM at 0.55 of the MACs
(docs/results/camvid.md).
"""

from ml_collections import config_dict

from msvit_jax.config import sibling


def get_config() -> config_dict.ConfigDict:
    config = sibling(__file__, "seg_small_dinov2.py")
    config.epochs = 12.0
    config.optimizer.learning_rate = 3e-4
    config.optimizer.encoder_learning_rate = 1e-4
    config.optimizer.warmup_epochs = 1.0
    return config
