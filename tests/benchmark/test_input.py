"""The input benchmark runs, measures what it says, and reports as promised."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from msvit_jax.benchmark import input as input_benchmark


def test_jpegs_are_of_imagenets_size():
    jpegs = input_benchmark.photo_jpegs(8)
    assert {Image.open(io.BytesIO(jpeg)).size for jpeg in jpegs} == {(500, 375)}
    assert 60_000 < np.mean([len(jpeg) for jpeg in jpegs]) < 160_000


def test_our_side_runs_the_training_transform():
    batch = next(input_benchmark.our_batches(input_benchmark.photo_jpegs(4)))
    assert batch["image"].shape == (64, 224, 224, 3)
    assert batch["image"].std() > 20


@pytest.mark.slow
def test_last_line_is_json():
    command = [sys.executable, "-m", "msvit_jax.benchmark.input", "--rounds=1", "--batches=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["pillow_images_per_second"] > 1
    if "tf.data_images_per_second" not in record:
        assert "TensorFlow is not installed" in done.stdout
