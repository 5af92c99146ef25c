"""Data sets whose files changed on the disk: one line each."""

import pathlib
import shutil

import pytest

from msvit_jax.data import pipeline, sources
from msvit_jax.errors import UserError
from tests import tiny_run


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(tiny_run.data_dir(), tmp_path / "data")
    return tmp_path / "data"


def _read(data_dir, cache=False):
    config = tiny_run.config(data__data_dir=str(data_dir), data__cache=cache).data
    info = pipeline.dataset_info(config)
    batches = pipeline.train_iterator(config, batch_size=16, seed=0)
    for _ in range(-(-info.train_examples // 16)):
        next(batches)


def _records(data_dir):
    (file,) = pathlib.Path(data_dir).rglob("*-train.array_record*")
    return file


def _halve(data):
    return data[: len(data) // 2]


def _blank(data):
    return data[:64] + bytes(len(data) // 2) + data[64 + len(data) // 2 :]


def _empty(data):
    return b""


@pytest.mark.fault(11)
@pytest.mark.parametrize("damage", [_halve, _blank, _empty])
@pytest.mark.parametrize("cache", [False, True])
def test_damaged_records_are_named(copy, damage, cache):
    file = _records(copy)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"data set 'tiny.*: cannot be read, .* damaged"):
        _read(copy, cache)


@pytest.mark.fault(11)
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("damage", [_halve, _empty])
def test_a_damaged_description_of_a_data_set_is_named(copy, name, damage):
    (file,) = copy.rglob(name)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"data set 'tiny' in .*: cannot be read, .* damaged"):
        _read(copy)


def test_a_fingerprint_is_that_of_the_data(copy):
    ours = sources.fingerprint(sources.open_dataset("tiny", tiny_run.data_dir()))
    assert sources.fingerprint(sources.open_dataset("tiny", str(copy))) == ours
    (file,) = copy.rglob("dataset_info.json")
    file.write_text(file.read_text().replace(f'"{tiny_run.TRAIN}"', f'"{tiny_run.TRAIN - 1}"'))
    assert sources.fingerprint(sources.open_dataset("tiny", str(copy))) != ours
