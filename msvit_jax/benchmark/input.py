"""Measures images per second and core of the training input pipeline, and of tf.data if installed.

    python -m msvit_jax.benchmark.input [--rounds=7]

JPEGs of ImageNet's typical size (500 x 375 pixels, about 110 kB) are cut from scikit-learn's two
photographs. Both pipelines do the same work: read from memory, random resized crop to 224 pixels
(8 to 100 % of the area), bicubic, flip, batch. Measurements are interleaved and count CPU seconds
instead of wall time, to reduce the effect of other load on the machine. The last line is JSON.
"""

import dataclasses
import io
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from PIL import Image
from sklearn import datasets as sklearn_datasets

from msvit_jax import config as configs
from msvit_jax import errors
from msvit_jax.data import pipeline

WIDTH, HEIGHT, SIZE, BATCH = 500, 375, 224, 64
SENSOR_NOISE = 4.0  # makes the files as large as ImageNet's, which determines the decoding cost


@dataclasses.dataclass(frozen=True)
class Rate:
    """Images per CPU second of one pipeline: median and extremes over the rounds."""

    name: str
    median: float
    least: float
    most: float


def photo_jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Returns JPEGs like ImageNet's: random crops of two photographs, quality 90 to 96."""
    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(photo) for photo in sklearn_datasets.load_sample_images().images]
    made = []
    for index in range(count):
        photo = photos[index % len(photos)]
        left, top = (
            int(rng.integers(edge + 1)) for edge in np.subtract(photo.size, (WIDTH, HEIGHT))
        )
        buffer = io.BytesIO()
        cut = np.asarray(photo.crop((left, top, left + WIDTH, top + HEIGHT)), np.float32)
        grain = rng.normal(0.0, SENSOR_NOISE, size=(HEIGHT, WIDTH, 1))
        noisy = np.rint(cut + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(buffer, "JPEG", quality=int(rng.integers(90, 97)))
        made.append(buffer.getvalue())
    return made


def our_batches(jpegs: Sequence[bytes], resize: str = "pillow") -> Iterator[Any]:
    """The library's own training pipeline over JPEGs in memory, without prefetching."""
    config = configs.base().data
    config.update(image_size=SIZE, crop_scale=(0.08, 1.0), flip=True, resize=resize, prefetch=0)
    examples = [{"image": jpeg, "label": 0, "name": "a benchmark image"} for jpeg in jpegs]
    examples *= 100  # Grain's shuffle of very few examples would cost more than decoding
    return pipeline.train_batches(
        examples, config, pipeline.Rows(BATCH, 0, 1), seed=0, start_step=0
    )


def tf_data_batches(jpegs: Sequence[bytes]) -> Iterator[Any]:
    """The usual ImageNet pipeline of tf.data, with partial decoding (`decode_and_crop_jpeg`)."""
    import tensorflow as tf  # not a dependency: measured only if installed

    def example(jpeg: Any) -> Any:
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(jpeg),
            bounding_boxes=tf.zeros((1, 0, 4)),
            use_image_if_no_bounding_boxes=True,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
        )
        window = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        image = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), method="bicubic")
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.clip_by_value(image, 0.0, 255.0), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False  # no work outside its own measurement
    dataset = tf.data.Dataset.from_tensor_slices(list(jpegs)).repeat()
    dataset = dataset.map(example).batch(BATCH)
    return iter(dataset.with_options(options).as_numpy_iterator())


def cpu_rate(batches: Iterator[Any], count: int) -> float:
    """Returns images per CPU second, summed over all threads of this process."""
    start = time.process_time()
    for _ in itertools.islice(batches, count):
        pass
    return count * BATCH / (time.process_time() - start)


def measure(pipelines: dict[str, Iterator[Any]], rounds: int, count: int) -> list[Rate]:
    """Measures the pipelines interleaved, after one uncounted warmup round.

    Pipelines must not prefetch, because that work would be counted for another pipeline.
    """
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for turn in range(rounds + 1):
        for name, batches in pipelines.items():
            rate = cpu_rate(batches, count)
            if turn:
                rates[name].append(rate)
    return [
        Rate(name, statistics.median(each), min(each), max(each)) for name, each in rates.items()
    ]


def _pipelines(jpegs: Sequence[bytes]) -> dict[str, Iterator[Any]]:
    found = {"pillow": our_batches(jpegs)}
    try:
        found["opencv"] = our_batches(jpegs, resize="opencv")
    except errors.UserError:
        print("data.resize='opencv' is not measured: OpenCV is not installed here.")
    try:
        found["tf.data"] = tf_data_batches(jpegs)
    except ImportError:
        print("tf.data is not measured: TensorFlow is not installed here.")
    return found


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and prints its results."""
    errors.refuse_arguments(argv)
    jpegs = photo_jpegs(64)
    print(
        f"{len(jpegs)} JPEGs of {np.mean([len(jpeg) for jpeg in jpegs]) / 1000:.0f} kB on average"
    )
    rates = measure(_pipelines(jpegs), flags.FLAGS.rounds, flags.FLAGS.batches)
    for rate in rates:
        print(
            f"{rate.name:>10}: {rate.median:6.0f} images/s per core "
            f"({rate.least:.0f} to {rate.most:.0f})"
        )
    record = {f"{rate.name}_images_per_second": rate.median for rate in rates}
    reference = record.get("tf.data_images_per_second")
    if reference:
        record |= {f"{rate.name}_ratio": rate.median / reference for rate in rates[:-1]}
    print(json.dumps(record))


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 7, "Number of measurements of each pipeline.", lower_bound=1)
    flags.DEFINE_integer(
        "batches", 8, "Number of batches of 64 images in one measurement.", lower_bound=1
    )
    errors.run(main)
