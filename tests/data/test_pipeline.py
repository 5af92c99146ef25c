"""The promises of the pipeline: same batches anywhere, exact resume, exact evaluation sets."""

import itertools

import chex
import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msvit_jax import config as configs
from msvit_jax import data
from msvit_jax.data import pipeline, sources
from msvit_jax.errors import UserError


def take(config, steps, **kwargs):
    arguments = {"batch_size": 48, "seed": 3, "process_index": 0, "process_count": 1} | kwargs
    return list(itertools.islice(data.train_iterator(config, **arguments), steps))


def heavy(config):
    """Every augmentation that draws random numbers."""
    config.update(crop_scale=(0.3, 1.0), flip=True, pad_shift=3, color_jitter=0.3, erasing=0.5)
    config.randaugment.num_ops = 2
    config.image_size = 32
    return config


def test_batches_have_the_promised_form(config):
    (batch,) = take(config, 1)
    chex.assert_shape(batch["image"], (48, 64, 64, 3))
    chex.assert_shape(batch["label"], (48,))
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("cache", [False, True])
def test_processes_hold_consecutive_rows_of_the_same_global_batch(config, count, cache):
    heavy(config).cache = cache
    whole = take(config, 9)  # crosses the end of the first epoch
    parts = [take(config, 9, process_index=p, process_count=count) for p in range(count)]
    joined = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *each) for each in zip(*parts, strict=True)
    ]
    chex.assert_trees_all_equal(joined, whole)


def test_resume_equals_uninterrupted(config):
    heavy(config)
    chex.assert_trees_all_equal(take(config, 4, start_step=6), take(config, 10)[6:])


def test_cache_changes_nothing(config):
    config.update(pad_shift=4, flip=True)
    plain = take(config, 3)
    config.cache = True
    chex.assert_trees_all_equal(take(config, 3), plain)


@pytest.mark.slow
def test_worker_processes_change_nothing(config):
    plain = take(heavy(config), 3)
    config.workers = 2
    chex.assert_trees_all_equal(take(config, 3), plain)


def test_seed_decides_and_epochs_differ(config):
    first, second = take(config, 2, batch_size=320)
    assert (np.bincount(first["label"]) == np.bincount(second["label"])).all()
    assert (first["label"] != second["label"]).any()
    (other,) = take(config, 1, batch_size=320, seed=4)
    assert (first["label"] != other["label"]).any()


def test_an_epoch_holds_every_example_once(config):
    (epoch,) = take(config, 1, batch_size=320)
    builder = sources.open_dataset(config.name, config.data_dir)
    stored = [
        pipeline.center_crop(example, 64, 1.0).tobytes()
        for example in sources.open_split(builder, "train").in_order()
    ]
    assert sorted(image.tobytes() for image in epoch["image"]) == sorted(stored)


class Numbered:
    """`count` tiny examples whose label is their index."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = np.full((8, 8, 3), index % 251, np.uint8)
        return {"image": pixels, "label": index, "index": index, "name": "a test"}


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 7), st.sampled_from([1, 2, 3]))
def test_evaluation_covers_each_example_once(examples, local, count):
    config = configs.base().data
    config.update(image_size=8, prefetch=0)
    parts = [
        pipeline.EvalBatches(config, Numbered(examples), pipeline.Rows(local, p, count))
        for p in range(count)
    ]
    runs = [list(part) for part in parts]
    assert {len(run) for run in runs} == {len(parts[0])}
    assert all(batch["label"].shape == (local,) for run in runs for batch in run)
    # Process by process within each step: the global order.
    ordered = [batch for step in zip(*runs, strict=True) for batch in step]
    labels = np.concatenate([batch["label"] for batch in ordered])
    valid = np.concatenate([batch["valid"] for batch in ordered])
    np.testing.assert_array_equal(labels[valid], np.arange(examples))
    np.testing.assert_array_equal(valid, np.arange(len(valid)) < examples)
    images = np.concatenate([batch["image"] for batch in ordered])
    assert not images[~valid].any()


def test_evaluation_repeats_and_carries_masks(config):
    batches = data.eval_batches(config, batch_size=64, process_index=0, process_count=1)
    first, second = list(batches), list(batches)
    chex.assert_trees_all_equal(first, second)
    assert len(batches) == len(first) == 2
    assert sum(batch["valid"].sum() for batch in first) == 100
    mask = first[0]["segmentation_mask"]
    chex.assert_shape(mask, (64, 64, 64))
    assert set(np.unique(mask)) == {0, 1}
    # The picture is bright where the mask says so: both went through the same geometry.
    assert first[0]["image"][mask == 1].mean() > 190
    assert first[0]["image"][mask == 0][first[0]["image"][mask == 0].sum(-1) > 0].mean() < 100


def test_mask_follows_the_image_through_resize_and_crop(config):
    config.update(image_size=40, eval_crop=0.75)
    batch = next(iter(data.eval_batches(config, batch_size=100)))
    bright = batch["image"].min(-1) > 165
    inside = batch["segmentation_mask"] == 1
    overlap = (bright & inside).sum() / (bright | inside).sum()
    assert overlap > 0.75


def test_dataset_info(config):
    assert data.dataset_info(config) == data.DatasetInfo(
        name="scattered_digits/tiny",
        num_classes=10,
        class_names=tuple("0123456789"),
        train_examples=320,
        eval_examples=100,
        has_segmentation=True,
    )


def test_classes_of_a_data_set_are_known_where_it_is(config, tmp_path):
    sources.open_dataset(config.name, config.data_dir)  # prepares it
    assert sources.prepared_classes(config.name, config.data_dir) == 10
    assert sources.prepared_classes(config.name, str(tmp_path)) is None


def test_device_batches_start_early_and_keep_the_order():
    started = []

    def put(batch):
        started.append(batch["n"])
        return batch["n"] * 10

    ahead = data.device_batches(({"n": n} for n in range(5)), put, depth=2)
    assert next(ahead) == 0
    assert started == [0, 1, 2]
    assert list(ahead) == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_split": "training"}, r"no split 'training'; it has train, validation"),
        ({"resize": "nearest"}, r"data\.resize='nearest'"),
        ({"cache": True, "workers": 2}, r"data\.workers to 0"),
    ],
)
def test_bad_settings_are_named(config, change, message):
    config.update(change)
    with pytest.raises(UserError, match=message):
        take(config, 1)


def test_a_batch_that_cannot_be_divided_is_named(config):
    with pytest.raises(UserError, match=r"batch_size 48 .* 5 processes"):
        take(config, 1, process_count=5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(config, workers):
    config.update(workers=workers, crop_scale=(0.5, 1.0))
    examples = [
        {"image": b"\x89PNG broken", "label": 0, "name": "data set 'x', example 7 (id 'a')"}
    ]
    batches = pipeline.train_batches(examples, config, pipeline.Rows(1, 0, 1), seed=0)
    with pytest.raises(
        Exception, match=r"Cannot read the image of data set 'x', example 7"
    ) as info:
        next(batches)
    if not workers:
        assert isinstance(info.value, UserError)


def test_batches_are_those_of_plain_grain(config):
    """The shuffle is Grain's own: an index-level check independent of the augmentation."""
    expected = grain.MapDataset.range(320).seed(3).shuffle().repeat()
    builder = sources.open_dataset(config.name, config.data_dir)
    examples = sources.open_split(builder, "train")
    labels = [examples[expected[position]]["label"] for position in range(96)]
    got = np.concatenate([batch["label"] for batch in take(config, 2)])
    np.testing.assert_array_equal(got, labels)
