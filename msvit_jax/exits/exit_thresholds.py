"""Exit thresholds of a cascade: how they choose an exit, what they cost, and how they are fitted.

An image leaves at the first exit whose certainty reaches its threshold; the last exit answers all
remaining images. Thresholds are fitted on one set of images (training images) and evaluated on
another. Everything here is NumPy on stored logits; no model runs.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import optimize
from scipy.special import softmax, xlogy

from msvit_jax.errors import UserError, check_choice

CRITERIA = ("confidence", "entropy", "random")
NEVER = 2.0  # a threshold that no certainty reaches
ALWAYS = 0.0  # a threshold that every certainty reaches, as the last exit's
GEOMETRIC = tuple(range(1, 60))  # values of p in the official code, and in the published curve
_SEARCH = {"maxiter": 60, "popsize": 12, "tol": 1e-6, "polish": False}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Certainty and correctness of every exit for every image.

    Attributes:
      certainty: [n, stages], certainty from 0 to 1.
      correct: [n, stages] bool, whether the exit predicts the label.
    """

    certainty: np.ndarray
    correct: np.ndarray


@dataclasses.dataclass(frozen=True)
class Point:
    """Accuracy and cost of thresholds on a set of images.

    Attributes:
      thresholds: Thresholds, one for each exit.
      shares: Share of the images that leave at each exit.
      macs: Mean multiply-accumulates per image.
      top1: Top-1 accuracy in percent.
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    macs: float
    top1: float


def certainty(exit_logits: np.ndarray, criterion: str = "confidence", seed: int = 0) -> np.ndarray:
    """Certainty of exits: [n, stages, C] logits -> [n, stages], 0 to 1.

    "confidence": the largest softmax probability. "entropy": 1 - entropy / log(C). "random": random
    numbers, a control that shows the benefit of choosing exits by the image (DVT, table 5).

    Raises:
      UserError: The criterion is unknown.
    """
    check_choice("criterion", criterion, CRITERIA)
    if criterion == "random":
        return np.random.default_rng(seed).random(exit_logits.shape[:-1])
    shares = softmax(np.asarray(exit_logits, np.float64), axis=-1)
    if criterion == "confidence":
        return shares.max(axis=-1)
    return 1 + xlogy(shares, shares).sum(axis=-1) / np.log(exit_logits.shape[-1])


def score(
    exit_logits: np.ndarray, labels: np.ndarray, criterion: str = "confidence", seed: int = 0
) -> Scores:
    """Scores of logits [n, stages, C] against labels [n]; see `certainty`."""
    return Scores(
        certainty(exit_logits, criterion, seed), exit_logits.argmax(axis=-1) == labels[:, None]
    )


def check(thresholds: Sequence[float], stages: int) -> tuple[float, ...]:
    """Checks thresholds and appends the last exit's if it is omitted.

    Raises:
      UserError: There are too many or too few, one is not a number from 0 up, or the last exit's
        is not `ALWAYS`, so that some images would have no exit.
    """
    try:
        given = tuple(float(t) for t in thresholds)
    except (TypeError, ValueError) as error:
        raise UserError(f"thresholds={thresholds!r} are not a sequence of numbers.") from error
    if len(given) == stages - 1:
        given = (*given, ALWAYS)
    if len(given) != stages:
        raise UserError(
            f"{len(given)} thresholds for {stages} exits; give {stages - 1}, from the first exit "
            "to the last but one."
        )
    if not np.isfinite(given).all() or min(given) < 0:
        raise UserError(f"thresholds={given}: each must be a number of at least 0.")
    if given[-1] != ALWAYS:
        raise UserError(
            f"thresholds={given}: the last exit answers every image that is left, so its threshold "
            f"must be {ALWAYS:g} or be left out."
        )
    return given


def leave(certain: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The exit, from 0, at which each image leaves: [n, stages] -> [n].

    Raises:
      UserError: The thresholds are invalid, see `check`.
    """
    reached = certain >= np.asarray(check(thresholds, certain.shape[1]))
    reached[:, -1] = True
    return reached.argmax(axis=1)


