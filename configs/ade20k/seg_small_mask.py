"""Segmenter Seg-S-Mask/16 (Strudel et al. 2021) on ADE20K: 150 classes, 512 px.

    tfds build scene_parse150 --file_format=array_record --data_dir=data   # needs TensorFlow, once
    python train.py --config=configs/ade20k/seg_small_mask.py --workdir=runs/ade20k \
        --config.data.data_dir=data --config.init_from=vit_small_patch16_384.safetensors

The paper's recipe: SGD, poly, 160,000 steps of 8 crops (64 epochs), scale 0.5 to 2, flip,
photometric distortion; evaluated at a short side of 512 px in windows of 512 px.
Cost: not measured.
Expect: the paper has 45.3 mIoU at one scale; not run by us.
"""

from ml_collections import config_dict

from msvit_jax.config import base


def get_config() -> config_dict.ConfigDict:
    config = base()
    config.model = {"name": "seg_vit_small_mask", "drop_path": 0.1}
    config.data.name = "scene_parse150"
    config.data.target = "segmentation_mask"
    config.data.eval_split = "test"
    config.data.image_size = 512
    config.data.short_side = 512
    config.data.scale_range = (0.5, 2.0)
    config.data.max_class_share = 0.75
    config.data.flip = True
    config.data.photometric = True
    config.data.workers = 8
    config.batch_size = 8
    config.epochs = 64.0
    config.eval_every_epochs = 8.0
    config.optimizer.name = "sgd"
    config.optimizer.schedule = "poly"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.min_learning_rate = 1e-5
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.0
    return config
