"""Answers reach their images' places, each once, whatever fits on the device and whatever not."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from msvit_jax.inference.executables import Answers, Decisions
from msvit_jax.inference.images import Reading, open_images
from msvit_jax.inference.job import Job, decide_batches
from msvit_jax.inference.schedule import Buckets, Shape

REGIONS, SIZE = 4, 2


class FakeExecutables:
    """In the place of a model: an image's first pixel is its name, the second its fine regions."""

    gated, answer_shape = True, (1,)

    def __init__(self, batch, misfits):
        self.batch, self.misfits = batch, misfits
        self.run, self.uploaded = [], []

    def upload(self, images):
        self.uploaded += [int(name) for name in images[:, 0, 0, 0]]
        batch = np.zeros((self.batch, SIZE, SIZE, 3), np.float32)
        batch[: len(images)] = images
        return batch

    def normalized(self, batch):
        return batch

    def empty_slots(self, count, like):
        return np.zeros((count, *like.shape[1:]), like.dtype)

    def store(self, slots, batch, at):
        there = at < len(slots)
        slots[at[there]] = batch[there]
        return slots

    def take(self, slots, at):
        return np.concatenate([slots, np.zeros_like(slots[:1])])[at]

    def run_gate(self, images, threshold):
        fine = images[:, 0, 0, 1:2]
        coarse = (np.arange(REGIONS) >= fine).astype(np.float32)
        return Decisions(coarse, coarse)

    def answer(self, shape, images, coarse):
        names = images[:, 0, 0, 0]
        tokens = np.where(coarse > 0.5, 1, 4).sum(axis=1)
        whole = shape.tokens == 4 * REGIONS
        fits = tokens <= shape.tokens
        assert fits.all(), "sent where it cannot fit"
        self.run += [(int(name), whole) for name in names if name]
        fits &= whole | ~np.isin(names, self.misfits)
        return Answers(np.where(fits, names, np.nan)[:, None], tokens, fits)


def _shapes(batch):
    return [Shape("budget", batch, tokens, 1.0 * tokens) for tokens in (7, 10, 16)]


def _run(fine, batch, misfits):
    images = np.zeros((len(fine), SIZE, SIZE, 3), np.float32)
    images[:, 0, 0, 0] = 1 + np.arange(len(fine))
    images[:, 0, 0, 1] = fine
    programs, told = FakeExecutables(batch, misfits), []
    source = open_images(images, Reading(SIZE))
    job = Job(programs, Buckets(_shapes(batch)), len(fine))
    job.run(decide_batches(programs, source, 0.5), told.append)
    return job, programs, told


@example(fine=[1, 1, 1], batch=3, misfits={2})  # run as uploaded, all but one
@example(fine=[0, 0], batch=2, misfits={1})  # again alone, where it was uploaded
@given(
    st.lists(st.integers(0, REGIONS), min_size=1, max_size=40),
    st.integers(1, 9),
    st.sets(st.integers(1, 40)),
)
def test_every_image_is_answered_once_in_its_place(fine, batch, misfits):
    job, programs, told = _run(fine, batch, list(misfits))
    names = 1 + np.arange(len(fine))
    np.testing.assert_array_equal(job.logits[:, 0], names)
    np.testing.assert_array_equal(job.tokens, REGIONS + 3 * np.asarray(fine))
    np.testing.assert_array_equal(job.coarse, np.arange(REGIONS)[None] >= np.asarray(fine)[:, None])
    assert sorted(number for numbers in told for number in numbers) == list(range(len(fine)))
    assert programs.uploaded == list(names)  # each once
    assert len(job._images) == 0  # no place is kept for what is answered
    # Again only what did not fit, and then where everything fits.
    runs = [name for name, _ in programs.run]
    narrow = [name for name, whole in programs.run if not whole]
    again = set(misfits) & set(narrow)
    assert sorted(runs) == sorted([*names, *again])


def test_a_shape_that_breaks_its_promise_ends_the_call():
    class Broken(FakeExecutables):
        def answer(self, shape, images, coarse):
            answers = super().answer(shape, images, coarse)
            return answers.replace(within_capacity=np.zeros_like(answers.within_capacity))

    images = np.ones((3, SIZE, SIZE, 3), np.float32)
    programs = Broken(2, [])
    job = Job(programs, Buckets(_shapes(2)), 3)
    with pytest.raises(RuntimeError, match="where any image fits"):
        job.run(decide_batches(programs, open_images(images, Reading(SIZE)), 0.5), lambda n: None)
