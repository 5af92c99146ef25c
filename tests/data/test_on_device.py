"""Batches made on the devices: every example once an epoch, cut as Pillow cuts it."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from msvit_jax import data, sharding
from msvit_jax.data import image_files, on_device, pipeline
from msvit_jax.errors import UserError


def take(config, steps, devices=1, **kwargs):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    given = {"batch_size": 48, "seed": 3, "mesh": mesh} | kwargs
    batches = itertools.islice(on_device.train_iterator(config, **given), steps)
    return [jax.device_get(batch) for batch in batches]


@pytest.fixture
def small(config):
    config.train_split = "train[:96]"
    return config


def augmented(config):
    config.update(crop_scale=(0.3, 1.0), flip=True, pad_shift=3, image_size=32)
    return config


def test_without_augmentation_an_epoch_holds_the_splits_own_images(small):
    stored = pipeline.decoded_examples(small)
    for epoch in (take(small, 2), take(small, 2, start_step=2)):
        for key in ("image", "label"):
            ours = np.concatenate([batch[key] for batch in epoch])
            theirs = np.stack([example[key] for example in stored])
            order = lambda x: sorted(row.tobytes() for row in x.astype(np.uint8))  # noqa: E731
            assert order(ours) == order(theirs)


def test_images_keep_their_labels(small):
    stored = pipeline.decoded_examples(small)
    label_of = {e["image"].tobytes(): int(e["label"]) for e in stored}
    (batch,) = take(small, 1)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        assert label_of[image.tobytes()] == label


def test_epochs_and_seeds_differ_in_order(small):
    first, second = take(small, 4)[::2]
    (other,) = take(small, 1, seed=4)
    assert (first["label"] != second["label"]).any()
    assert (first["label"] != other["label"]).any()


def test_resume_equals_uninterrupted_on_any_number_of_devices(small):
    whole = take(augmented(small), 6)
    chex.assert_trees_all_equal(take(small, 2, start_step=4), whole[4:])
    chex.assert_trees_all_equal(take(small, 6, devices=8), whole)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([16, 31, 48]))
def test_crops_are_pillows(seed, size):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
    image = coarse.resize((50, 44), Image.Resampling.BICUBIC)
    left, top = rng.integers(0, 20, 2)
    box = (int(left), int(top), int(left + rng.integers(12, 30)), int(top + rng.integers(12, 24)))
    theirs = image_files.resize_pillow(image, box, size).astype(int)
    ours = np.asarray(on_device.resized_crop(jnp.asarray(image), jnp.float32(box), size)).astype(
        int
    )
    apart = np.abs(ours - theirs)
    assert apart.mean() < 1.5  # at the box's border Pillow repeats what we can see
    reach = -(-2 * size // min(box[2] - box[0], box[3] - box[1])) + 1
    reach = max(reach, 3)
    inside = apart[reach:-reach, reach:-reach]
    assert inside.size == 0 or inside.max() <= 2


def test_shifts_repeat_the_border_and_mirrors_are_exact(small):
    small.update(pad_shift=5, flip=True)
    stored = {e["image"].tobytes() for e in pipeline.decoded_examples(small)}
    (batch,) = take(small, 1)
    inside = [image[5:-5, 5:-5] for image in batch["image"]]
    views = {
        pixels[dy : dy + 54, dx : dx + 54].tobytes()
        for raw in stored
        for image in [np.frombuffer(raw, np.uint8).reshape(64, 64, 3)]
        for pixels in (image, image[:, ::-1])
        for dy in range(11)
        for dx in range(11)
    }
    assert all(image.tobytes() in views for image in inside)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"color_jitter": 0.3}, r"data\.color_jitter=0\.3 .* set it to 0\.0"),
        ({"erasing": 0.5}, r"data\.erasing=0\.5"),
        ({"randaugment.num_ops": 2}, r"data\.randaugment\.num_ops=2"),
    ],
)
def test_what_only_the_processor_makes_is_refused(config, changes, message):
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = config[sections[0]] if sections else config
        section[name] = value
    with pytest.raises(UserError, match=message):
        take(config, 1)


def test_images_of_several_sizes_are_refused(config, monkeypatch):
    shapes = [(8, 8, 3), (8, 9, 3)]
    examples = [{"image": np.zeros(shape, np.uint8), "label": 0} for shape in shapes]
    monkeypatch.setattr(pipeline, "decoded_examples", lambda _: examples)
    with pytest.raises(UserError, match="has 2 sizes"):
        take(config, 1, batch_size=2)


def test_evaluation_batches_are_kept_and_equal(config):
    config.eval_split = "validation[:50]"
    plain = list(data.eval_batches(config, batch_size=32))
    config.on_device = True
    kept = data.eval_batches(config, batch_size=32)
    chex.assert_trees_all_equal(list(kept), plain)
    assert all(a is b for a, b in zip(kept, kept, strict=True))
