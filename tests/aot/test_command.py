"""The command as a user starts it: bad input ends with one message and no traceback."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "digits_msvit.py")


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "msvit_jax.aot", f"--config={CONFIG}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed here"
)
def test_libtpu_absent():
    done = _run("--topology=v5e:2x2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: The TPU compiler, libtpu, is not installed")
    assert "pip install 'jax[tpu]==" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.tpu_compile
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]'",
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:2x2"], "Unknown topology 'v9:2x2'. Write <chip>:<chips along each axis>"),
        (["--topology=v5e:2x2", "--layouts=dense,row"], "Unknown layout 'row'. Did you mean"),
        (
            ["--topology=v5e:2x2", "--config.batch_size=30"],
            "batch_size=30 cannot be divided among 4 devices; use 28 or 32.",
        ),
        (
            ["--topology=v5e:2x2", "--layouts=budget", "--tokens=99"],
            "token_capacity=99 is not possible",
        ),
        (["--topology=v5e:2x2", "--layouts=rows", "--row_width=32"], "row_width=32 is too small"),
    ],
)
def test_bad_input(arguments, message):
    done = _run(*arguments)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert "Traceback" not in done.stderr
