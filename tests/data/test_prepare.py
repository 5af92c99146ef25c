"""Making data sets of one's own images, and opening data sets by name: results and messages."""

import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from msvit_jax import data
from msvit_jax.data import prepare, sources
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
    config = data.default_config()
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
    with pytest.raises(UserError, match=r"no version 2\.0\.0; there is 1\.0\.0"):
        sources.open_dataset("pets:2.0.0", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scattered_digits/hart", r"no config 'hart'. Did you mean 'hard'\?"),
        ("scattered_digits:9.0.0", "no version 9.0.0; there is 1.0.0"),
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
    config = data.default_config()
    config.update(name="pets", data_dir=str(tmp_path), image_size=8)
    with pytest.raises(UserError, match=r"'pets/1\.0\.0'.*'train/cat/0\.jpg'.*truncated.*prepare"):
        next(data.train_iterator(config, batch_size=6, seed=0))
