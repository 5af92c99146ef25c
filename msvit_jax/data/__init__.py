"""Data sets, augmentation and the input pipeline."""

from msvit_jax import extras

with extras.needed("data"):
    from msvit_jax.data.pipeline import (
        class_names,
        dataset_info,
        device_batches,
        eval_batches,
        train_iterator,
    )
    from msvit_jax.data.sources import DatasetInfo, open_dataset

__all__ = [
    "DatasetInfo",
    "class_names",
    "dataset_info",
    "device_batches",
    "eval_batches",
    "open_dataset",
    "train_iterator",
]
