"""Bad images end in one message that names them; good ones come out as they went in."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from msvit_jax.errors import UserError
from msvit_jax.inference.images import Reading, find_files, find_unreadable, open_images

SIZE = 8


def _open(images):
    return open_images(images, Reading(SIZE))


def _bytes(count, size=SIZE, channels=3):
    shape = (count, size, size, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _all(source, size=2):
    numbers, images = zip(*source.chunks(size), strict=True)
    assert [n for part in numbers for n in part] == list(range(source.count))
    return np.concatenate(images)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.float16])
@pytest.mark.parametrize(
    "kind", [np.asarray, list, tuple, jnp.asarray, lambda x: list(map(jnp.asarray, x))]
)
def test_arrays_of_any_kind(dtype, kind):
    images = _bytes(5).astype(dtype)
    read = _all(_open(kind(images)))
    assert read.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    np.testing.assert_array_equal(read, images)


def test_bfloat16_becomes_float32():
    assert _all(_open(jnp.ones((3, SIZE, SIZE, 3), jnp.bfloat16))).dtype == np.float32


def test_files_are_cut_and_resized(tmp_path):
    pixels = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    pixels[:, SIZE : 2 * SIZE] = _bytes(1)[0]
    paths = [tmp_path / "a.png", str(tmp_path / "b.png")]
    for path in paths:
        Image.fromarray(pixels).save(path)
    for images in (_all(_open(paths)), _all(_open(paths[0])), _all(_open(paths[1]))):
        for image in images:
            np.testing.assert_array_equal(image, _bytes(1)[0])


def _with_nan(indices):
    images = np.zeros((12, SIZE, SIZE, 3), np.float32)
    images[indices, 0, 0, 0] = np.nan
    return images


BAD = [
    ([], "no images"),
    (np.zeros((0, SIZE, SIZE, 3), np.uint8), "no images"),
    (_bytes(1)[0], r"\[N, H, W, 3\], not \(8, 8, 3\).*images\[None\]"),
    (_bytes(2, channels=1), r"must be \[H, W, 3\], not \(8, 8, 1\).*convert"),
    ([_bytes(1)[0], _bytes(1, channels=4)[0]], r"not \(8, 8, 4\)"),
    (_bytes(2, size=10), r"Images of 10 x 10 px; the model takes 8 x 8.*resize\(\(8, 8\)\)"),
    (
        [_bytes(1)[0], _bytes(1, 12)[0], _bytes(1, 9)[0]],
        "mixed sizes: 8 x 8, 9 x 9, 12 x 12 px.*resize",
    ),
    (_with_nan([3]), "image 3 has them"),
    (_with_nan([1, 4, 11]), r"3 images \(1, 4, 11\) have them"),
    (_with_nan(slice(None)), r"12 images \(0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"),
    (list(_with_nan([2])), "image 2 has them"),
    (np.full((2, SIZE, SIZE, 3), np.inf), "infinite pixels"),
    (_bytes(2).astype(np.int32), "type int32; give uint8"),
    ([_bytes(1)[0], _bytes(1)[0].astype(np.float32)], "mixes uint8 images with normalized float"),
    (["a.png", _bytes(1)[0]], "both paths and arrays"),
    ("nowhere/x.png", "no image file 'nowhere/x.png'"),
    ([(_bytes(1)[0], 3), (_bytes(1)[0], 5)], "tuples, as data sets of images and labels do"),
    ([[_bytes(1)[0], np.int64(3)]], "lists, as data sets of images and labels do"),
    ([{"image": _bytes(1)[0]}], r"an array \[H, W, 3\], not a dict"),
    ([[[1, 2], [3]]], r"an array \[H, W, 3\], not a list"),
    (7, "not a int"),
    (None, "not a NoneType"),
    (np.zeros((2, 3, SIZE, SIZE), np.uint8), "move the channels to the end"),
    (
        _bytes(2).astype(np.float32),
        r"must be normalized: .* within 2\.6.* values of 0 to 255; give",
    ),
    (list(_bytes(2).astype(np.float64)), "must be normalized"),
]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.field(27, 29)
@pytest.mark.parametrize(("images", "message"), BAD)
def test_bad_images_end_in_a_message(images, message):
    with pytest.raises(UserError, match=message):
        open_images(images, Reading(SIZE, **IMAGENET))


def test_floats_of_0_to_1_are_hinted_at():
    with pytest.warns(UserWarning, match=r"within 0 and 1, .* \(pixels / 255 - model.mean\)"):
        open_images(_bytes(3) / 255, Reading(SIZE, **IMAGENET))


def test_normalized_floats_are_taken_as_they_are():
    pixels = _bytes(3) / 255
    for images in ((pixels - IMAGENET["mean"]) / IMAGENET["std"], np.zeros((2, SIZE, SIZE, 3))):
        read = _all(open_images(images, Reading(SIZE, **IMAGENET)))
        np.testing.assert_array_equal(read, images.astype(np.float32))


def test_a_damaged_file_is_named_when_it_is_read(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    source = _open([tmp_path / "bad.png"])
    with pytest.raises(UserError, match=r"bad\.png' cannot be read: it is no image"):
        _all(source)


def test_bad_files_are_skipped_where_asked_for(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(_bytes(1)[0]).save(good)
    bad.write_bytes(b"no image")
    paths = [bad, good, tmp_path / "gone.png", good, bad, bad]
    source = open_images(paths, Reading(SIZE, on_error="skip"))
    chunks = [(list(numbers), images.shape) for numbers, images in source.chunks(2)]
    assert chunks == [([1], (1, SIZE, SIZE, 3)), ([3], (1, SIZE, SIZE, 3))]
    assert sorted(source.failed) == [0, 2, 4, 5]
    assert source.failed[2] == "No such file or directory"
    assert find_unreadable(paths, Reading(SIZE)) == {
        bad: "it is no image, or of a format that is not read here",
        tmp_path / "gone.png": "No such file or directory",
    }
    with pytest.raises(UserError, match="on_error='ignore' is not one of stop, skip"):
        open_images(paths, Reading(SIZE, on_error="ignore"))


def test_files_folders_and_globs(tmp_path, monkeypatch):
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = lambda *patterns: [  # noqa: E731
        str(p.relative_to(tmp_path) if p.is_absolute() else p) for p in find_files(patterns).files
    ]
    assert names(str(tmp_path)) == ["a.JPG", "b.png", "sub/c.webp"]
    assert names(f"{tmp_path}/*/*.txt") == ["sub/notes.txt"]
    assert names(f"{tmp_path}/b.png", str(tmp_path)) == ["b.png", "a.JPG", "sub/c.webp"]
    monkeypatch.chdir(tmp_path)
    assert names("**/*.webp") == ["sub/c.webp"]
    assert find_files([]).files == []
    for nothing in ("none.png", "*.gif", str(tmp_path / "sub" / "none")):
        with pytest.raises(UserError, match="is no file, no folder"):
            find_files([nothing])
    assert isinstance(find_files(["b.png"]).files[0], pathlib.Path)
