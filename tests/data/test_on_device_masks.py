"""Crops that are made on the devices move images and masks together, as Pillow would."""

import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from msvit_jax import config as configs
from msvit_jax import sharding
from msvit_jax.data import augment, on_device, on_device_masks, pipeline, sources
from msvit_jax.errors import UserError
from msvit_jax.segmentation import IGNORED

SIZE = (40, 56)


def config(**changes):
    made = configs.base().data
    made.target, made.image_size = "segmentation_mask", 32
    made.update(changes)
    return made


def examples(count=6):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC))
        mask = rng.integers(0, 5, SIZE, dtype=np.uint8)
        found.append({"image": image, sources.MASK: mask})
    return found


def _clear(old, new, first, count):
    """Tells which pixels have a nearest one: Pillow rounds centers between two either way."""
    return (2 * np.arange(first, first + count) + 1) * old % (2 * new) != 0


@pytest.mark.parametrize("short_side", [None, 25, 50])
@pytest.mark.parametrize("size", [(32, 32), (24, 44)])
def test_crops_are_those_of_the_scaled_image(short_side, size):
    pairs = examples(8)
    how = config(short_side=short_side, scale_range=(0.5, 2.0), flip=True, image_size=size)
    drawn = on_device_masks.draw(how, np.random.default_rng(1), len(pairs), *SIZE)
    images, masks = (np.stack([p[key] for p in pairs]) for key in ("image", sources.MASK))
    made = jax.device_get(on_device_masks.cut(images, masks, *drawn, size))
    for row, ((height, width), (top, left), flip) in enumerate(zip(*drawn, strict=True)):
        whole = Image.fromarray(images[row]).resize((width, height), Image.Resampling.BILINEAR)
        classes = Image.fromarray(masks[row]).resize((width, height), Image.Resampling.NEAREST)
        cut = (slice(top, top + size[0]), slice(left, left + size[1]))
        theirs, answers = np.asarray(whole)[cut], np.asarray(classes)[cut]
        assert answers.shape == (min(size[0], height), min(size[1], width))
        ours, mask = (made[key][row] for key in ("image", sources.MASK))
        if flip:
            ours, mask = ours[:, ::-1], mask[:, ::-1]
        filled = tuple(slice(0, side) for side in answers.shape)
        assert np.abs(ours[filled].astype(int) - theirs).max() <= 1
        clear = np.ix_(
            *(
                _clear(old, new, first, side)
                for old, new, first, side in zip(
                    SIZE, (height, width), (top, left), answers.shape, strict=True
                )
            )
        )
        np.testing.assert_array_equal(mask[filled][clear], answers[clear])
        beyond = np.ones(size, bool)
        beyond[filled] = False
        assert (mask[beyond] == IGNORED).all()
        assert (ours[beyond] == augment.MEAN_COLOR).all()


def test_draws_stay_in_their_range_and_inside_the_image():
    how = config(scale_range=(0.5, 2.0), short_side=80, flip=True)
    scaled, corners, flips = on_device_masks.draw(how, np.random.default_rng(0), 500, *SIZE)
    assert 40 <= scaled[:, 0].min() < 45
    assert 155 < scaled[:, 0].max() <= 160
    assert (corners >= 0).all()
    assert (corners + 32 <= np.maximum(scaled, 32)).all()
    assert 200 < flips.sum() < 300


def test_an_epoch_holds_every_image_with_its_mask(monkeypatch):
    pairs = examples()
    monkeypatch.setattr(pipeline, "decoded_examples", lambda _: pairs)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    given = {"batch_size": 3, "seed": 0, "mesh": mesh}
    batches = itertools.islice(on_device.train_iterator(config(image_size=64), **given), 2)
    found = set()
    for batch in map(jax.device_get, batches):
        for image, mask in zip(batch["image"], batch[sources.MASK], strict=True):
            found.add((image[:40, :56].tobytes(), mask[:40, :56].tobytes()))
    assert found == {(p["image"].tobytes(), p[sources.MASK].tobytes()) for p in pairs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"photometric": True}, r"data\.photometric=True .* set it to False"),
        ({"max_class_share": 0.75}, r"data\.max_class_share=0\.75"),
        ({"mixup": 0.2}, r"data\.mixup changes images without their masks"),
    ],
)
def test_what_the_devices_do_not_make_is_refused(changes, message):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match=message):
        next(on_device.train_iterator(config(**changes), batch_size=1, seed=0, mesh=mesh))
