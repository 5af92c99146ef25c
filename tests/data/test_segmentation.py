"""Images and masks change together; evaluation sees every image once; bad pairs are named."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from msvit_jax import config as configs
from msvit_jax import data
from msvit_jax.data import augment, pipeline, prepare_masks, segmentation, sources
from msvit_jax.errors import UserError
from msvit_jax.segmentation import IGNORED, MaskClasses

CLASSES = MaskClasses(("a", "b", "c"))


def png(array, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG")
    return buffer.getvalue()


def pair(size=(40, 56), seed=0):
    """Large plain squares: the image shows its class, 80 times its number."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 3, (size[0] // 8 + 1, size[1] // 8 + 1), np.uint8)
    mask = mask.repeat(8, axis=0).repeat(8, axis=1)[: size[0], : size[1]]
    image = np.repeat(80 * mask[..., None], 3, axis=2)
    return {"image": png(image), sources.MASK: png(mask), "name": f"pair {seed}"}


def config(**changes):
    made = configs.base().data
    made.target, made.image_size, made.prefetch = "segmentation_mask", 32, 1
    made.update(changes)
    return made


def transform(example, seed=0, **changes):
    made = segmentation.SegmentationTransform.from_config(config(**changes), CLASSES)
    return made.random_map(example, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale_range", [None, (0.5, 2.0)])
@pytest.mark.parametrize(("size", "shape"), [(32, (32, 32)), ((24, 48), (24, 48))])
def test_an_image_and_its_mask_stay_together(seed, scale_range, size, shape):
    how = {"scale_range": scale_range, "flip": True, "pad_shift": 3, "image_size": size}
    made = transform(pair(), seed, **how)
    image, mask = made["image"], made[sources.MASK]
    assert (image.shape, mask.shape) == ((*shape, 3), shape)
    # Away from the edges of squares, where images are interpolated, and from what was filled in.
    same = (image == image[..., :1]).all(axis=2) & (mask != IGNORED)
    shown = image[..., 0].astype(int)
    plain = same & np.isin(shown, (0, 80, 160))
    right = np.rint(shown / 80).astype(int) == mask
    assert plain.sum() > 0.3 * (mask != IGNORED).sum()
    assert right[plain].mean() > 0.97
    assert (image[mask == IGNORED] == augment.MEAN_COLOR).all()


def test_photometric_distortion_leaves_the_mask_alone():
    example = pair()
    plain, changed = (transform(example, photometric=flag) for flag in (False, True))
    np.testing.assert_array_equal(plain[sources.MASK], changed[sources.MASK])
    assert any(
        (transform(example, s, photometric=True)["image"] != plain["image"]).any() for s in range(4)
    )


def test_photometric_distortion_moves_what_it_says():
    pixels = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    seen = np.stack(
        [
            augment.photometric_distortion(pixels, np.random.default_rng(seed))[0, 0].astype(int)
            for seed in range(200)
        ]
    )
    assert seen.std(axis=0).min() > 10
    assert (seen == (200, 100, 50)).all(axis=1).sum() > 3  # one in sixteen
    assert seen.mean() == pytest.approx(pixels.mean(), abs=15)


def test_crops_of_one_class_are_drawn_again():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 48:] = 1
    example = {"image": np.zeros((64, 64, 3), np.uint8), sources.MASK: mask, "name": "x"}

    def shares(most):
        found = [transform(example, s, max_class_share=most)[sources.MASK] for s in range(60)]
        return np.asarray([(m == 0).mean() for m in found])

    assert (shares(1.0) == 1).mean() > 0.3
    assert (shares(0.75) == 1).mean() < 0.1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"mixup": 0.8}, "mixup"),
        ({"cutmix": 1.0}, "cutmix"),
        ({"crop_scale": (0.1, 1.0)}, "crop_scale"),
    ],
)
def test_what_would_part_image_and_mask_is_refused(changes, name):
    with pytest.raises(UserError, match=rf"data\.{name} changes images without their masks"):
        transform(pair(), **changes)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((40, 55), np.uint8), r"pair: its image has 40 x 56 px, its mask 40 x 55"),
        (np.zeros((56, 40), np.uint8), r"EXIF data\? Try data\.exif_orientation=False"),
        (
            np.full((40, 56), 3, np.uint8),
            r"mask of pair: its pixels have the value 3; the 3 classe",
        ),
        (np.eye(40, 56, dtype=np.uint8)[..., None] * [9, 0, 0], r"pixels are colors, not numbers"),
    ],
)
def test_bad_masks_are_named(mask, message):
    bad = {**pair(), sources.MASK: png(mask.astype(np.uint8)), "name": "pair"}
    with pytest.raises(UserError, match=message):
        segmentation.read(bad, CLASSES, True)


