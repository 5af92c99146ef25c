"""Every config key with its default and its unit: what the files in `configs/` build on."""

from typing import Any

from msvit_jax import extras

with extras.needed("train"):
    from ml_collections import config_dict


def make(gate_loss: dict[str, Any]) -> config_dict.ConfigDict:
    """Returns every key with its default; the units are in the comments.

    Args:
      gate_loss: Attributes of `losses.GateLoss` with their defaults.
    """
    optional = config_dict.placeholder
    config = config_dict.ConfigDict()
    config.seed = 0
    # name: one of msvit_jax.list_models(); every other key overrides an attribute of that model.
    config.model = {"name": "vit_tiny_patch16_224"}
    config.dtype = "float32"  # dtype of the computation; parameters are always float32
    config.data = {
        "name": "scattered_digits",  # TFDS name[/config][:version]
        "data_dir": "",  # empty: TFDS_DATA_DIR, or ~/tensorflow_datasets
        "train_split": "train",
        "eval_split": "validation",
        # how class names of the data and of a model must match: "exactly" (else an error),
        # "by_name" (same names in any order, mapped by name), "by_number" (names are ignored)
        "match_classes": "exactly",
        "target": "label",  # what is learned: "label" or "segmentation_mask"
        "mask_classes": optional(int),  # number of classes of masks; None: as the data set says
        "ignore_label": optional(int),  # value of mask pixels without a class; None: the same
        # pixels, one number or (height, width); for masks the size of crops and of windows
        "image_size": config_dict.FieldReference(64, field_type=object),
        "short_side": optional(int),  # pixels images are resized to, with masks; None: their own
        "scale_range": None,  # (least, greatest) factor of that size in training, with masks
        "max_class_share": 1.0,  # crops of which one class covers more are drawn again
        "photometric": False,  # random brightness, contrast, saturation and hue, with masks
        "window_stride": None,  # pixels between windows, or (down, across); None: image_size
        "eval_scales": (1.0,),  # sizes images are looked at in, with masks
        "eval_flip": False,  # look at mirrored images, too, with masks
        "crop_scale": None,  # (least, greatest) share of the area; None: center crop
        "crop_ratio": (3 / 4, 4 / 3),
        "resize": "pillow",  # or "opencv" for random crops: faster, not antialiased
        # Rotate upright, as viewers do; False: as stored, as in published ImageNet pipelines.
        "exif_orientation": True,
        "flip": False,
        "pad_shift": 0,  # pixels
        "randaugment": {"num_ops": 0, "magnitude": 9.0, "std": 0.5},
        "color_jitter": 0.0,
        "erasing": 0.0,  # probability
        "eval_crop": 1.0,  # share of the short side
        "mixup": 0.0,
        "cutmix": 0.0,
        "mix_prob": 1.0,
        "mix_switch_prob": 0.5,
        "workers": 0,  # decoding processes; 0: threads of this process
        "prefetch": 4,  # batches made in advance
        "cache": False,  # keep decoded images in memory
        # keep the training split on the devices and cut images there: for small data sets whose
        # images have one size; evaluation images stay in memory
        "on_device": False,
    }
    config.batch_size = 128  # global, images per optimizer step
    config.eval_batch_size = optional(int)  # None: batch_size
    config.epochs = 10.0
    config.steps = optional(int)  # step to stop at, within `epochs`; a later run can go on
    config.eval_every_epochs = 1.0
    config.log_every_steps = 50
    config.terminal = "lines"  # one line per report, or "bar": a progress bar alone
    config.log_images = 8  # token maps drawn for TensorBoard at each evaluation
    config.init_from = ""  # another run's workdir, or a weights file
    config.ema_decay = 0.0  # 0: no moving average of the parameters
    config.optimizer = {
        "name": "adamw",  # or "sgd", with momentum
        "schedule": "cosine",  # way to min_learning_rate, or "poly"
        "power": 0.9,  # exponent of "poly"
        "momentum": 0.9,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-5,
        "warmup_epochs": 0.0,
        "cooldown_epochs": 0.0,  # last ones of `epochs`, at min_learning_rate
        "weight_decay": 0.05,
        "b1": 0.9,
        "b2": 0.999,
        "layer_decay": 1.0,  # factor per layer counted from the head down
        "clip_norm": 1.0,  # for backbone, gate and priors each; 0: no clipping
        "accum_steps": 1,  # microbatches that a batch is computed in
        "gate_learning_rate": optional(float),  # None: learning_rate
        "encoder_learning_rate": optional(float),  # all but gate, head and decoder; None: the same
        "freeze": (),  # regexes, matched from the start of paths like backbone/blocks_0/attn/...
    }
    # for the model's layout "trimmed", where model.token_capacity is not given
    config.capacity = {
        "num_buckets": 8,  # length buckets of a device's share of the batch, each with a capacity
        "alternatives": 0.25,  # capacity for regions' alternatives, as a share of the grid's tokens
        "alternatives_every": 4,  # steps, one of which carries alternatives, with their gradient
        "every_steps": 200,  # steps between changes to smaller capacities; to larger ones, 1/8
        "min_saving": 0.08,  # least share of capacity that new ones must save to be compiled
        "max_overflow": 0.02,  # share of images that do not fit above which capacities grow
        "max_recompiles": 8,  # changes of capacities in a run, each a compilation; then all tokens
    }
    # for the keep rate of models that reduce tokens, in training from scratch
    config.keep_rate = {
        "hold_epochs": 0.0,  # epochs with all tokens
        "epochs": 0.0,  # epochs in which the keep rate then falls to the model's; 0: no schedule
        "num_rates": 5,  # different rates on the way, each a compilation
    }
    config.loss = {
        "label_smoothing": 0.0,
        # correction: share of the way that the gate's bias moves, every step, to the value at which
        # the batch has exactly the target's share of fine regions; 0: only the loss asks for it, as
        # in the papers
        "gate": {"weight": 1.0, "correction": 0.1, **gate_loss},
        "distillation": {
            "teacher": "",  # a workdir, or a weights file together with `model`
            "model": "",  # the teacher's registry name, for a weights file
            "weight": 0.5,
            "temperature": 1.0,
            "kind": "soft",
        },
        # for a cascade: weight with which earlier exits learn from the last instead of the labels
        "exits": {"distillation": 0.0, "temperature": 1.0},
    }
    config.mesh = {"data": -1, "fsdp": 1}  # devices per axis; -1: all that remain
    config.checkpoint = {"keep_latest": 2, "every_steps": 0}  # 0: after evaluations only
    return config
