"""The package as a user without extras installs it, in a virtual environment of its own."""

import os
import pathlib
import site
import subprocess
import sys

import pytest

import msvit_jax
from msvit_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
CORE = ("jax", "flax", "numpy", "safetensors")
pytestmark = pytest.mark.slow

MODEL = """
import jax, msvit_jax

model = msvit_jax.create_model("msvit_tiny_patch16_224", image_size=32, depth=1, num_classes=3)
images = jax.numpy.zeros((2, 32, 32, 3))
variables = jax.jit(model.init)(jax.random.key(0), images)
print(jax.jit(model.apply)(variables, images).logits.shape)
"""
CONFIG = "from msvit_jax import config; print(config.load('digits_msvit').model.name)"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the environment's programs, and an empty one to run them in."""
    root = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True)
    programs = root / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--constraint", ROOT / "requirements.txt", *CORE], check=True)
    subprocess.run([*pip, "--no-deps", ROOT], check=True)
    (root / "empty").mkdir()
    return programs, root / "empty"


def run(installed, program, *arguments, **environment):
    programs, folder = installed
    return subprocess.run(
        [programs / program, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_a_model_answers(installed):
    done = run(installed, "python", "-c", MODEL)
    assert done.stdout == "(2, 3)\n", done.stderr


def test_the_command_is_there(installed):
    assert run(installed, "msvit", "--version").stdout == f"{msvit_jax.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_names_the_extra_it_lacks(name, installed):
    done = run(installed, "msvit", name)
    assert done.returncode == 2
    line = done.stderr.strip()
    assert line.startswith("error: ")
    assert line.endswith(f" is not installed: pip install 'msvit-jax[{cli.COMMANDS[name].extra}]'")
    assert "\n" not in line


def test_a_config_is_found_in_the_package(installed):
    """With the packages of this environment, where ml_collections is, but not its msvit_jax."""
    done = run(installed, "python", "-c", CONFIG, PYTHONPATH=site.getsitepackages()[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "msvit\n"
    taken = done.stderr.strip()
    assert taken.startswith("No file 'digits_msvit'; using the packaged ")
    assert taken.endswith(f"{pathlib.Path('msvit_jax', 'configs', 'digits_msvit.py')}.")
