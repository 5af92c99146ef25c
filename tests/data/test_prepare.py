"""Making data sets of one's own images, and opening data sets by name: results and messages."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from msvit_jax import config as configs
from msvit_jax import data
from msvit_jax.data import image_files, prepare, source_files, sources
from msvit_jax.errors import UserError


def picture(seed, fmt="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


@pytest.fixture
def files():
    """split/class/file -> bytes: three encodings, two splits, two classes."""
    made = {}
    for split, count in (("train", 3), ("validation", 2)):
        for label, word in enumerate(("cat", "dog")):
            for index, (ending, fmt) in enumerate(
                [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
            ):
                if index < count:
                    made[f"{split}/{word}/{index}.{ending}"] = picture(10 * label + index, fmt)
    return made


@pytest.fixture
def folder(tmp_path, files):
    for path, content in files.items():
        place = tmp_path / "source" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    (tmp_path / "source" / ".DS_Store").write_bytes(b"no image")
    return tmp_path / "source"


def records(made, split):
    builder = tfds.builder_from_directory(made.folder)
    return list(sources.open_split(builder, split).source)


def test_keeps_the_original_bytes_and_names(folder, files, tmp_path):
    made = prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path / "sets"))
    assert made.examples == {"train": 6, "validation": 4}
    assert made.class_names == ("cat", "dog")
    stored = {
        record["file_name"].decode(): (record["image"], record["label"])
        for split in made.examples
        for record in (
            sources.open_split(tfds.builder_from_directory(made.folder), split).source[i]
            for i in range(made.examples[split])
        )
    }
    expected = {path: (content, int("dog" in path)) for path, content in files.items()}
    assert stored == expected


def test_is_used_by_its_name(folder, tmp_path):
    prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path))
    config = configs.base().data
    config.update(name="pets", data_dir=str(tmp_path), image_size=8, crop_scale=(0.3, 1.0))
    assert data.dataset_info(config).class_names == ("cat", "dog")
    batch = next(data.train_iterator(config, batch_size=4, seed=0))
    assert batch["image"].shape == (4, 8, 8, 3)
    (only,) = data.eval_batches(config, batch_size=8)
    assert only["valid"].sum() == 4
    assert sources.MASK not in only


def test_zip_archives_one_per_split_give_the_same_as_the_folder(folder, files, tmp_path):
    archives = []
    for split in ("train", "validation"):
        archives.append(str(tmp_path / f"{split}.zip"))
        with zipfile.ZipFile(archives[-1], "w") as archive:
            for path, content in files.items():
                if path.startswith(split):
                    archive.writestr(path, content)
            archive.writestr("__MACOSX/train/cat/._0.jpg", b"no image")
    zipped = prepare.prepare(archives, name="pets", data_dir=str(tmp_path / "a"))
    plain = prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path / "b"))
    for path in plain.folder.iterdir():
        assert path.read_bytes() == (zipped.folder / path.name).read_bytes()


@pytest.fixture
def damaged(folder):
    jpeg = folder / "train/cat/0.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-60])
    (folder / "train/dog/notes.txt").write_text("no image")
    return folder


def test_stops_at_unreadable_files_naming_all_and_leaving_nothing(damaged, tmp_path):
    sets = tmp_path / "sets"
    with pytest.raises(UserError) as info:
        prepare.prepare([str(damaged)], name="pets", data_dir=str(sets))
    message = str(info.value)
    assert "2 of 11 files" in message
    assert "train/cat/0.jpg: image file is truncated" in message
    assert "train/dog/notes.txt: it is no image" in message
    assert "--on_error=skip" in message
    assert not sets.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_skips_and_counts_when_told_to(damaged, tmp_path, workers):
    made = prepare.prepare(
        [str(damaged)], name="pets", data_dir=str(tmp_path), on_error="skip", workers=workers
    )
    assert made.examples == {"train": 5, "validation": 4}
    assert {bad.file.path for bad in made.skipped} == {"train/cat/0.jpg", "train/dog/notes.txt"}


def test_a_failure_while_writing_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def fail(self):
        raise OSError("the disk went away")

    monkeypatch.setattr(prepare, "find_unreadable", lambda files, workers: [])
    monkeypatch.setattr(prepare.SourceFile, "read", fail)
    with pytest.raises(OSError, match="the disk went away"):
        prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path / "sets"))
    assert list((tmp_path / "sets").iterdir()) == []


def test_wrong_sources_are_named(folder, tmp_path):
    def message(source, name="pets"):
        with pytest.raises(UserError) as info:
            prepare.prepare([str(source)], name=name, data_dir=str(tmp_path / "sets"))
        return str(info.value)

    assert "nowhere does not exist" in message(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no files. Expected split/class/file" in message(tmp_path / "empty")
    (tmp_path / "text.zip").write_text("no archive")
    assert "neither a folder nor a zip archive" in message(tmp_path / "text.zip")
    assert "cannot be a data set's name" in message(folder, name="My Pets")
    (folder / "train/stray.jpg").write_bytes(picture(0))
    assert "the first is train/stray.jpg. Expected split/class/file" in message(folder)


def put(root, files):
    """Files by names of bytes."""
    for name, content in files.items():
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def make(source, tmp_path, **options):
    return prepare.prepare([str(source)], name="pets", data_dir=str(tmp_path / "sets"), **options)


@pytest.mark.field(30)
def test_linked_classes_on_another_disk_are_followed(files, tmp_path):
    for path, content in files.items():
        split, label, name = path.split("/")
        root = "disk" if label == "dog" else "source"
        put(tmp_path / root / split / label, {name.encode(): content})
    for split in ("train", "validation"):
        (tmp_path / "source" / split / "dog").symlink_to(tmp_path / "disk" / split / "dog")
    (tmp_path / "source" / "train" / "cat" / "all").symlink_to(tmp_path / "source")
    made = make(tmp_path / "source", tmp_path)
    assert made.examples == {"train": 6, "validation": 4}
    assert made.class_names == ("cat", "dog")
    assert list(made.passed_over) == [image_files.LOOPS]
    assert made.notes == ()


def test_a_dead_link_stops_it_as_it_may_have_been_a_class(folder, tmp_path):
    (folder / "train" / "fox").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match=r"1 links to nothing: .*train/fox"):
        make(folder, tmp_path)
    made = make(folder, tmp_path, on_error="skip")
    assert made.passed_over["links to nothing"] == [str(folder / "train" / "fox")]
    assert made.passed_over["hidden"] == [str(folder / ".DS_Store")]


@pytest.mark.field(32)
def test_names_of_any_bytes_are_kept(tmp_path):
    names = [
        b"train/caf\xe9/b\xe9te.png",
        "train/日本/é\n\t.png".encode(),
        b"train/a\nb/x\\y.png",
        b"train/a\nb/\xff\xfe.png",
    ]
    put(tmp_path / "source", {name: picture(index) for index, name in enumerate(names)})
    made = make(tmp_path / "source", tmp_path)
    assert made.class_names == ("a\\nb", "caf\\xe9", "日本")
    read = {record["file_name"]: record for record in records(made, "train")}
    assert set(read) == set(names)
    for index, name in enumerate(names):
        assert read[name]["image"] == picture(index)
    labels = {name.split(b"/")[1]: record["label"] for name, record in read.items()}
    assert labels == {b"a\nb": 0, b"caf\xe9": 1, "日本".encode(): 2}
    features = tfds.builder_from_directory(made.folder).info.features
    assert tuple(features["label"].names) == made.class_names


def test_class_names_that_cannot_be_told_apart_are_refused(tmp_path):
    put(tmp_path / "source", {b"train/cat/0.png": picture(0), b"train/cat /0.png": picture(1)})
    with pytest.raises(UserError, match="'cat' and 'cat ' differ in nothing"):
        make(tmp_path / "source", tmp_path)


@pytest.mark.field(33, 34, 36)
def test_odd_classes_are_told(tmp_path):
    names = [
        b"train/cat/0.png",
        b"train/dog/0.png",
        "train/cafe\u0301/0.png".encode(),
        b"validation/Cat/0.png",
        b"validation/dog/0.png",
        b"validation/fox/0.png",
        "validation/caf\u00e9/0.png".encode(),
    ]
    put(tmp_path / "source", {name: picture(index) for index, name in enumerate(names)})
    put(tmp_path / "source", {b"train/lost/0.png": b"no image"})
    for empty in ("train/bird", "test"):
        (tmp_path / "source" / empty).mkdir()
    made = make(tmp_path / "source", tmp_path, on_error="skip")
    assert set(made.notes) == {
        "No image is in test, train/bird, train/lost.",
        "Classes 'Cat' and 'cat' differ only by case, Unicode form or spaces, and are kept apart.",
        "Classes 'cafe\\u0301' and 'caf\\xe9' differ only by case, Unicode form or spaces, and are "
        "kept apart.",
        "Split train has no image of 3 of the 6 classes: Cat, caf\u00e9, fox.",
        "Split validation has no image of 2 of the 6 classes: cafe\u0301, cat.",
    }


def zipped(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.field(42)
def test_a_zip_with_backslashes_is_read(files, folder, tmp_path):
    with_backslashes = {name.replace("/", "\\"): content for name, content in files.items()}
    with_backslashes["train\\bird\\"] = b""
    made = make(zipped(tmp_path / "a.zip", with_backslashes), tmp_path)
    plain = prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path / "b"))
    for path in plain.folder.iterdir():
        assert path.read_bytes() == (made.folder / path.name).read_bytes()
    assert made.notes == ("No image is in train/bird.",)


def test_a_zip_of_the_current_folder_is_read(files, tmp_path):
    made = make(zipped(tmp_path / "a.zip", {f"./{k}": v for k, v in files.items()}), tmp_path)
    assert made.examples == {"train": 6, "validation": 4}
    assert {r["file_name"] for r in records(made, "train")} == {
        name.encode() for name in files if name.startswith("train")
    }


@pytest.mark.parametrize("name", ["train/../0.png", "/train/0.png", "../train/0.png", "0.png"])
def test_places_outside_the_layout_are_refused(name, files, tmp_path):
    with pytest.raises(UserError, match="1 files that are not in split/class/file"):
        make(zipped(tmp_path / "a.zip", {**files, name: picture(0)}), tmp_path)


def test_a_file_that_is_twice_in_a_zip_is_refused(files, tmp_path):
    twice = {**files, "./train/cat/0.jpg": picture(0)}
    with pytest.raises(UserError, match=r"holds train/cat/0\.jpg twice"):
        make(zipped(tmp_path / "a.zip", twice), tmp_path)


def changed(path, at, size, value, entry):
    """Overwrites a field of an entry, in its own header and in the directory at the end."""
    data = bytearray(path.read_bytes())
    for signature, more in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        name = 30 if not more else 46
        for match in re.finditer(re.escape(signature), bytes(data)):
            start = match.start()
            if data[start + name : start + name + len(entry)] == entry:
                field = start + at + more
                data[field : field + size] = value.to_bytes(size, "little")
    path.write_bytes(data)


ZIP_FIELDS = {
    "password": (6, 2, 1, "locked with a password; unpack the archive with another tool"),
    "Deflate64": (8, 2, 9, "Deflate64, which Python cannot read; unpack the archive with another"),
    "PPMd": (8, 2, 98, "method 98, which Python cannot read; unpack"),
    "zlib": (8, 2, 8, r"damaged \(error: Error -3 while decompressing"),
    "bzip2": (8, 2, 12, "Invalid data stream"),
    "lzma": (8, 2, 14, "damaged"),
    "checksum": (14, 4, 7, "damaged .*Bad CRC-32"),
    "bomb": (22, 4, 2**31, "2,147,483,648 bytes; an image may have"),
}


@pytest.mark.field(43, 44)
@pytest.mark.parametrize("kind", ZIP_FIELDS)
def test_entries_that_cannot_be_read_are_told_or_skipped(kind, files, tmp_path):
    *field, reason = ZIP_FIELDS[kind]
    path = zipped(tmp_path / "a.zip", files)
    changed(path, *field, entry=b"train/cat/0.jpg")
    with pytest.raises(UserError, match=rf"1 of 10 files.*\n.*train/cat/0\.jpg: .*{reason}"):
        make(path, tmp_path)
    source_files._archive.cache_clear()
    listing = source_files.list_files(str(path))
    (bad,) = source_files.find_unreadable(listing.files)
    assert bad.file.path == "train/cat/0.jpg"


@pytest.mark.field(44)
def test_a_skipped_entry_leaves_the_others(files, tmp_path):
    path = zipped(tmp_path / "a.zip", files)
    changed(path, 6, 2, 1, entry=b"train/cat/0.jpg")
    made = make(path, tmp_path, on_error="skip")
    assert made.examples == {"train": 5, "validation": 4}
    assert "password" in str(made.skipped[0])


def test_many_bad_files_are_named_in_part(tmp_path):
    names = [b"train/cat/%d.png" % index for index in range(50)]
    put(tmp_path / "source", dict.fromkeys(names, b"no image"))
    with pytest.raises(UserError) as info:
        make(tmp_path / "source", tmp_path)
    lines = str(info.value).splitlines()
    assert len(lines) == 1 + prepare.NAMED + 2
    assert lines[-2] == "  ... and 30 more"


def test_special_files_are_told_and_never_opened(folder, tmp_path):
    os.mkfifo(folder / "train" / "cat" / "pipe.jpg")
    (folder / "train" / "cat" / "empty.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 pipes: .*pipe\.jpg"):
        make(folder, tmp_path)
    made = make(folder, tmp_path, on_error="skip")
    assert [bad.reason for bad in made.skipped] == ["it is empty (0 bytes)"]
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(UserError, match=r"pipe\.zip is neither a folder nor a zip"):
        source_files.list_files(str(tmp_path / "pipe.zip"))


@pytest.mark.field(47)
@pytest.mark.parametrize("place", ["file/sets", "/dev/null/sets", "/proc/sets", "file"])
def test_a_data_dir_that_cannot_be_made_is_told_first(place, folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(prepare, "find_unreadable", lambda *_: pytest.fail("the work was begun"))
    with pytest.raises(UserError, match=r"data_dir='.*' (cannot be written|is a file)"):
        prepare.prepare([str(folder)], name="pets", data_dir=os.path.join(tmp_path, place))


def test_splits_that_tfds_cannot_name_are_told(tmp_path):
    put(tmp_path / "source", {b"my train/cat/0.png": picture(0)})
    with pytest.raises(UserError, match="'my train' cannot be a split's name"):
        make(tmp_path / "source", tmp_path)


def test_a_name_in_use_is_refused(folder, tmp_path):
    prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"There is a data set 'pets' in .* remove the folder"):
        prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path))


def test_a_file_in_two_archives_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"train/cat/0\.jpg is in both"):
        prepare.prepare([str(folder)] * 2, name="pets", data_dir=str(tmp_path / "sets"))


def test_a_split_without_readable_images_is_refused(tmp_path):
    bad = tmp_path / "source/train/cat/a.jpg"
    bad.parent.mkdir(parents=True)
    bad.write_text("no image")
    with pytest.raises(UserError, match="No file of split train"):
        prepare.prepare(
            [str(tmp_path / "source")], name="pets", data_dir=str(tmp_path), on_error="skip"
        )


@pytest.mark.slow
def test_the_command_prints_a_message_without_traceback(damaged, tmp_path):
    command = [sys.executable, "-m", "msvit_jax.data.prepare", f"--source={damaged}"]
    command += ["--name=pets", f"--data_dir={tmp_path}"]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stopped.returncode == 2
    assert "error: 2 of 11 files" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    skipped = subprocess.run(
        [*command, "--on_error=skip"], capture_output=True, text=True, check=True
    )
    assert "train: 5, validation: 4, 2 classes, 2 skipped" in skipped.stdout


def test_missing_data_sets_come_with_the_command_that_makes_them(folder, tmp_path):
    with pytest.raises(UserError, match="tfds build imagenet2012 --file_format=array_record"):
        sources.open_dataset("imagenet2012", str(tmp_path))
    with pytest.raises(UserError, match=rf"data_dir {tmp_path}/none does not exist.*tfds build"):
        sources.open_dataset("cifar10", str(tmp_path / "none"))
    prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"Did you mean 'pets'\?.*msvit_jax\.data\.prepare"):
        sources.open_dataset("petz", str(tmp_path))
    with pytest.raises(UserError, match=r"Did you mean 'cifar100'\?"):
        sources.open_dataset("cifar1000", str(tmp_path))
    with pytest.raises(UserError, match=r"no version 2\.0\.0; it has 1\.0\.0"):
        sources.open_dataset("pets:2.0.0", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scattered_digits/hart", r"no config 'hart'. Did you mean 'hard'\?"),
        ("scattered_digits:9.0.0", "no version 9.0.0; it has 1.0.0"),
    ],
)
def test_unknown_variants_of_the_embedded_set_are_named(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        sources.open_dataset(name, str(tmp_path))


def edit(folder, file, change):
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def test_other_formats_are_refused_with_the_conversion(folder, tmp_path):
    made = prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path))
    edit(made.folder, "dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
    with pytest.raises(UserError, match=r"stored as tfrecord.*tfds convert_format"):
        sources.open_dataset("pets", str(tmp_path))


def test_wrong_channel_counts_are_named(folder, tmp_path):
    made = prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path))

    def five_channels(features):
        image = features["featuresDict"]["features"]["image"]["image"]
        image["shape"]["dimensions"][-1] = "2"

    edit(made.folder, "features.json", five_channels)
    with pytest.raises(UserError, match="'pets' have 2 channels"):
        sources.open_dataset("pets", str(tmp_path))


def test_data_sets_without_labels_are_refused(folder, tmp_path):
    made = prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path))
    edit(
        made.folder,
        "features.json",
        lambda features: features["featuresDict"]["features"].pop("label"),
    )
    with pytest.raises(UserError, match="needs a feature 'label'"):
        sources.open_dataset("pets", str(tmp_path))


def test_a_damaged_record_is_named_by_its_file(folder, tmp_path, monkeypatch):
    """Damage after preparation: the message names the data set, the file and the remedy."""
    jpeg = folder / "train/cat/0.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-60])
    monkeypatch.setattr(prepare, "find_unreadable", lambda files, workers: [])
    prepare.prepare([str(folder)], name="pets", data_dir=str(tmp_path))
    config = configs.base().data
    config.update(name="pets", data_dir=str(tmp_path), image_size=8)
    with pytest.raises(UserError, match=r"'pets/1\.0\.0'.*'train/cat/0\.jpg'.*truncated.*prepare"):
        next(data.train_iterator(config, batch_size=6, seed=0))
