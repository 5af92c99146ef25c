"""The page and the plot of studies/camvid.py, from the figures of its arms."""

import pathlib

import numpy as np
from arms_page import Results, at_tokens, draw, points, row, speeds
from tables import markdown

TARGETS = (287.0, 338.0, 397.0, 450.0)  # mean tokens of 676


def write_page(results: Results, out: pathlib.Path) -> None:
    """Writes camvid.md and camvid.png from the figures of all arms."""
    trained, measured = points(results, "miou"), speeds(results)
    dense = trained["dense"][1]
    rows = [
        [
            *row(name, point, dense, measured),
            *(_mean(results, name, key) for key in ("pixel_accuracy", "val_miou")),
        ]
        for name, point in trained.items()
    ]
    head = ["arm", "tokens", "MACs over dense's", "mIoU (%)", "seeds", "images/s"]
    parts = [HEADER, markdown([*head, "pixel accuracy (%)", "mIoU of val (%)"], rows)]
    if learned := [n for n, f in results.items() if any(x.get("at_tokens") for x in f.values())]:
        head = ["tokens asked for", *learned]
        cells = [
            [f"{target:g}", *(at_tokens(results[n], "miou", target) for n in learned)]
            for target in TARGETS
        ]
        parts += [THRESHOLDS, markdown(head, cells)]
    parts += [CLASSES, _classes(results, list(trained)), PUBLISHED]
    (out / "camvid.md").write_text("\n\n".join(parts) + "\n")
    first = {name: next(iter(by_seed.values())) for name, by_seed in results.items()}
    curves = {
        name: sorted((r["gmacs_mean"] / dense, r["miou"]) for r in found["at_tokens"])
        for name, found in first.items()
        if found.get("at_tokens")
    }
    draw(trained, curves, measured, "mIoU (%)", out / "camvid.png")


def _mean(results: Results, name: str, key: str) -> str:
    values = [f["figures"][key] for f in results[name].values() if key in f["figures"]]
    return f"{np.mean(values):.2f}" if values else ""


def _classes(results: Results, names: list[str]) -> str:
    """A table of every class's IoU, means over seeds; classes without one are left blank."""
    of = {
        name: [f["figures"]["iou"] for f in results[name].values() if "iou" in f["figures"]]
        for name in names
    }
    classes = list(dict.fromkeys(c for rows in of.values() for r in rows for c in r))
    cells = []
    for name in names:
        values = [[r[c] for r in of[name] if r.get(c) is not None] for c in classes]
        cells.append([name, *(f"{np.mean(v):.1f}" if v else "" for v in values)])
    return markdown(["arm", *classes], cells)


HEADER = """# CamVid

Made by `python studies/camvid.py`, whose docstring says what each arm is: mIoU on the 233 test
images at their own 360 x 480 px, looked at in two windows of the arm's size, every model after its
last step; tokens and MACs (of encoder and decoder) are means over windows; images/s through the
Predictor, from the windows of an image to the logits of their patches, in turns with all others,
the median of seven rounds."""
THRESHOLDS = """## One gate at several thresholds

mIoU and tokens, with thresholds fitted to a mean number of tokens on training images."""
CLASSES = """## Classes

IoU (%) of every class on the test images."""
PUBLISHED = """## Beside published figures

On the same images and 11 classes SegNet reports about 60 % mIoU on test when trained longest, and
BiSeNet (2018, ResNet-18) 68.7 %. Neither is comparable in full: BiSeNet looks at 720 x 960 px, four
times our pixels, in which poles, signs and pedestrians are twice as wide; SegNet, at our size,
starts from VGG on ImageNet; recipes, numbers of epochs and training images (with or without val)
differ. Here one encoder, pretrained without labels, is trained for minutes, without photometric
distortion and without several scales in evaluation, so what the table compares is its arms with one
another."""
