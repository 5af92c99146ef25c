"""Data sets, augmentation and the input pipeline."""

from msvit_jax.data.pipeline import (
    dataset_info,
    default_config,
    device_batches,
    eval_batches,
    train_iterator,
)
from msvit_jax.data.sources import DatasetInfo, open_dataset

__all__ = [
    "DatasetInfo",
    "dataset_info",
    "default_config",
    "device_batches",
    "eval_batches",
    "open_dataset",
    "train_iterator",
]
