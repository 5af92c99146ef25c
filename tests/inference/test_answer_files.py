"""Files of answers against the readers of the standard library."""

import csv
import json
import os

import pytest

from msvit_jax.errors import UserError
from msvit_jax.inference.answer_files import COLUMNS, AnswerFile

NAME = os.fsdecode(b'caf\xe9, "a"\n.jpg')
GOOD = {"file": NAME, "label": 1, "class": "a, b", "probability": 0.25, "tokens": 9}
BAD = {"file": "b.jpg", "error": "it is empty (0 bytes)"}


def test_csv(tmp_path):
    with AnswerFile(tmp_path / "new" / "a.csv") as out:
        out.write([GOOD])
        out.write([BAD])
        text = (tmp_path / "new" / "a.csv").read_text(encoding="utf-8")  # there before the end
    first, second = csv.DictReader(text.splitlines())
    assert tuple(first) == COLUMNS
    assert first == {
        **{"file": 'caf\\xe9, "a"\\n.jpg', "label": "1", "class": "a, b"},
        **{"probability": "0.25", "tokens": "9", "error": ""},
    }
    assert {key: value for key, value in second.items() if value} == BAD


def test_jsonl_keeps_names_of_any_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswerFile(path) as out:
        out.write([GOOD, BAD])
        rows = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert rows == [GOOD, BAD]
    assert os.fsencode(rows[0]["file"]) == b'caf\xe9, "a"\n.jpg'


def test_places_that_cannot_be_written_are_told(tmp_path):
    (tmp_path / "there.csv").write_text("mine")
    for name, message in (
        ("a.txt", r"to \.csv or \.jsonl"),
        ("there.csv", "exists and is left as it is"),
        ("there.csv/a.csv", "--out=.* is a file"),
    ):
        with pytest.raises(UserError, match=message):
            AnswerFile(tmp_path / name)
    assert (tmp_path / "there.csv").read_text() == "mine"
