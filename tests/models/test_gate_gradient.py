"""What a gate is passed back against the true change of the loss when a decision is flipped."""

import numpy as np
import pytest

from tests.models import flips


@pytest.mark.parametrize("weights", ["random", "trained"])
def test_slots_follow_true_flips_at_least_as_well_as_the_papers_sequence(weights):
    ours, theirs = [], []
    for kind in flips.KINDS:
        found = flips.passed_back(flips.model(), weights, flips.decisions(weights, kind))
        ours.append(flips.quality(found, flips.true(weights, kind)))
        theirs.append(flips.quality(flips.literal(weights, kind), flips.true(weights, kind)))
        assert np.abs(found).max() < 100  # the derivative at weight 0 reaches millions
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert (ours[:, 0] >= theirs[:, 0] - 1e-3).all()
    assert ours[:, 1].mean() >= theirs[:, 1].mean()


@pytest.mark.parametrize("weights", ["random", "trained"])
@pytest.mark.parametrize("budget", [48, (40, 48, 56, 64)])
def test_trimmed_passes_back_the_same_to_what_it_carries_and_nothing_else(weights, budget):
    coarse = flips.decisions(weights, "samples")
    everything = flips.passed_back(flips.model(), weights, coarse)
    found = flips.passed_back(flips.model().clone(layout="trimmed", budget=budget), weights, coarse)
    carried = found != 0
    assert 0.2 < carried.mean() < 1
    np.testing.assert_allclose(found[carried], everything[carried], rtol=2e-3, atol=2e-5)
    all_there = flips.passed_back(flips.model().clone(layout="trimmed", budget=80), weights, coarse)
    np.testing.assert_allclose(all_there, everything, rtol=2e-3, atol=2e-5)
