"""Runs a process of a job under a parent that reports how it ended.

XLA ends a process with a stack of C++ when another process of its job is gone, past anything that
Python could catch. So a process of a job goes on in a child; the parent passes on what the child
prints and the signals that it gets, and says in one line why the child ended.
"""

import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

# What XLA's client and service of a job write into the error output.
_OF_XLA = re.compile(
    r"^[WEF]\d{4} [\d:.]+ +\d+ (coordination_service|preemption_sync|client\.h|service\.cc)"
    r"|^WARNING: All log messages before absl::InitializeLog"
)
_HOLD = 20.0  # seconds for which it is kept back; by then the process has ended, or it lives on
_PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


def supervise(explain: Callable[[str], str]) -> None:
    """Goes on in a child process; in the parent this does not return. Linux only.

    Args:
      explain: Function that takes what XLA wrote before it ended the child and returns why in one
        line; an empty text if it does not know.
    """
    if sys.platform != "linux":
        return
    sys.stdout.flush()
    sys.stderr.flush()
    errors_read, errors_write = os.pipe()
    parent_read, parent_write = os.pipe()
    with warnings.catch_warnings():
        # NumPy's threads, which wait for work and mind a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        os.close(errors_write)
        os.close(parent_read)
        _report(child, errors_read, explain)
    os.close(errors_read)
    os.close(parent_write)
    os.dup2(errors_write, 2)
    os.close(errors_write)
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on
    threading.Thread(target=end_with, args=(parent_read,), daemon=True, name="parent").start()


def end_with(pipe: int) -> None:
    """Ends this process at once when the other end of a pipe is gone; meant for a thread."""
    while os.read(pipe, 1):
        pass
    os._exit(1)


def _report(child: int, errors: int, explain: Callable[[str], str]) -> NoReturn:
    """Prints what the child says, and ends as it does."""
    for name in _PASSED_ON:
        signal.signal(getattr(signal, name), lambda number, _: os.kill(child, number))
    held: list[str] = []
    since = 0.0
    with os.fdopen(errors, encoding="utf-8", errors="backslashreplace") as lines:
        for line in lines:
            if held and time.monotonic() - since > _HOLD:
                _print(held)
            if held or _OF_XLA.search(line):
                since = since if held else time.monotonic()
                held.append(line)
            else:
                _print([line])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (-signal.SIGABRT, 2) and (reason := explain("".join(held))):
        if code != 2:  # else it has said so itself
            _print([f"error: {reason}\n"])
        os._exit(2)
    _print(held)
    if code < 0:
        why = " Perhaps memory was full." if -code == signal.SIGKILL else ""
        _print([f"error: this process was ended by {signal.Signals(-code).name}.{why}\n"])
    os._exit(code if code >= 0 else 128 - code)


def _print(lines: list[str]) -> None:
    sys.stderr.write("".join(lines))
    sys.stderr.flush()
    lines.clear()
