"""Every image runs exactly once, where it fits, whatever the counts."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import msvit_jax
from msvit_jax.inference.schedule import (
    PADDING,
    Buckets,
    Cheapest,
    Queue,
    Rows,
    Shape,
    plan,
)
from msvit_jax.inference.shapes import fitted_buckets

GRID, PREFIX = 64, 1


def _budgets(batch):
    return [Shape("budget", batch, tokens, 1.0 * batch * tokens) for tokens in (24, 40, GRID)]


def _rows(batch, groups, width=70):
    full = math.ceil(batch / groups / (width // (GRID + PREFIX)))
    return [
        Shape("rows", batch, GRID, 1.0 * groups * n * width, groups * n, width, groups, PREFIX)
        for n in sorted({1, math.ceil(full / 2), full})
    ]


@st.composite
def policies(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    batch = groups * draw(st.integers(1, 4))
    rows = Rows(_rows(batch, groups, draw(st.sampled_from([65, 70, 128, 200]))))
    budgets = Buckets(_budgets(batch))
    return draw(st.sampled_from([rows, budgets, Cheapest(budgets, rows)]))


counts = st.lists(st.integers(16, GRID), max_size=40)


def _fit_on_device(call, tokens):
    """First-fit, longest first, written anew: whether each image of a call has room in a row."""
    shape = call.shape
    size, rows = shape.batch // shape.groups, shape.rows // shape.groups
    for start in range(0, shape.batch, size):
        group = call.images_at[start : start + size]
        needs = sorted((tokens[i] + PREFIX for i in group if i != PADDING), reverse=True)
        filled = [0] * rows
        for need in needs:
            row = next((r for r in range(rows) if filled[r] + need <= shape.row_width), None)
            if row is None:
                return False
            filled[row] += need
    return True


@given(policies(), counts, st.integers(1, 9))
def test_every_image_runs_once_and_where_it_fits(policy, tokens, arriving):
    queue, calls, seen = Queue(policy), [], 0
    while True:
        call = queue.next(last=seen == len(tokens))
        if call is not None:
            calls.append(call)
        elif seen < len(tokens):
            for image in range(seen, min(seen + arriving, len(tokens))):
                queue.add(image, tokens[image])
            seen = min(seen + arriving, len(tokens))
        else:
            break
    assert sorted(image for call in calls for image in call.images) == list(range(len(tokens)))
    for call in calls:
        assert len(call.images_at) == call.shape.batch
        assert call.images
        if call.shape.layout == "rows":
            assert _fit_on_device(call, tokens)
        else:
            assert max(tokens[image] for image in call.images) <= call.shape.tokens


@given(counts, st.integers(1, 9))
def test_buckets_make_the_fewest_calls_and_the_cheapest_of_those(tokens, batch):
    policy = Buckets(_budgets(batch))
    calls = list(plan(policy, dict(enumerate(tokens))))
    assert len(calls) == math.ceil(len(tokens) / batch)
    # No way of cutting images into so many batches gets along with smaller largest images than
    # cutting them in order of size.
    ordered = sorted(tokens, reverse=True)
    best = sum(
        min(s.macs for s in policy.shapes if s.tokens >= ordered[start])
        for start in range(0, len(ordered), batch)
    )
    assert sum(call.shape.macs for call in calls) == best


def test_images_wait_until_one_bucket_fills_a_batch():
    policy = Buckets(_budgets(2))
    assert policy.call({0: 20, 1: 30, 2: 60}, last=False) is None
    assert policy.call({0: 20, 1: 30, 2: 60, 3: 40}, last=False).images_at == (1, 3)
    call = policy.call({0: 20, 1: 30, 2: 60}, last=True)
    assert (call.shape.tokens, call.images_at) == (GRID, (2, 1))


def test_what_is_left_runs_in_the_cheaper_way():
    budgets, rows = Buckets(_budgets(4)), Rows(_rows(4, 1))
    policy = Cheapest(budgets, rows)
    assert policy.call({0: 60}, last=True).shape.layout == "rows"  # one row, not 4 x 64 places
    assert policy.call(dict.fromkeys(range(4), 24), last=True).shape.layout == "budget"
    assert policy.call({0: 60}, last=False) is None


def test_padding_comes_last_in_each_group():
    shape = Shape("rows", 6, GRID, 1.0, rows=2, row_width=100, groups=2, prefix=1)
    call = Rows([shape]).call({7: 30, 8: 60, 9: 20}, last=True)
    assert call.images_at == (8, PADDING, PADDING, 7, 9, PADDING)


def test_what_did_not_fit_runs_in_the_last_shape_after_all_others():
    queue = Queue(Buckets(_budgets(2)))
    queue.put_back(7)
    queue.add(1, 20)
    assert queue.next(last=False) is None
    assert queue.next(last=True).images_at == (1, PADDING)
    call = queue.next(last=True)
    assert (call.shape.tokens, call.images_at) == (GRID, (7, PADDING))
    assert queue.next(last=True) is None


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (Shape("budget", 8, 96, 1.0), "budget 96"),
        (Shape("rows", 8, 196, 1.0, rows=4, row_width=256), "rows 4 x 256"),
        (Shape("slots", 8, 196, 1.0), "slots"),
    ],
)
def test_shapes_have_names(shape, name):
    assert shape.name == name


@given(
    tokens=st.lists(st.integers(0, 16).map(lambda fine: 16 + 3 * fine), min_size=1, max_size=12),
    count=st.integers(1, 4),
)
def test_fitted_buckets_are_the_cheapest_of_all_choices(tokens, count):
    model = msvit_jax.create_model(
        "msvit_tiny_patch16_224", image_size=32, patch_size=4, width=16, heads=2, num_classes=5
    )
    sizes = [*range(19, 64, 4), 64]  # a multiple of 4 with the class token, or the whole grid

    def cost(chosen):
        return sum(float(model.macs(min(s for s in chosen if s >= t))) for t in tokens)

    fitted = fitted_buckets(model, np.asarray(tokens), count)
    assert set(fitted) <= set(sizes)
    assert fitted == sorted(set(fitted))
    assert len(fitted) <= count
    choices = (
        chosen
        for number in range(1, count + 1)
        for chosen in itertools.combinations(sizes, number)
        if chosen[-1] >= max(tokens)
    )
    assert cost(fitted) == pytest.approx(min(map(cost, choices)), rel=1e-12)