def test_masks_that_say_the_same_in_other_ways():
    mask = np.random.default_rng(0).integers(0, 3, (40, 56)).astype(np.uint8)
    indexed = Image.fromarray(mask, "P")
    indexed.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    buffer = io.BytesIO()
    indexed.save(buffer, "PNG")
    ways = (
        png(mask),
        buffer.getvalue(),
        png(np.repeat(mask[..., None], 3, axis=2)),
        png(mask.astype(np.uint16)),
    )
    for encoded in ways:
        _, found = segmentation.read({**pair(), sources.MASK: encoded}, CLASSES, True)
        np.testing.assert_array_equal(found, mask)


def batches_of(examples, rows, **changes):
    made = config(**changes)
    return segmentation.WindowBatches(made, examples, CLASSES, rows, patch_size=4)


@pytest.mark.parametrize("processes", [1, 3])
def test_every_image_is_scored_once_at_its_own_size(processes):
    """A model that reads the class off the color is right everywhere, windows or not."""
    sizes = [(40, 56), (32, 32), (64, 33), (20, 90), (32, 100)]
    examples = [pair(size, seed) for seed, size in enumerate(sizes)]
    parts = [
        batches_of(examples, pipeline.Rows(4, index, processes), window_stride=24)
        for index in range(processes)
    ]
    counts = []
    for part in parts:
        counts.append(0)
        for batch in part:
            counts[-1] += 1
            assert batch["image"].shape == (4, 32, 32, 3)
            patches = batch["image"][..., 0].reshape(4, 8, 4, 8, 4).mean(axis=(2, 4)) / 80
            part.take(batch, -np.abs(patches[..., None] - np.arange(3)).astype(np.float32))
    assert len(set(counts)) == 1
    assert sum(part.images for part in parts) == len(sizes)
    total = sum(part.confusion.counts for part in parts)
    assert total.sum() == sum(height * width for height, width in sizes)
    assert np.trace(total) > 0.8 * total.sum()  # but for edges within a patch


def test_answers_that_are_missing_are_noticed():
    part = batches_of([pair()], pipeline.Rows(4, 0, 1))
    list(part)
    with pytest.raises(ValueError, match="1 images wait"):
        part.result()


# prepare


def write(folder, layout, count=3, suffix="png", change=lambda mask: mask):
    """Writes train and val in one of the layouts."""
    for split in ("train", "val"):
        for index in range(count):
            example = pair(seed=index)
            mask = np.asarray(Image.open(io.BytesIO(example[sources.MASK])))
            files = {
                "folders": (f"{split}/images/{index}.png", f"{split}/masks/{index}.{suffix}"),
                "camvid": (f"{split}/{index}.png", f"{split}annot/{index}.{suffix}"),
            }[layout]
            for place, content in zip(files, (example["image"], change(mask)), strict=True):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, np.ndarray):
                    content = png(content)
                (folder / place).write_bytes(content)


def opened(root, **changes):
    return config(name="mine", data_dir=str(root), train_split="train", eval_split="val", **changes)


