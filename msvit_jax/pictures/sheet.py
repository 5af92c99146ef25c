"""Arranges pictures of examples on one sheet: strips with captions under common headings."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from msvit_jax import paths

Picture = np.ndarray  # uint8 [h, w, 3]

HEAT_OPACITY = 0.6  # share of the heat colors over the image
_HEAT = matplotlib.colormaps["inferno"]
_INK = (24, 24, 24)
_WRONG_INK = (190, 20, 20)
_MARGIN = 8
_LINE = 32  # height of a line of text


@dataclasses.dataclass(frozen=True)
class Column:
    """The heading of one picture of every strip, with the labels of its color bar, if any."""

    title: str
    heat: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Strip:
    """One example: pictures of equal height in a row, with a caption below."""

    pictures: Sequence[Picture]
    caption: str
    wrong: bool = False  # the caption is red when the prediction is known to be wrong


def panel(
    strips: Sequence[Strip], headings: Sequence[Column] = (), *, columns: int = 1, legend: str = ""
) -> Picture:
    """Arranges strips of one size in one or several columns on a white background.

    Args:
      strips: Strips, all with the same number and sizes of pictures.
      headings: Headings, one for each picture of a strip, shown once at the top; empty: no top
        line.
      columns: Number of columns of strips.
      legend: Line at the bottom; empty: none.

    Raises:
      ValueError: There are no strips, or their pictures differ in size.
    """
    sizes = {tuple(picture.shape for picture in strip.pictures) for strip in strips}
    if len(sizes) != 1:
        raise ValueError(f"A panel needs strips of one size, got these sizes: {sorted(sizes)}.")
    drawn = [_draw_strip(strip) for strip in strips]
    columns = min(columns, len(drawn))
    drawn += [np.full_like(drawn[0], 255)] * (-len(drawn) % columns)
    rows = [np.hstack(drawn[i : i + columns]) for i in range(0, len(drawn), columns)]
    if headings:
        widths = [picture.shape[1] for picture in strips[0].pictures]
        rows.insert(0, np.hstack([_draw_headings(headings, widths)] * columns))
    if legend:
        rows.append(_draw_text(legend, rows[0].shape[1]))
    return np.vstack(rows)


def save(picture: Picture, path: pathlib.Path | str) -> pathlib.Path:
    """Writes a PNG, creating its parent folders, and returns its path."""
    path = paths.parse(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with paths.whole(path) as part:
        Image.fromarray(picture).save(part, format="PNG")
    return path


def heat(share: np.ndarray, gray: np.ndarray, opacity: float = HEAT_OPACITY) -> Picture:
    """Blends shares [h, w], dark for 0 to yellow for 1, with gray values [h, w] of 0 to 255."""
    colors = 255 * _HEAT(share)[..., :3]
    return np.rint(opacity * colors + (1 - opacity) * gray[..., None]).astype(np.uint8)


def _draw_strip(strip: Strip) -> Picture:
    """The pictures with margins around them and the caption below."""
    gap = _white(strip.pictures[0].shape[0], _MARGIN)
    parts = [part for picture in strip.pictures for part in (gap, picture)]
    row = np.hstack([*parts, gap])
    color = _WRONG_INK if strip.wrong else _INK
    caption = _draw_text(strip.caption, row.shape[1], color)
    return np.vstack([row, caption])


def _draw_headings(headings: Sequence[Column], widths: Sequence[int]) -> Picture:
    """The line of headings above the pictures; a strip is one margin wider than its columns."""
    cells = []
    for heading, width in zip(headings, widths, strict=True):
        bar = _color_bar(heading.heat, width // 3) if heading.heat else _white(_LINE, 0)
        title = _draw_text(heading.title, _MARGIN + width - bar.shape[1])
        cells.append(np.hstack([title, bar]))
    return np.hstack([*cells, _white(_LINE, _MARGIN)])


def _color_bar(ends: tuple[str, str], width: int) -> Picture:
    """The heat map's colors over medium gray, between the labels of their ends."""
    gray = np.full((_LINE, width), 128)
    bar = heat(np.tile(np.linspace(0, 1, width), (_LINE, 1)), gray)
    bar[: _LINE // 3] = bar[-(_LINE // 3) :] = 255
    low, high = (_draw_text(end, math.ceil(_font().getlength(end)) + 2 * _MARGIN) for end in ends)
    return np.hstack([low, bar, high])


def _white(height: int, width: int) -> Picture:
    return np.full((height, width, 3), 255, np.uint8)


def _draw_text(text: str, width: int, color: tuple[int, int, int] = _INK) -> Picture:
    """One line of text on white, shortened with an ellipsis if it does not fit."""
    font = _font()
    room = width - 2 * _MARGIN
    if font.getlength(text) > room:
        while text and font.getlength(text + "…") > room:
            text = text[:-1]
        text += "…"
    canvas = Image.new("RGB", (width, _LINE), "white")
    ImageDraw.Draw(canvas).text((_MARGIN, _LINE // 2), text, fill=color, font=font, anchor="lm")
    return np.asarray(canvas)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """The font of matplotlib: the same on every machine, with more characters than Latin-1."""
    path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), 14)
