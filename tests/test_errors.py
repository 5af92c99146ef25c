"""How commands end, in processes of their own, and places tried before the work."""

import os
import subprocess
import sys

import pytest

from msvit_jax import errors
from msvit_jax.errors import UserError

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
    ("body", "message"),
    [
        ("raise errors.UserError('mend it')", b"error: mend it\n"),
        ("open('/nowhere/x')", b"error: '/nowhere/x': No such file or directory\n"),
        ("raise OSError(28, 'No space left on device')", b"error: No space left on device\n"),
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


def test_places_are_tried_and_left_as_they_were(tmp_path):
    (tmp_path / "file").write_text("mine")
    errors.check_writable(tmp_path / "a" / "b", "--out")
    errors.check_writable(tmp_path, "--out")
    for bad in (tmp_path / "file", tmp_path / "file" / "x", "/proc/x", "/dev/null/x"):
        with pytest.raises(UserError, match=f"--out='{bad}' cannot be written"):
            errors.check_writable(bad, "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
