"""Errors as one line, and how commands end, in processes of their own."""

import errno
import os
import re
import subprocess
import sys

import pytest

from msvit_jax import errors

# The module alone: the package would bring JAX.
PROGRAM = f"""
import runpy, types
errors = types.SimpleNamespace(**runpy.run_path({errors.__file__!r}))

def main(argv):
    BODY

errors.run(main)
"""


def _run(body, **options):
    command = [sys.executable, "-c", PROGRAM.replace("BODY", body)]
    return subprocess.run(command, capture_output=True, check=False, **options)


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


def test_arguments_beside_flags_are_refused_with_a_hint():
    errors.refuse_arguments(["train.py"])
    with pytest.raises(errors.UserError, match=r"'lr=1'; options are written --name=value\."):
        errors.refuse_arguments(["train.py", "lr=1"])


def test_choices_are_listed_with_the_nearest():
    errors.check_choice("layout", "rows", {"slots": 0, "rows": 1})
    for bad, message in (
        ("row", r"layout='row' is not one of slots, rows\. Did you mean 'rows'\?"),
        (None, r"layout=None is not one of slots, rows\.$"),
    ):
        with pytest.raises(errors.UserError, match=message):
            errors.check_choice("layout", bad, ("slots", "rows"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise errors.UserError('mend it')", b"error: mend it\n"),
        ("open('/nowhere/x')", b"error: '/nowhere/x': No such file or directory.\n"),
        (
            "raise OSError(28, 'No space left on device')",
            b"error: No space left on device; free some space there, or give another place.\n",
        ),
    ],
)
def test_what_a_user_can_mend_is_a_line(body, message):
    done = _run(body)
    assert (done.returncode, done.stderr) == (2, message)


def test_other_errors_keep_their_traceback():
    done = _run("raise RuntimeError('ours')")
    assert done.returncode == 1
    assert b"Traceback" in done.stderr


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_names_of_any_bytes_are_printed(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = _run(r"print('caf\udce9')", env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"caf\\udce9\n"


def test_a_reader_that_wants_no_more_is_no_error():
    body = "print('x' * 10**6); print('y' * 10**6)"
    command = [sys.executable, "-c", PROGRAM.replace("BODY", body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_full_disk_under_the_output_is_a_line():
    command = [sys.executable, "-c", PROGRAM.replace("BODY", "print('x')")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: No space left on device; free some space")


def test_the_traceback_of_an_error_of_the_system_can_be_had():
    command = [sys.executable, "-X", "dev", "-c", PROGRAM.replace("BODY", "open('/nowhere/x')")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert b"Traceback" in done.stderr


@pytest.mark.fault(13)
def test_a_command_that_is_terminated_cleans_up():
    done = _run(
        "import os, signal\n    try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally: print('cleaned up', flush=True)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, b"cleaned up\n", b"")
