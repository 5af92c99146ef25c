"""Errors that a user can fix: one message that names the problem and the remedy."""

import contextlib
import difflib
import errno
import io
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

# Remedies for errors of the operating system whose own messages do not name one.
_REMEDIES = {
    errno.ENOSPC: "free some space there, or give another place",
    errno.EDQUOT: "free some of your quota there, or give another place",
    errno.EFBIG: "the file system or a limit (ulimit -f) does not let files grow so large",
    errno.EACCES: "give another place, or change who may use it",
    errno.EPERM: "give another place, or change who may use it",
    errno.EROFS: "give a place that can be written",
    errno.EISDIR: "a file is needed",
    errno.ENOTDIR: "a part of that path is a file",
    errno.EEXIST: "give another place, or remove it",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ESTALE: "the network file system has lost it; try again",
}


class UserError(ValueError):
    """Bad input; the message says what is wrong and how to fix it."""


def short(value: Any, most: int = 80) -> str:
    """Returns a value as a text for a message; of one that is long, the beginning."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} letters)"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the candidate closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises UserError, which lists the choices, unless an option has one of them."""
    if value not in (known := list(choices)):
        raise UserError(
            f"{name}={value!r} is not one of {', '.join(known)}.{nearest(str(value), known)}"
        )


def numbers(flag: str, texts: Iterable[str]) -> tuple[float, ...]:
    """Reads the numbers of a flag that is a list.

    Raises:
      UserError: One of them is not a number, or not finite.
    """
    texts = list(texts)
    try:
        read = tuple(float(text) for text in texts)
    except ValueError:
        read = (math.nan,)
    if not all(map(math.isfinite, read)):
        raise UserError(f"--{flag}={','.join(texts)}: give finite numbers, separated by commas.")
    return read


def refuse_arguments(argv: Sequence[str], hint: str = "options are written --name=value") -> None:
    """Raises UserError, with a hint, for arguments of a command beside its flags."""
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; {hint}.")


def describe(error: BaseException, *, named: bool = True) -> str:
    """Describes an error in one line: the system's message, the file, and the remedy.

    Args:
      error: Error of any type.
      named: Whether the line names the file; False where the reader has its name already.
    """
    said = (str(error).strip().splitlines() or [""])[0]
    if not isinstance(error, OSError) or error.errno is None:
        return said or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    what = error.strerror or os.strerror(error.errno)
    remedy = _REMEDIES.get(error.errno)
    text = f"{' -> '.join(map(repr, names))}: {what}" if names and named else what
    return f"{text}; {remedy}." if remedy else f"{text}."


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command-line main.

    A `UserError`, or an error of the operating system, ends it with one message and exit code 2.
    `python -X dev` shows where such an error comes from. A reader of the output that has gone
    (`| head`) ends it with exit code 1 and no message.
    """
    from absl import app  # commands need it, models do not

    def guarded(argv: Sequence[str]) -> None:
        for stream in (sys.stdout, sys.stderr):
            # A file's name need not be text; it is printed with escapes instead of not at all.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            with _ended_by_sigterm():
                main(argv)
            sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
        except BrokenPipeError:
            _forget_output()
            sys.exit(1)
        except (UserError, OSError) as error:
            if sys.flags.dev_mode and isinstance(error, OSError):
                raise
            message = str(error) if isinstance(error, UserError) else describe(error)
            print(f"error: {message}", file=sys.stderr)
            _forget_output()
            sys.exit(2)

    app.run(guarded)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM an ordinary end, in which what is half done is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _forget_output() -> None:
    """Discards output that cannot be printed, so that Python ends without complaint."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
