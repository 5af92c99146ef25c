"""Exits against plain Python that follows the description, image by image."""

import math

import numpy as np
import pytest

from msvit_jax.errors import UserError
from msvit_jax.exits import exit_thresholds

MACS = np.asarray([1e9, 2.5e9, 6e9])


def stored(count=300, seed=0, classes=6):
    """Logits of three exits that get better, more so on images that are easy."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.standard_normal((count, 3, classes))
    signal = rng.gamma(1.0, 1.5, count)[:, None] * np.asarray([0.6, 0.9, 1.3])
    logits[np.arange(count)[:, None], np.arange(3), labels[:, None]] += signal
    return logits, labels


def probabilities(row):
    largest = max(row)
    powers = [math.exp(x - largest) for x in row]
    return [x / sum(powers) for x in powers]


def plain_confidence(logits):
    return [[max(probabilities(row)) for row in image] for image in logits.tolist()]


def plain_geometric(confidence, q):
    """The official scheme in loops."""
    n, stages = len(confidence), len(confidence[0])
    powers = [q**k for k in range(1, stages + 1)]
    gone, thresholds = set(), []
    for exit_ in range(stages - 1):
        wanted = math.floor(n * powers[exit_] / sum(powers))
        threshold, walked = None, 0
        for image in sorted(range(n), key=lambda i: -confidence[i][exit_]):
            if image in gone:
                continue
            walked += 1
            if walked == wanted:
                threshold = confidence[image][exit_]
                break
        thresholds.append(threshold)
        if threshold is not None:
            gone |= {i for i in range(n) if confidence[i][exit_] >= threshold}
    return thresholds


def plain_judgment(confidence, logits, labels, thresholds):
    cost = right = 0
    for image, label in enumerate(labels):
        exit_ = next(
            (
                k
                for k, threshold in enumerate(thresholds)
                if threshold is not None and confidence[image][k] >= threshold
            ),
            len(thresholds),
        )
        cost += MACS[exit_]
        right += int(np.argmax(logits[image, exit_]) == label)
    return cost / len(labels), 100 * right / len(labels)


def test_geometric_thresholds_cost_and_accuracy_are_those_of_the_description():
    fit_logits, fit_labels = stored(seed=0)
    logits, labels = stored(count=211, seed=1)
    fit, held_out = (
        exit_thresholds.score(fit_logits, fit_labels),
        exit_thresholds.score(logits, labels),
    )
    found = exit_thresholds.geometric_curve(fit, held_out, MACS)
    assert len(found) == 59
    for p, point in zip(range(1, 60), found, strict=True):
        thresholds = plain_geometric(plain_confidence(fit_logits), p / 20)
        wanted = [exit_thresholds.NEVER if t is None else t for t in thresholds]
        np.testing.assert_allclose(point.thresholds[:-1], wanted, rtol=1e-9)
        cost, top1 = plain_judgment(plain_confidence(logits), logits, labels, point.thresholds[:-1])
        assert point.macs == pytest.approx(cost)
        assert point.top1 == pytest.approx(top1)
        assert sum(point.shares) == pytest.approx(1)


def test_few_images_leave_nowhere_where_none_is_to_leave():
    certain = np.asarray([[0.9, 0.5, 1.0], [0.2, 0.8, 1.0]])
    assert exit_thresholds.geometric(certain, 3.0) == (
        exit_thresholds.NEVER,
        exit_thresholds.NEVER,
        exit_thresholds.ALWAYS,
    )
    assert exit_thresholds.geometric(certain, 0.05)[0] == 0.9  # floor(2 x 0.95) = 1 image


def test_criteria():
    logits, _ = stored(40)
    np.testing.assert_allclose(
        exit_thresholds.certainty(logits), plain_confidence(logits), rtol=1e-9
    )
    entropy = exit_thresholds.certainty(logits, "entropy")
    for image in range(5):
        p = probabilities(logits[image, 0])
        wanted = 1 + sum(x * math.log(x) for x in p) / math.log(len(p))
        assert entropy[image, 0] == pytest.approx(wanted)
    drawn = [exit_thresholds.certainty(logits, "random", seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).all()
    with pytest.raises(UserError, match="'margin' is not one of confidence, entropy, random"):
        exit_thresholds.certainty(logits, "margin")


def test_looking_at_the_image_is_worth_something():
    logits, labels = stored(2000)
    top1 = {}
    for criterion in exit_thresholds.CRITERIA:
        scores = exit_thresholds.score(logits, labels, criterion)
        thresholds = exit_thresholds.geometric_within(scores.certainty, MACS, 2e9)
        point = exit_thresholds.judge(scores, thresholds, MACS)
        assert 1.98e9 < point.macs <= 2e9
        top1[criterion] = point.top1
    assert min(top1["confidence"], top1["entropy"]) > top1["random"] + 1


@pytest.mark.parametrize("budget", [1e9, 1.7e9, 3e9, 7e9])
def test_the_search_finds_what_trying_everything_finds(budget):
    scores = exit_thresholds.score(*stored(60))
    thresholds = exit_thresholds.search(scores, MACS, budget)
    found = exit_thresholds.judge(scores, thresholds, MACS)
    assert found.macs <= budget
    steps = [0.0, *np.unique(scores.certainty[:, 0]), exit_thresholds.NEVER]
    best = 0.0
    for first in steps:
        for second in [0.0, *np.unique(scores.certainty[:, 1]), exit_thresholds.NEVER]:
            point = exit_thresholds.judge(scores, (first, second), MACS)
            best = max(best, point.top1) if point.macs <= budget else best
    assert found.top1 >= best - 100 / 60  # an image
    geometric = exit_thresholds.geometric_within(scores.certainty, MACS, budget)
    assert found.top1 >= exit_thresholds.judge(scores, geometric, MACS).top1


def test_the_search_is_repeatable():
    scores = exit_thresholds.score(*stored(100))
    assert exit_thresholds.search(scores, MACS, 2e9) == exit_thresholds.search(scores, MACS, 2e9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0.5,), "1 thresholds for 3 exits; give 2"),
        ((0.5, 0.6, 0.7, 0.0), "4 thresholds for 3 exits"),
        ((0.0, 0.6, 0.9), "the last exit answers every image"),
        ((float("nan"), 0.5), "each must be a number of at least 0"),
        ((-0.1, 0.5), "each must be a number of at least 0"),
        (0.5, "thresholds=0.5 are not a sequence"),
        (("high", 0.5), "not a sequence of numbers"),
    ],
)
def test_thresholds_that_are_not_possible_are_told(given, message):
    with pytest.raises(UserError, match=message):
        exit_thresholds.check(given, 3)


def test_thresholds_may_leave_the_last_exit_out():
    assert (
        exit_thresholds.check((0.5, 0.6), 3)
        == exit_thresholds.check((0.5, 0.6, 0.0), 3)
        == (0.5, 0.6, 0.0)
    )


def test_a_budget_below_the_first_exit_is_told_with_its_cost():
    scores = exit_thresholds.score(*stored(20))
    told = r"0\.9 GMACs is below .* first exit, 1 GMACs"
    with pytest.raises(UserError, match=told):
        exit_thresholds.geometric_within(scores.certainty, MACS, 0.9e9)
    with pytest.raises(UserError, match=told):
        exit_thresholds.search(scores, MACS, 0.9e9)
