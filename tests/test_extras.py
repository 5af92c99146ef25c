"""Optional packages: none is needed for a model, and a missing one is named with its extra."""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from msvit_jax import extras
from msvit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Flax imports these itself.
WITH_FLAX = {"absl", "etils"}
OPTIONAL = {module for modules in extras.MODULES.values() for module in modules}

HIDE = """
import importlib.abc, json, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in json.loads(sys.argv[1]):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""

MODEL = """
import jax, msvit_jax
from msvit_jax import tree, weights

options = {"image_size": 32, "depth": 2, "width": 64, "heads": 2, "num_classes": 3}
model = msvit_jax.create_model("msvit_tiny_patch16_224", **options)
images = jax.numpy.zeros((2, 32, 32, 3))
variables = jax.jit(model.init)(jax.random.key(0), images)
apply = jax.jit(model.apply)
flat = {name: jax.device_get(x) for name, x in tree.flat_names(variables["params"]).items()}
weights.save(sys.argv[2], flat, {"model": {"name": "msvit_tiny_patch16_224", **options}})
loaded = weights.load_model(sys.argv[2])
params, _ = weights.load_params(sys.argv[2], model)
logits = apply(variables, images).logits
for each in (loaded.params, params):
    assert (apply({"params": each}, images).logits == logits).all()
try:
    msvit_jax.Predictor
except ImportError as error:
    print(error)
"""


def test_models_and_weights_files_need_no_optional_package(tmp_path):
    hidden = json.dumps(sorted(OPTIONAL - WITH_FLAX))
    command = [sys.executable, "-c", HIDE + MODEL, hidden, str(tmp_path / "w.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\w+ is not installed: pip install 'msvit-jax\[train\]'\n", done.stdout)


def test_a_missing_package_is_a_users_error_and_an_import_error():
    with pytest.raises(UserError) as raised, extras.needed("plots"):
        raise ModuleNotFoundError("No module named 'matplotlib.pyplot'", name="matplotlib.pyplot")
    assert isinstance(raised.value, ModuleNotFoundError)
    assert raised.value.name == "matplotlib"
    assert str(raised.value) == "matplotlib is not installed: pip install 'msvit-jax[plots]'"


def test_the_outermost_extra_that_installs_the_package_is_named():
    with pytest.raises(extras.MissingExtraError, match=r"msvit-jax\[export\]"):  # noqa: SIM117
        with extras.needed("export"), extras.needed("data"):
            raise ModuleNotFoundError("No module named 'grain'", name="grain")
    with pytest.raises(extras.MissingExtraError, match=r"msvit-jax\[gcs\]"):  # noqa: SIM117
        with extras.needed("data"), extras.needed("gcs"):
            raise ModuleNotFoundError("No module named 'gcsfs'", name="gcsfs")


def test_other_import_errors_pass_through():
    with pytest.raises(ModuleNotFoundError, match="inside") as raised, extras.needed("train"):
        raise ModuleNotFoundError("No module named 'inside'", name="inside")
    assert not isinstance(raised.value, UserError)


def installs(requirements):
    """Names of the distributions that requirements bring, extras of our own resolved."""
    names = set()
    for requirement in requirements:
        own = re.fullmatch(r"msvit-jax\[(.*)\]", requirement)
        if own:
            for extra in own[1].split(","):
                names |= installs(PROJECT["optional-dependencies"][extra])
        else:
            names.add(re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-"))
    return names


@pytest.mark.parametrize("extra", extras.MODULES)
def test_the_extras_are_those_of_the_project(extra):
    distributions = importlib.metadata.packages_distributions() | {"gcsfs": ["gcsfs"]}
    brought = {
        name.lower().replace("_", "-")
        for module in extras.MODULES[extra]
        for name in distributions[module]
        if not (module == "orbax" and name != "orbax-checkpoint")
    }
    assert brought == installs(PROJECT["optional-dependencies"][extra])


def test_all_installs_what_every_extra_of_the_commands_installs():
    everything = installs(PROJECT["optional-dependencies"]["all"])
    assert all(everything >= installs(PROJECT["optional-dependencies"][e]) for e in extras.MODULES)


def test_a_model_alone_needs_four_packages():
    assert installs(PROJECT["dependencies"]) == {"flax", "jax", "numpy", "safetensors"}
