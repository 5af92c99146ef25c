"""What a gate is passed back against the true change of the loss when a decision is flipped."""

import numpy as np
import pytest

from tests.models import flips


@pytest.mark.parametrize("weights", ["random", "trained"])
@pytest.mark.parametrize("kind", flips.KINDS)
def test_a_gate_is_passed_back_what_the_papers_sequence_gives_with_bounded_shares(weights, kind):
    found = flips.passed_back(flips.model(), weights, flips.decisions(weights, kind))
    expected = flips.literal(weights, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found).max() < 100  # the derivative at weight 0 reaches millions


@pytest.mark.parametrize(
    ("weights", "rank", "signs"), [("random", 0.99, 0.99), ("trained", 0.7, 0.88)]
)
def test_it_follows_true_flips(weights, rank, signs):
    """On trained weights what slots with a mix of both scales gave had ranks of .54 to .68."""
    for kind in flips.KINDS:
        found = flips.passed_back(flips.model(), weights, flips.decisions(weights, kind))
        quality = flips.quality(found, flips.true(weights, kind))
        assert quality[0] > rank
        assert quality[1] > signs


@pytest.mark.parametrize("weights", ["random", "trained"])
@pytest.mark.parametrize("capacity", [48, (48, 64)])
def test_trimmed_passes_back_the_same_to_what_it_carries_and_nothing_else(weights, capacity):
    coarse = flips.decisions(weights, "samples")
    everything = flips.passed_back(flips.model(), weights, coarse)
    found = flips.passed_back(
        flips.model().clone(layout="trimmed", token_capacity=capacity), weights, coarse
    )
    carried = found != 0
    assert 0.2 < carried.mean() < 1
    np.testing.assert_allclose(found[carried], everything[carried], rtol=2e-3, atol=2e-5)
    all_there = flips.passed_back(
        flips.model().clone(layout="trimmed", token_capacity=80), weights, coarse
    )
    np.testing.assert_allclose(all_there, everything, rtol=2e-3, atol=2e-5)
