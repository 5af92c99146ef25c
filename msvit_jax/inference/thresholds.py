"""Which exit of a cascade answers an image: thresholds, what they cost, and how they are found.

An image leaves at the first exit whose certainty reaches its threshold; the last exit answers all
that are left. Thresholds are fitted on images of their own (training images) and judged on others.
NumPy on stored logits: nothing here runs a model.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import optimize
from scipy.special import softmax, xlogy

from msvit_jax.errors import UserError

CRITERIA = ("confidence", "entropy", "random")
NEVER = 2.0  # a threshold that no certainty reaches
ALWAYS = 0.0  # that of the last exit
GEOMETRIC = tuple(range(1, 60))  # values of p in the official code, and in the published curve
_SEARCH = {"maxiter": 60, "popsize": 12, "tol": 1e-6, "polish": False}


@dataclasses.dataclass(frozen=True)
class Scores:
    """How sure every exit is of every image, and whether it is right.

    Attributes:
      certainty: [n, stages], 0 to 1.
      correct: [n, stages] bool.
    """

    certainty: np.ndarray
    correct: np.ndarray


@dataclasses.dataclass(frozen=True)
class Point:
    """What thresholds lead to on a set of images.

    Attributes:
      thresholds: one for each exit.
      shares: of the images that leave at each exit.
      macs: mean multiply-accumulates per image.
      top1: in percent.
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    macs: float
    top1: float


def certainty(exits: np.ndarray, criterion: str = "confidence", seed: int = 0) -> np.ndarray:
    """How sure exits are: [n, stages, C] logits -> [n, stages], 0 to 1.

    "confidence": the largest softmax probability. "entropy": 1 - entropy / log(C). "random": drawn,
    the control that says what looking at the image is worth (DVT, table 5).

    Raises:
      UserError: unknown criterion.
    """
    if criterion not in CRITERIA:
        raise UserError(f"criterion={criterion!r} is none of {', '.join(CRITERIA)}.")
    if criterion == "random":
        return np.random.default_rng(seed).random(exits.shape[:-1])
    shares = softmax(np.asarray(exits, np.float64), axis=-1)
    if criterion == "confidence":
        return shares.max(axis=-1)
    return 1 + xlogy(shares, shares).sum(axis=-1) / np.log(exits.shape[-1])


def score(
    exits: np.ndarray, labels: np.ndarray, criterion: str = "confidence", seed: int = 0
) -> Scores:
    """Scores of logits [n, stages, C] against labels [n]; see `certainty`."""
    return Scores(certainty(exits, criterion, seed), exits.argmax(axis=-1) == labels[:, None])


def check(thresholds: Sequence[float], stages: int) -> tuple[float, ...]:
    """Completes thresholds by the last exit's, if it is left out.

    Raises:
      UserError: another number of them, not a number, or a last one that lets images go nowhere.
    """
    try:
        given = tuple(float(t) for t in thresholds)
    except (TypeError, ValueError) as error:
        raise UserError(f"thresholds={thresholds!r} are no sequence of numbers.") from error
    if len(given) == stages - 1:
        given = (*given, ALWAYS)
    if len(given) != stages:
        raise UserError(
            f"{len(given)} thresholds for {stages} exits; give {stages - 1}, from the first exit "
            "to the last but one."
        )
    if not np.isfinite(given).all() or min(given) < 0:
        raise UserError(f"thresholds={given}: each is a number from 0 up.")
    if given[-1] != ALWAYS:
        raise UserError(
            f"thresholds={given} go from the first exit to the last, which answers all that are "
            f"left: the last threshold is {ALWAYS:g}, or is left out."
        )
    return given


