"""Answers written to a file while they come, so that an end before the end loses none of them."""

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
    r"""A new .csv or .jsonl file with a row for each image, in the order in which they are done.

    A row has the fields of `COLUMNS`; of a file that could not be read only `file` and `error`.
    JSON has a file's name as Python has it, so that any name comes back as it was; in CSV what is
    no text is escaped as '\xe9'.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Makes the file.

        Args:
          path: of the file, which does not exist.

        Raises:
          UserError: another suffix, a file that exists, or one that cannot be written.
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
        """Appends rows; they are in the file when this returns."""
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
