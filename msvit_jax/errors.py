"""Errors that a user can mend: one message that names the thing and the remedy."""

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence

from absl import app


class UserError(ValueError):
    """Bad input; the message says what is wrong and what to do about it."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the candidate closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command-line main; a `UserError` ends it with its message alone and exit code 2."""

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded)
