import errno
import os
import re
import subprocess
import sys

import pytest

from msvit_jax import errors

PROGRAM = """
import errno, os, sys
from msvit_jax import errors

def main(argv):
    {body}

errors.run(main)
"""


def _run(body, *options, **settings):
    command = [sys.executable, *options, "-c", PROGRAM.format(body=body)]
    settings = {"stdout": subprocess.PIPE, **settings}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **settings)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            "'/x': No space .* free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "'a': Permission.*another place"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "'a' -> 'b': Invalid"),
        (OSError(errno.EIO, None), os.strerror(errno.EIO)),
        (OSError("cannot identify image file"), "^cannot identify image file$"),
        (ValueError("one\ntwo"), "^one$"),
        (ValueError(), "^ValueError$"),
    ],
)
def test_errors_are_one_line(error, text):
    line = errors.describe(error)
    assert "\n" not in line
    assert re.search(text, line)


def test_numbers_of_flags():
    assert errors.numbers("t", ["1", "0.5"]) == (1.0, 0.5)
    for bad in (["x"], ["nan"], ["1", "inf"], [""]):
        with pytest.raises(errors.UserError, match=r"--t=.*finite numbers"):
            errors.numbers("t", bad)


def test_commands_end_with_one_line_for_any_error_of_the_system(tmp_path):
    done = _run("open('/nowhere/x', 'w')")
    assert (done.returncode, done.stderr) == (
        2,
        "error: '/nowhere/x': No such file or directory.\n",
    )
    with open("/dev/full", "w") as full:
        done = _run("print('x')", stdout=full)
    assert done.returncode == 2
    assert done.stderr == (
        "error: No space left on device; free some space there, or give another place.\n"
    )
    done = _run("open('/nowhere/x', 'w')", "-X", "dev")
    assert "Traceback" in done.stderr


def test_a_reader_that_has_gone_ends_a_command_quietly():
    read, write = os.pipe()
    os.close(read)
    done = _run("print('x' * 100000)", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
