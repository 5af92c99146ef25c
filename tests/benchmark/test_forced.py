"""Forced token counts are what was asked for, as nearly as regions allow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msvit_jax.benchmark import forced
from msvit_jax.errors import UserError


@given(
    st.integers(1, 40), st.integers(1, 49), st.floats(0, 1), st.floats(0, 80), st.integers(0, 99)
)
def test_counts_have_the_mean_that_was_asked_for(images, regions, share, spread, seed):
    tokens = regions * (1 + 3 * share)
    counts = forced.token_counts(images, regions, tokens=tokens, spread=spread, seed=seed)
    assert counts.shape == (images,)
    assert ((counts - regions) % 3 == 0).all()
    assert regions <= counts.min()
    assert counts.max() <= 4 * regions
    assert abs(counts.sum() - images * tokens) <= 1.5 + 1e-6


def test_counts_spread_as_was_asked_for():
    counts = forced.token_counts(4000, 49, tokens=122.5, spread=20)
    assert counts.std() == pytest.approx(20, rel=0.05)
    assert np.ptp(forced.token_counts(64, 49, tokens=128, spread=0)) == 3
    assert (forced.token_counts(8, 49, tokens=196, spread=0) == 196).all()
    assert (counts != forced.token_counts(4000, 49, tokens=122.5, spread=20, seed=1)).any()


@given(st.integers(1, 20), st.integers(0, 99))
def test_decisions_give_the_counts(regions, seed):
    counts = regions + 3 * np.arange(regions + 1).reshape(1, -1)
    coarse = forced.decisions(counts, regions, seed)
    assert coarse.shape == (1, regions + 1, regions)
    assert set(np.unique(coarse)) <= {0.0, 1.0}
    np.testing.assert_array_equal(np.where(coarse == 1, 1, 4).sum(axis=-1), counts)


def test_decisions_differ_between_images():
    coarse = forced.decisions(np.full(50, 49 + 3 * 25), 49)
    assert coarse.mean(axis=0).min() > 0.3
    assert coarse.mean(axis=0).max() < 0.7


@pytest.mark.parametrize("tokens", [48.9, 196.1, float("nan")])
def test_counts_that_the_grid_cannot_give(tokens):
    with pytest.raises(UserError, match=r"has 49 \(all coarse\) to 196 \(all fine\)"):
        forced.token_counts(4, 49, tokens=tokens, spread=0)


def test_negative_spread():
    with pytest.raises(UserError, match="spread=-1 is negative"):
        forced.token_counts(4, 49, tokens=100, spread=-1)
