"""Writes answers to a file as they are completed, so that an interrupted run loses none of them."""

import csv
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from msvit_jax import paths
from msvit_jax.data.image_files import shown
from msvit_jax.errors import UserError

COLUMNS = ("file", "label", "class", "probability", "tokens", "error")
SUFFIXES = (".csv", ".jsonl")


class AnswerFile:
    r"""A new .csv or .jsonl file with a row for each image, in order of completion.

    A row has the fields of `COLUMNS`; for a file that could not be read, only `file` and `error`.
    JSON stores file names as Python strings, so every name survives a round trip. CSV escapes bytes
    that are not text, as in '\xe9'.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Creates the file.

        Args:
          path: Path of the file, which must not exist.

        Raises:
          UserError: The suffix is not in `SUFFIXES`, the file exists, or it cannot be written.
        """
        path = paths.parse(path)
        if path.suffix not in SUFFIXES:
            raise UserError(f"--out={str(path)!r}: answers are written to .csv or .jsonl files.")
        if path.exists():
            raise UserError(f"{str(path)!r} exists and is left as it is; give another --out.")
        paths.check_writable(path.parent, "--out")
        self._file = path.open("x", encoding="utf-8", newline="")
        self._csv = None
        if path.suffix == ".csv":
            self._csv = csv.DictWriter(self._file, COLUMNS)
            self._csv.writeheader()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows and flushes them to the file."""
        for row in rows:
            if self._csv:
                self._csv.writerow({**row, "file": shown(row["file"])})
            else:
                self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
