"""Sheets of several examples: where the pictures lie and whether text stays in its place."""

import numpy as np
import pytest
from PIL import Image

from msvit_jax import visualize
from msvit_jax.pictures import sheet

_CAPTION = "label 3 · predicted 8 · 28 of 64 tokens"


def _strip(value, caption=_CAPTION, wrong=False, size=256):
    picture = np.full((size, size, 3), value, np.uint8)
    return visualize.Strip((picture, picture), caption, wrong)


def test_every_picture_is_on_the_sheet_in_reading_order():
    sheet = visualize.panel([_strip(v) for v in (1, 2, 3)], columns=2)
    rows, columns = (sheet.shape[0] // 2, sheet.shape[1] // 2)
    for index, value in enumerate((1, 2, 3)):
        row, column = divmod(index, 2)
        cell = sheet[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
        assert (cell == value).all(axis=-1).sum() == 2 * 256 * 256
    assert (sheet[rows:, columns:] == 255).all()


def test_captions_are_written_and_wrong_predictions_are_red():
    right, wrong = (
        visualize.panel([_strip(0, wrong=flag)])[257:].astype(int) for flag in (False, True)
    )
    assert (right < 100).any()
    redness = (wrong[..., 0] - wrong[..., 1]).max(), (right[..., 0] - right[..., 1]).max()
    assert redness[0] > 100 > redness[1]


def test_a_long_caption_ends_inside_its_strip():
    sheet = visualize.panel([_strip(0, caption="a very long class name, " * 20)])
    assert sheet.shape == visualize.panel([_strip(0)]).shape
    assert (sheet[257:, -4:] == 255).all()


def test_headings_stand_above_their_columns_and_the_heat_has_a_color_bar():
    plain = visualize.panel([_strip(7)])
    headings = (visualize.Column("image"), visualize.Column("gate", heat=("P(fine)  0", "1")))
    sheet = visualize.panel([_strip(7)], headings)
    top = sheet[: sheet.shape[0] - plain.shape[0]]
    np.testing.assert_array_equal(sheet[top.shape[0] :], plain)
    colored = np.flatnonzero(np.ptp(top.astype(int), axis=-1).max(axis=0) > 40)
    assert colored.min() > sheet.shape[1] / 2  # in the second column only
    assert colored.size > 50


def test_the_legend_is_one_line_at_the_bottom():
    plain = visualize.panel([_strip(7)])
    sheet = visualize.panel([_strip(7)], legend="yellow: this")
    np.testing.assert_array_equal(sheet[: len(plain)], plain)
    assert (sheet[len(plain) :] < 100).any()


def test_strips_of_different_sizes_do_not_make_a_panel():
    with pytest.raises(ValueError, match="strips of one size"):
        visualize.panel([_strip(0), _strip(0, size=300)])
    with pytest.raises(ValueError, match="strips of one size"):
        visualize.panel([])


def test_a_saved_picture_reads_back_unchanged(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    path = visualize.save(picture, tmp_path / "new" / "folder" / "picture.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)


@pytest.mark.fault(12)
def test_a_picture_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    picture = np.full((8, 8, 3), 9, np.uint8)
    path = sheet.save(picture, tmp_path / "picture.png")
    before = path.read_bytes()

    def killed(image, file, **options):
        with open(file, "wb") as half:
            half.write(before[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        sheet.save(picture, path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(path.name, before)]