@pytest.mark.parametrize("layout", ["folders", "camvid"])
@pytest.mark.parametrize("zipped", [False, True])
def test_folders_of_images_and_masks_become_a_data_set(tmp_path, layout, zipped):
    source = tmp_path / "source"
    write(source, layout)
    if zipped:
        with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
            for file in source.rglob("*.png"):
                archive.write(file, file.relative_to(source).as_posix())
        source = tmp_path / "source.zip"
    assert prepare_masks.holds_masks([str(source)])
    made = prepare_masks.prepare([str(source)], name="mine", data_dir=str(tmp_path / "tfds"))
    assert made.examples == {"train": 3, "val": 3}
    assert made.class_names == ("0", "1", "2")
    info = data.dataset_info(opened(tmp_path / "tfds"))
    assert (info.num_classes, info.has_segmentation, info.train_examples) == (3, True, 3)
    batch = next(data.train_iterator(opened(tmp_path / "tfds"), batch_size=2, seed=0))
    assert {key: (x.shape, x.dtype) for key, x in batch.items()} == {
        "image": ((2, 32, 32, 3), np.uint8),
        sources.MASK: ((2, 32, 32), np.uint8),
    }
    cached = next(data.train_iterator(opened(tmp_path / "tfds", cache=True), batch_size=2, seed=0))
    np.testing.assert_array_equal(cached[sources.MASK], batch[sources.MASK])


def test_a_palette_turns_colors_into_classes(tmp_path):
    palette = np.asarray([[128, 0, 0], [0, 128, 0], [0, 0, 128], [9, 9, 9]], np.uint8)
    write(tmp_path / "source", "camvid", change=lambda mask: palette[np.where(mask == 2, 3, mask)])
    file = tmp_path / "classes.json"
    said = {"classes": ["x", "y", "z", "void"], "ignore_label": 3, "palette": palette.tolist()}
    file.write_text(json.dumps(said))
    options = {"name": "mine", "data_dir": str(tmp_path / "tfds")}
    with pytest.raises(UserError, match="6 of 6 images with masks cannot be used"):
        prepare_masks.prepare([str(tmp_path / "source")], **options)
    made = prepare_masks.prepare([str(tmp_path / "source")], classes=str(file), **options)
    assert made.class_names == ("x", "y", "z")
    batch = next(data.train_iterator(opened(tmp_path / "tfds"), batch_size=3, seed=0))
    assert set(np.unique(batch[sources.MASK])) == {0, 1, IGNORED}
    file.write_text(json.dumps({**said, "palette": palette[:1].tolist()}))
    with pytest.raises(UserError, match=r"its color \(\d+, \d+, \d+\) is not in the palette"):
        prepare_masks.prepare(
            [str(tmp_path / "source")], classes=str(file), **options | {"name": "m"}
        )


def test_what_cannot_be_paired_is_named(tmp_path):
    write(tmp_path / "source", "folders")
    (tmp_path / "source/val/masks/1.png").unlink()
    options = {"name": "mine", "data_dir": str(tmp_path / "tfds")}
    with pytest.raises(UserError, match=r"1 files have no mask .* val/images/1\.png"):
        prepare_masks.prepare([str(tmp_path / "source")], **options)
    (tmp_path / "source/val/masks/1.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    with pytest.raises(UserError, match=r"val/masks/1\.png: it has 8 x 8 px, its image 40 x 56"):
        prepare_masks.prepare([str(tmp_path / "source")], **options)
    made = prepare_masks.prepare([str(tmp_path / "source")], on_error="skip", **options)
    assert made.examples == {"train": 3, "val": 2}
    assert len(made.skipped) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not valid"),
        ('{"names": []}', "KeyError"),
        ('{"classes": ["a", "b"], "ignore_label": 0}', "ignored value 0 is a class's"),
        ('{"classes": ["a"], "palette": [[0, 0]]}', "is not valid"),
    ],
)
def test_a_file_of_classes_that_says_too_little(tmp_path, text, message):
    file = tmp_path / "classes.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        prepare_masks.read_classes(str(file))
    with pytest.raises(UserError, match="does not exist"):
        prepare_masks.read_classes(str(tmp_path / "none.json"))


def test_classes_that_nobody_tells(tmp_path):
    from tests import tiny_run

    made = config(name="tiny", data_dir=tiny_run.data_dir())
    with pytest.raises(UserError, match="cannot be used for segmentation: it needs a feature"):
        data.class_names(made)
    write(tmp_path / "source", "folders")
    prepare_masks.prepare([str(tmp_path / "source")], name="mine", data_dir=str(tmp_path / "tfds"))
    assert data.class_names(opened(tmp_path / "tfds", mask_classes=5)) == ("0", "1", "2", "3", "4")
    with pytest.raises(UserError, match="ignored value 1 is a class's"):
        data.class_names(opened(tmp_path / "tfds", ignore_label=1))