def leave(certain: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The exit, from 0, that each image leaves at: [n, stages] -> [n].

    Raises:
      UserError: see `check`.
    """
    reached = certain >= np.asarray(check(thresholds, certain.shape[1]))
    reached[:, -1] = True
    return reached.argmax(axis=1)


def judge(scores: Scores, thresholds: Sequence[float], exit_macs: np.ndarray) -> Point:
    """Accuracy and mean cost of a set of images under thresholds.

    The cost is sum_k (n_k / n) * cost_k, cost_k all that is computed up to exit k.

    Args:
      scores: of the images.
      thresholds: see `check`.
      exit_macs: [stages], see `DVT.exit_macs`.
    """
    exits = leave(scores.certainty, thresholds)
    shares = np.bincount(exits, minlength=len(exit_macs)) / len(exits)
    right = scores.correct[np.arange(len(exits)), exits].mean()
    complete = check(thresholds, len(exit_macs))
    return Point(complete, tuple(shares.tolist()), float(shares @ exit_macs), 100 * float(right))


def geometric(certain: np.ndarray, q: float) -> tuple[float, ...]:
    """Thresholds by which a share proportional to q**k leaves at exit k, as in the official code.

    Args:
      certain: [n, stages].
      q: below 1 most leave early; the official code takes p / 20 for p in `GEOMETRIC`.
    """
    share = q ** np.arange(1.0, certain.shape[1] + 1)
    return by_shares(certain, share / share.sum())


def by_shares(certain: np.ndarray, share: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """Thresholds by which given shares of all images leave at each exit.

    Exit by exit, the floor(n * share)-th most certain of the images still there sets the threshold,
    and all that reach it are gone. Where no image is to leave, or too few are left, none does.

    Args:
      certain: [n, stages].
      share: [stages], of all images; the last one's follows from the others.
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
    """The published curve: thresholds for each p fitted on one set, judged on another."""
    return [judge(held_out, geometric(fit.certainty, p / 20), exit_macs) for p in steps]


def geometric_within(
    certain: np.ndarray, exit_macs: np.ndarray, budget: float
) -> tuple[float, ...]:
    """The geometric thresholds that spend most of a budget; needs no labels.

    Args:
      certain: [n, stages].
      exit_macs: [stages].
      budget: mean multiply-accumulates per image.

    Raises:
      UserError: the budget is below the first exit's cost.
    """
    check_budget(budget, exit_macs)
    everything = Scores(certain, np.zeros(certain.shape, bool))
    all_first = (ALWAYS,) * len(exit_macs)
    tried = [all_first, *(geometric(certain, q) for q in np.geomspace(0.02, 50.0, 400))]
    costs = [judge(everything, thresholds, exit_macs).macs for thresholds in tried]
    fitting = [(cost, t) for cost, t in zip(costs, tried, strict=True) if cost <= budget]
    return max(fitting)[1]


def search(
    fit: Scores, exit_macs: np.ndarray, budget: float, *, seed: int = 0
) -> tuple[float, ...]:
    """Thresholds that are right most often within a budget, by differential evolution.

    The paper speaks of a genetic algorithm; which, it does not say: ours is SciPy's differential
    evolution over the shares of the images still there that leave at each exit. It starts from the
    geometric thresholds, so on the fitted images it is never worse than they are.

    Args:
      fit: images to fit on.
      exit_macs: [stages].
      budget: mean multiply-accumulates per image.
      seed: of the search.

    Raises:
      UserError: the budget is below the first exit's cost.
    """
    check_budget(budget, exit_macs)
    start = geometric_within(fit.certainty, exit_macs, budget)
    if len(exit_macs) == 1:
        return start
    most = budget * len(fit.certainty)

    def thresholds_for(leaving: np.ndarray) -> tuple[float, ...]:
        return _thresholds_for(fit.certainty, leaving, exit_macs, most)

    def loss(leaving: np.ndarray) -> float:
        point = judge(fit, thresholds_for(leaving), exit_macs)
        spent = point.macs / exit_macs[-1]
        # Any excess outweighs all accuracy; of equal accuracy the cheaper is better.
        return (1000 if point.macs > budget else -point.top1) + 1e-3 * spent

    found = optimize.differential_evolution(
        loss,
        [(0.0, 1.0)] * (len(exit_macs) - 1),
        x0=_leaving(fit.certainty, start),
        rng=np.random.default_rng(seed),
        **_SEARCH,
    )
    candidates = [start, thresholds_for(found.x)]
    points = [judge(fit, thresholds, exit_macs) for thresholds in candidates]
    return max((p for p in points if p.macs <= budget), key=lambda p: (p.top1, -p.macs)).thresholds


def check_budget(budget: float, exit_macs: np.ndarray) -> None:
    """Raises UserError for a budget below the first exit's cost; both in multiply-accumulates."""
    if not budget >= exit_macs[0]:
        raise UserError(
            f"A budget of {budget / 1e9:.4g} GMACs is below the cost of the first exit, "
            f"{exit_macs[0] / 1e9:.4g} GMACs, which every image has to pay."
        )


def _thresholds_for(
    certain: np.ndarray, leaving: np.ndarray, exit_macs: np.ndarray, most: float
) -> tuple[float, ...]:
    """Thresholds by which those shares of the images still there leave, more of them if need be.

    Args:
      certain: [n, stages].
      leaving: [stages - 1] of 0 to 1.
      exit_macs: [stages].
      most: multiply-accumulates for all images together. So many more leave at the last exit but
        one that it is enough, where that can be.
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
    """The reverse of `_thresholds_for`."""
    exits = leave(certain, thresholds)
    stages = certain.shape[1]
    gone = np.bincount(exits, minlength=stages)
    there = len(exits) - np.concatenate([[0], np.cumsum(gone)[:-1]])
    return np.clip(gone[:-1] / np.maximum(there[:-1], 1), 0.0, 1.0)