def judge(scores: Scores, thresholds: Sequence[float], exit_macs: np.ndarray) -> Point:
    """Accuracy and mean cost of a set of images under thresholds.

    The cost is sum_k (n_k / n) * cost_k, where n_k images leave at exit k and cost_k is the cost of
    everything computed up to exit k.

    Args:
      scores: Scores of the images.
      thresholds: Thresholds, one for each exit; the last may be omitted (see `check`).
      exit_macs: [stages], multiply-accumulates up to each exit, from `DVT.exit_macs`.
    """
    exit_index = leave(scores.certainty, thresholds)
    shares = np.bincount(exit_index, minlength=len(exit_macs)) / len(exit_index)
    right = scores.correct[np.arange(len(exit_index)), exit_index].mean()
    complete = check(thresholds, len(exit_macs))
    return Point(complete, tuple(shares.tolist()), float(shares @ exit_macs), 100 * float(right))


def geometric(certain: np.ndarray, q: float) -> tuple[float, ...]:
    """Thresholds at which a share proportional to q**k leaves at exit k, as in the official code.

    Args:
      certain: [n, stages], certainty of every exit.
      q: Ratio of the shares of successive exits; below 1 most images leave early. The official code
        uses p / 20 for p in `GEOMETRIC`.
    """
    share = q ** np.arange(1.0, certain.shape[1] + 1)
    return by_shares(certain, share / share.sum())


