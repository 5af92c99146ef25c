"""One small prepared data set for all tests of a process."""

import pytest

from msvit_jax import config as configs
from msvit_jax import data


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    data.open_dataset("scattered_digits/tiny", folder)
    return folder


@pytest.fixture
def config(digits_dir):
    made = configs.base().data
    made.update(name="scattered_digits/tiny", data_dir=digits_dir, image_size=64)
    return made
