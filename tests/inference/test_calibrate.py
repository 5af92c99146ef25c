"""The threshold from sorted probabilities against a sweep over all thresholds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from msvit_jax.errors import UserError
from msvit_jax.inference.calibrate import threshold_for

# Coarsely rounded numbers too, so that many are equal.
probabilities = st.one_of(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(0, 1, width=32),
    ),
    hnp.arrays(np.float32, (5, 4), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])),
)


def _tokens(probability, threshold):
    """Mean tokens, region by region as the gate decides: coarse where p > threshold."""
    return np.mean([sum(1 if p > threshold else 4 for p in image) for image in probability])


@given(probabilities, st.floats(0, 1))
def test_no_threshold_comes_closer_to_the_budget_from_below(probability, share):
    regions = probability.shape[1]
    budget = regions + share * 3 * regions
    found = threshold_for(probability, budget)
    assert found.images == len(probability)
    assert found.tokens == pytest.approx(_tokens(probability, np.float32(found.threshold)))
    sweep = [_tokens(probability, t) for t in [-1.0, *np.unique(probability)]]
    assert found.tokens == pytest.approx(max(t for t in sweep if t <= budget + 1e-5))


def test_the_threshold_keeps_clear_of_the_probabilities():
    found = threshold_for(np.asarray([[0.1, 0.3, 0.5, 0.9]], np.float32), 10)
    assert found.tokens == 10
    assert found.threshold == pytest.approx(0.4)


@pytest.mark.parametrize("tokens", [0, 48.9, 196.1, float("nan")])
def test_a_budget_out_of_reach_names_the_range(tokens):
    with pytest.raises(UserError, match=r"49 tokens if it is coarse .* 196 if it is fine"):
        threshold_for(np.full((2, 49), 0.5, np.float32), tokens)