def by_shares(certain: np.ndarray, share: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """Thresholds at which given shares of all images leave at each exit.

    Exit by exit, the floor(n * share)-th most certain of the remaining images sets the threshold,
    and all that reach it leave. If that number is 0 or exceeds the remaining images, none leaves.

    Args:
      certain: [n, stages], certainty of every exit.
      share: [stages], share of all images that leaves at each exit; the last is not used, because
        all remaining images leave there.
    """
    count, stages = certain.shape
    there = np.ones(count, bool)
    thresholds = []
    for exit_ in range(stages - 1):
        wanted = int(np.floor(count * share[exit_]))
        left = np.sort(certain[there, exit_])[::-1]
        threshold = float(left[wanted - 1]) if 0 < wanted <= len(left) else NEVER
        thresholds.append(threshold)
        there &= certain[:, exit_] < threshold
    return (*thresholds, ALWAYS)


def geometric_curve(
    fit: Scores, held_out: Scores, exit_macs: np.ndarray, steps: Iterable[int] = GEOMETRIC
) -> list[Point]:
    """The published curve: thresholds for each p fitted on one set, evaluated on another."""
    return [judge(held_out, geometric(fit.certainty, p / 20), exit_macs) for p in steps]


def geometric_within(
    certain: np.ndarray, exit_macs: np.ndarray, macs_budget: float
) -> tuple[float, ...]:
    """The costliest geometric thresholds within a budget; needs no labels.

    Args:
      certain: [n, stages], certainty of every exit.
      exit_macs: [stages], multiply-accumulates up to each exit.
      macs_budget: Mean multiply-accumulates per image.

    Raises:
      UserError: The budget is below the first exit's cost.
    """
    check_budget(macs_budget, exit_macs)
    everything = Scores(certain, np.zeros(certain.shape, bool))
    all_first = (ALWAYS,) * len(exit_macs)
    tried = [all_first, *(geometric(certain, q) for q in np.geomspace(0.02, 50.0, 400))]
    costs = [judge(everything, thresholds, exit_macs).macs for thresholds in tried]
    fitting = [(cost, t) for cost, t in zip(costs, tried, strict=True) if cost <= macs_budget]
    return max(fitting)[1]


def search(
    fit: Scores, exit_macs: np.ndarray, macs_budget: float, *, seed: int = 0
) -> tuple[float, ...]:
    """The most accurate thresholds within a budget, by differential evolution.

    The paper uses a genetic algorithm that it does not specify. Ours is SciPy's differential
    evolution over the shares of the remaining images that leave at each exit. It starts from the
    geometric thresholds, so it is never worse than those on the fitted images.

    Args:
      fit: Scores of the images to fit on.
      exit_macs: [stages], multiply-accumulates up to each exit.
      macs_budget: Mean multiply-accumulates per image.
      seed: Seed of the search.

    Raises:
      UserError: The budget is below the first exit's cost.
    """
    check_budget(macs_budget, exit_macs)
    start = geometric_within(fit.certainty, exit_macs, macs_budget)
    if len(exit_macs) == 1:
        return start
    most = macs_budget * len(fit.certainty)

    def thresholds_for(leaving: np.ndarray) -> tuple[float, ...]:
        return _thresholds_for(fit.certainty, leaving, exit_macs, most)

    def loss(leaving: np.ndarray) -> float:
        point = judge(fit, thresholds_for(leaving), exit_macs)
        spent = point.macs / exit_macs[-1]
        # Any excess outweighs all accuracy; at equal accuracy the cheaper is better.
        return (1000 if point.macs > macs_budget else -point.top1) + 1e-3 * spent

    found = optimize.differential_evolution(
        loss,
        [(0.0, 1.0)] * (len(exit_macs) - 1),
        x0=_leaving(fit.certainty, start),
        rng=np.random.default_rng(seed),
        **_SEARCH,
    )
    candidates = [start, thresholds_for(found.x)]
    points = [judge(fit, thresholds, exit_macs) for thresholds in candidates]
    return max(
        (p for p in points if p.macs <= macs_budget), key=lambda p: (p.top1, -p.macs)
    ).thresholds


def check_budget(macs_budget: float, exit_macs: np.ndarray) -> None:
    """Raises UserError for a budget below the first exit's cost; both in multiply-accumulates."""
    if not macs_budget >= exit_macs[0]:
        raise UserError(
            f"A budget of {macs_budget / 1e9:.4g} GMACs is below the cost of the first exit, "
            f"{exit_macs[0] / 1e9:.4g} GMACs, which every image has to pay."
        )


def _thresholds_for(
    certain: np.ndarray, leaving: np.ndarray, exit_macs: np.ndarray, most: float
) -> tuple[float, ...]:
    """Thresholds at which given shares of the remaining images leave at each exit.

    At the last exit but one, more images than `leaving` gives leave if `most` requires it.

    Args:
      certain: [n, stages], certainty of every exit.
      leaving: [stages - 1], share of the remaining images that leaves at each exit, 0 to 1.
      exit_macs: [stages], multiply-accumulates up to each exit.
      most: Upper bound on the multiply-accumulates of all images together.
    """
    there = np.ones(len(certain), bool)
    thresholds, spent = [], 0.0
    for exit_, share in enumerate(leaving):
        left = certain[there, exit_]
        wanted = round(share * len(left))
        if exit_ == len(leaving) - 1:
            excess = spent + len(left) * exit_macs[-1] - most
            needed = int(np.ceil(excess / (exit_macs[-1] - exit_macs[-2]) - 1e-9))
            wanted = min(max(wanted, needed), len(left))
        threshold = NEVER
        if wanted:
            threshold = float(np.partition(left, len(left) - wanted)[len(left) - wanted])
        thresholds.append(threshold)
        spent += float((left >= threshold).sum() * exit_macs[exit_])
        there &= certain[:, exit_] < threshold
    return (*thresholds, ALWAYS)


def _leaving(certain: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The inverse of `_thresholds_for`: the shares of the remaining images that leave."""
    exit_index = leave(certain, thresholds)
    stages = certain.shape[1]
    gone = np.bincount(exit_index, minlength=stages)
    there = len(exit_index) - np.concatenate([[0], np.cumsum(gone)[:-1]])
    return np.clip(gone[:-1] / np.maximum(there[:-1], 1), 0.0, 1.0)
