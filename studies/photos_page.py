"""The page and the plot of studies/photos.py, from the figures of its arms."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from arms_page import Figures, at_tokens, draw, points, row, speeds
from tables import markdown, with_spread

UNTRAINED = "untrained"  # name of what is no arm
TARGETS = (24.0, 32.0, 36.0, 38.4, 48.0)  # mean tokens of 64
DRAWN = ("msvit", "msvit_38", "dvt_2", "dvt_3")  # curves in the plot


def write_page(results: Mapping[str, Mapping[str, Figures]], out: pathlib.Path) -> None:
    """Writes photos.md and photos.png from the figures of all arms."""
    trained, measured = points(results, "top1", leave=(UNTRAINED,)), speeds(results)
    for name in ("dvt_2", "dvt_3"):
        if name in measured and name in results:
            measured[name] = {**measured[name], "quality": _at_speed(results[name])}
    dense = trained["dense"][1]
    rows = [row(name, point, dense, measured) for name, point in trained.items()]
    head = ["arm", "tokens", "MACs over dense's", "top-1 (%)", "seeds", "images/s"]
    parts = [HEADER, markdown(head, rows)]
    parts += _thresholds(results)
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
    drawn = {name: line for name, line in curves(results, dense).items() if name in DRAWN}
    small = {
        n: p for n, p in trained.items() if not n.endswith(("_168", "_126"))
    }  # one dense model
    draw(small, drawn, measured, "top-1 (%)", out / "photos.png")


def _thresholds(results: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """The tables of gates at several thresholds, one for each resolution."""
    parts = []
    for larger, times in ((False, 1.0), (True, 144 / 64)):
        learned = [
            name
            for name, by_seed in results.items()
            if name.endswith("_168") == larger and any("at_tokens" in f for f in by_seed.values())
        ]
        targets = [times * target for target in TARGETS]
        cells = [
            [f"{target:g}", *(at_tokens(results[n], "top1", target) for n in learned)]
            for target in targets
        ]
        if learned:
            parts.append(markdown(["tokens asked for", *learned], cells))
    return [THRESHOLDS, *parts] if parts else []


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


def _at_speed(by_seed: Mapping[str, Figures]) -> float:
    """Top-1 (%) of a cascade with the exits at which its speed is measured: the costliest fitted.

    It is a mean over seeds.
    """
    fitted = [
        [r for r in of_seed["curve"] if r["kind"] == "search"] for of_seed in by_seed.values()
    ]
    return float(np.mean([max(rows, key=lambda r: r["budget"])["top1"] for rows in fitted]))


def _exits(results: Mapping[str, Mapping[str, Figures]], names: Sequence[str]) -> list[list[str]]:
    rows = []
    for name in names:
        curves = [f["curve"] for f in results[name].values() if "curve" in f]
        for first in curves[0]:
            if first["kind"] != "geometric":
                kind = (
                    first["kind"] if first["budget"] is None else f"at most {first['budget']:.3f}"
                )
                same = [
                    r
                    for c in curves
                    for r in c
                    if (r["kind"], r["budget"]) == (first["kind"], first["budget"])
                ]
                macs = np.mean([r["gmacs_mean"] for r in same])
                rows.append([name, kind, f"{macs:.3f}", with_spread([r["top1"] for r in same])])
    return rows


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
