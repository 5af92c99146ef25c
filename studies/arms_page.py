"""What the pages of studies of many arms share: an arm's point, its speed, and the plot."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot
from tables import with_spread

Figures = dict[str, Any]
Results = Mapping[str, Mapping[str, Figures]]
SPEED = "speed"  # name of what measures speed
LEARNED = ("msvit", "both", "gate_alone")  # what names of arms with a learned gate begin with


def points(results: Results, key: str, leave: Sequence[str] = ()) -> dict[str, tuple[float, ...]]:
    """(tokens, GMACs, quality of each seed ...) of each arm as it was trained.

    Args:
      results: Figures by arm and seed.
      key: Name of the figure that tells quality.
      leave: Names of what is no arm, besides the measurement of speed.
    """
    found = {}
    for name, by_seed in results.items():
        rows = [f["figures"] for f in by_seed.values() if key in f["figures"]]
        if rows and name not in (*leave, SPEED):
            tokens, macs = (
                float(np.mean([r[k] for r in rows])) for k in ("tokens_mean", "gmacs_mean")
            )
            found[name] = (tokens, macs, *(r[key] for r in rows))
    return found


def speeds(results: Results) -> Figures:
    """Measured speeds by arm, that of "longer" being dense's; empty if none were measured."""
    measured = [found["figures"] for found in results.get(SPEED, {}).values()]
    return {**measured[0], "longer": measured[0]["dense"]} if measured else {}


def row(name: str, point: tuple[float, ...], dense: float, measured: Figures) -> list[str]:
    """An arm's cells: name, tokens, MACs over dense's, quality, number of seeds and images/s."""
    tokens, macs, *quality = point
    rate = _rate(measured[name]["images_per_second"]) if name in measured else ""
    cells = [name, f"{tokens:.1f}", f"{macs / dense:.3f}", with_spread(quality)]
    return [*cells, str(len(quality)), rate]


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 20 else f"{rate:.1f}"


def at_tokens(by_seed: Mapping[str, Figures], key: str, target: float) -> str:
    """A cell: quality, and the tokens that a threshold fitted to a mean of `target` gives."""
    rows = [r for f in by_seed.values() for r in f.get("at_tokens", []) if r["asked"] == target]
    if not rows:
        return ""
    tokens = np.mean([r["tokens_mean"] for r in rows])
    return f"{with_spread([r[key] for r in rows])} at {tokens:.1f}"


def draw(
    trained: Mapping[str, tuple[float, ...]],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    measured: Figures,
    title: str,
    file: pathlib.Path,
) -> None:
    """Draws quality over MACs, and over images/s where they were measured.

    Args:
      trained: Arms from `points`.
      curves: (MACs over dense's, quality) along a model's own curve, by name; drawn as lines.
      measured: Speeds from `speeds`; an arm that has another quality at its speed than as it was
        trained has it as "quality".
      title: Name of the quality, with its unit.
      file: Path of the picture.
    """
    count = 2 if measured else 1
    figure, plots = pyplot.subplots(
        1, count, figsize=(7.5 * count, 5.5), constrained_layout=True, squeeze=False, sharey=True
    )
    dense = trained["dense"][1]
    titles = ("MACs of an image, over the dense model's", "images/s, over the dense model's")
    ratios = [{name: point[1] / dense for name, point in trained.items()}]
    if measured:
        rate = measured["dense"]["images_per_second"]
        ratios.append(
            {n: x["images_per_second"] / rate for n, x in measured.items() if n in trained}
        )
    for axes, places, label in zip(plots[0], ratios, titles, strict=False):
        for name, x in places.items():
            quality = float(np.mean(trained[name][2:]))
            if places is not ratios[0]:
                quality = measured[name].get("quality", quality)
            learned = any(part in name for part in LEARNED)
            axes.plot(x, quality, "o" if learned else "s", color="C1" if learned else "C0")
            where = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(name, (x, quality), **where)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    for index, (name, line) in enumerate(curves.items()):
        plots[0][0].plot(*zip(*line, strict=True), "-", color=f"C{index + 2}", label=name)
    if curves:
        plots[0][0].legend(title="one model, many budgets", loc="lower right")
    plots[0][0].set(ylabel=title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
