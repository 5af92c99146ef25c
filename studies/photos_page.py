"""The page and the plot of studies/photos.py, from the figures of its arms."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot
from tables import markdown, with_spread

Figures = dict[str, Any]
UNTRAINED, SPEED = "untrained", "speed"  # names of what is no arm
TARGETS = (24.0, 25.0, 32.0, 34.0, 38.4, 40.0, 48.0)  # mean tokens of 64


def points(results: Mapping[str, Mapping[str, Figures]]) -> dict[str, list[tuple[float, ...]]]:
    """(tokens, GMACs, top-1 of each seed ...) of each arm as it was trained."""
    found = {}
    for name, by_seed in results.items():
        rows = [f["figures"] for f in by_seed.values() if "top1" in f["figures"]]
        rows = [] if name in (UNTRAINED, SPEED) else rows
        if rows:
            tokens, macs = (
                float(np.mean([r[k] for r in rows])) for k in ("tokens_mean", "gmacs_mean")
            )
            found[name] = [(tokens, macs, *(r["top1"] for r in rows))]
    return found


def write_page(results: Mapping[str, Mapping[str, Figures]], out: pathlib.Path) -> None:
    """Writes photos.md and photos.png from the figures of all arms."""
    trained = points(results)
    dense = trained["dense"][0][1]
    speeds = _speeds(results)
    rows = [
        [
            *(name, f"{tokens:.1f}", f"{macs / dense:.3f}", with_spread(top1), str(len(top1))),
            f"{speeds[name]['images_per_second']:,.0f}" if name in speeds else "",
        ]
        for name, ((tokens, macs, *top1),) in trained.items()
    ]
    head = ["arm", "tokens", "MACs over dense's", "top-1 (%)", "seeds", "images/s"]
    parts = [HEADER, markdown(head, rows)]
    if learned := [n for n, f in results.items() if any("at_tokens" in x for x in f.values())]:
        head = ["tokens asked for", *learned]
        cells = [[f"{target:g}", *(_at(results[n], target) for n in learned)] for target in TARGETS]
        parts += [THRESHOLDS, markdown(head, cells)]
    if cascades := [n for n, f in results.items() if any("curve" in x for x in f.values())]:
        parts += [EXITS, markdown(["cascade", "", "GMACs", "top-1 (%)"], _exits(results, cascades))]
    if found := results.get(UNTRAINED):
        seeds = [of_seed["figures"] for of_seed in found.values()]
        cells = []
        for name, judged in seeds[0].items():
            for index in range(len(judged)):
                same = [s[name][index] for s in seeds if name in s]
                tokens, macs = (
                    np.mean([r[k] for r in same]) for k in ("tokens_mean", "gmacs_mean")
                )
                top1 = with_spread([r["top1"] for r in same])
                cells.append([name, f"{tokens:.1f}", f"{macs / dense:.3f}", top1])
        parts += [
            AS_IT_IS,
            markdown(["dense's weights", "tokens", "MACs over dense's", "top-1 (%)"], cells),
        ]
    (out / "photos.md").write_text("\n\n".join(parts) + "\n")
    draw(trained, curves(results, dense), dense, _speeds(results), out)


def curves(
    results: Mapping[str, Mapping[str, Figures]], dense: float
) -> dict[str, list[tuple[float, float]]]:
    """(MACs over dense's, top-1) along each arm's own curve, of the first seed."""
    found = {}
    for name, by_seed in results.items():
        first = next(iter(by_seed.values()))
        rows = first.get("at_tokens", [])
        if name.startswith("msvit"):
            found[name] = [(r["gmacs_mean"] / dense, r["top1"]) for r in rows]
        elif "curve" in first:
            fitted = [r for r in first["curve"] if r["kind"] == "search"]
            found[name] = [(r["gmacs_mean"] / dense, r["top1"]) for r in fitted]
    return {name: sorted(points) for name, points in found.items() if points}


def _speeds(results: Mapping[str, Mapping[str, Figures]]) -> Figures:
    measured = [found["figures"] for found in results.get(SPEED, {}).values()]
    return measured[0] if measured else {}


def _at(by_seed: Mapping[str, Figures], target: float) -> str:
    rows = [r for f in by_seed.values() for r in f.get("at_tokens", []) if r["asked"] == target]
    if not rows:
        return ""
    tokens = np.mean([r["tokens_mean"] for r in rows])
    return f"{with_spread([r['top1'] for r in rows])} at {tokens:.1f}"


def _exits(results: Mapping[str, Mapping[str, Figures]], names: Sequence[str]) -> list[list[str]]:
    rows = []
    for name in names:
        curves = [f["curve"] for f in results[name].values() if "curve" in f]
        for row in curves[0]:
            if row["kind"] != "geometric":
                kind = row["kind"] if row["budget"] is None else f"at most {row['budget']:.3f}"
                same = [
                    r
                    for c in curves
                    for r in c
                    if (r["kind"], r["budget"]) == (row["kind"], row["budget"])
                ]
                macs = np.mean([r["gmacs_mean"] for r in same])
                rows.append([name, kind, f"{macs:.3f}", with_spread([r["top1"] for r in same])])
    return rows


def draw(
    trained: Mapping[str, list[tuple[float, ...]]],
    curves: Mapping[str, list[tuple[float, float]]],
    dense: float,
    speeds: Mapping[str, Any],
    out: pathlib.Path,
) -> None:
    """Draws top-1 over MACs, and over images/s where they were measured."""
    count = 2 if speeds else 1
    figure, plots = pyplot.subplots(
        1, count, figsize=(7.5 * count, 5.5), constrained_layout=True, squeeze=False, sharey=True
    )
    macs_of = {name: rows[0][1] / dense for name, rows in trained.items()}
    titles = ("MACs of an image, over the dense model's", "images/s, over the dense model's")
    ratios = [macs_of]
    if speeds:
        rate = speeds["dense"]["images_per_second"]
        ratios.append({name: x["images_per_second"] / rate for name, x in speeds.items()})
    for axes, places, title in zip(plots[0], ratios, titles, strict=False):
        for name, x in places.items():
            top1 = float(np.mean(trained[name][0][2:]))
            learned = "msvit" in name or name in ("both", "gate_alone")
            axes.plot(x, top1, "o" if learned else "s", color="C1" if learned else "C0")
            where = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(name, (x, top1), **where)
        axes.set(xlabel=title)
        axes.grid(alpha=0.3)
    lines = [name for name in curves if name in ("msvit", "msvit_narrow", "dvt_2", "dvt_3")]
    for index, name in enumerate(lines):
        plots[0][0].plot(*zip(*curves[name], strict=True), "-", color=f"C{index + 2}", label=name)
    if lines:
        plots[0][0].legend(title="one model, many budgets", loc="lower right")
    plots[0][0].set(ylabel="top-1 (%)")
    figure.savefig(out / "photos.png", dpi=120)
    pyplot.close(figure)


HEADER = """# Photographs

Made by `python studies/photos.py`, whose docstring says what each arm is: mean and standard
deviation over seeds, the whole validation split, every model after its last step; tokens and MACs
are means over images; images/s through the Predictor, from pixels in memory to answers, in turns
with all others, the median of seven rounds."""
THRESHOLDS = """## One gate at several thresholds

Top-1 and tokens, with thresholds fitted to a mean number of tokens on training images."""
EXITS = """## Cascades

Every exit alone, and exits chosen per image by thresholds fitted on training images."""
AS_IT_IS = """## Without training"""
