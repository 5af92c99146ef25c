"""Errors that a user can mend: one message that names the thing and the remedy."""

import difflib
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence

from absl import app


class UserError(ValueError):
    """Bad input; the message says what is wrong and what to do about it."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the candidate closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_writable(path: str | pathlib.Path, name: str) -> None:
    """Tries, before any work, that a file or folder can be made or written to; leaves nothing.

    Args:
        path: what will be written: a folder, or a file in one; it need not be there yet.
        name: what the message calls it, for instance '--out'.

    Raises:
        UserError: it cannot be written.
    """
    place = pathlib.Path(path).absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        if not os.path.isdir(place):
            raise NotADirectoryError(0, f"{place} is no folder")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{name}={str(path)!r} cannot be written: {reason}.") from error


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command-line main; what a user can mend ends it with one message and exit code 2.

    That is a `UserError`, or an `OSError`: a full disk, a file that may not be read.
    """

    def guarded(argv: Sequence[str]) -> None:
        for stream in (sys.stdout, sys.stderr):
            # A file's name need not be text; it is printed with escapes instead of not at all.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            main(argv)
            sys.stdout.flush()
        except UserError as error:
            _stop(str(error))
        except BrokenPipeError:  # whoever reads the output wants no more of it: head, less
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            named = "" if error.filename is None else f"{str(error.filename)!r}: "
            _stop(f"{named}{error.strerror or error}")

    app.run(guarded)


def _stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
