"""The command, from a workdir to an output."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from msvit_jax import checkpoint, weights
from msvit_jax import config as configs
from msvit_jax.errors import UserError
from msvit_jax.export import ExportBundle, Options, write
from msvit_jax.train_state import TrainState
from tests.export import made


def _workdir(root, name, options, fitted=None):
    """What a run leaves of its last step, without the optimizer's state."""
    config = configs.base()
    config.model = {"name": name, **options}
    config.data.image_size = made.SIDE
    config.data.eval_crop = 0.875
    source = made.source(name, **options)
    about = {"config": config.to_dict(), "class_names": list(made.NAMES)}
    checkpoint.claim_workdir(root, config)
    params = {"model": unflatten_dict(source.params, sep="/"), "gate_loss": {}}
    saved = checkpoint.Checkpoints(root, about=about)
    saved.save(TrainState(jnp.int32(7), params, ()), 7, {"top1": 50.0})
    saved.close()
    if fitted:
        (root / "thresholds.json").write_text(json.dumps(fitted))
    return root


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return _workdir(tmp_path_factory.mktemp("mixed"), "msvit_tiny_patch16_224", made.SIZES)


def _export(*arguments):
    command = [sys.executable, "-m", "msvit_jax.export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_writes_and_tells_what_it_left_out(workdir, tmp_path):
    out = tmp_path / "trunk.safetensors"
    done = _export(f"--workdir={workdir}", "--format=timm", f"--out={out}")
    assert done.returncode == 0, done.stderr
    left_out, last = done.stdout.splitlines()
    assert left_out == "left out, --format=timm has no place for it: gate_mlp (9 arrays)"
    assert json.loads(last) == {
        **{"model": "msvit_tiny_patch16_224", "step": 7, "format": "timm", "out": str(out)}
    }
    assert load_file(out)["cls_token"].shape == (1, 1, 16)


def test_a_run_is_loaded_with_what_others_must_know(workdir, tmp_path):
    source = ExportBundle.load(workdir)
    assert (source.step, source.crop, source.class_names) == (7, 0.875, made.NAMES)
    write(source, "safetensors", tmp_path / "model.safetensors")
    about = weights.describe(tmp_path / "model.safetensors")
    assert (about["step"], about["crop"]) == (7, 0.875)
    expected = made.source("msvit_tiny_patch16_224").params
    for name, value in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_cascade_leaves_by_the_thresholds_that_were_fitted(tmp_path):
    options = {key: value for key, value in made.CASCADE.items() if key != "image_size"}
    fitted = [{"budget": 0.5, "thresholds": [0.8, 0.0]}, {"budget": 2.0, "thresholds": [0.9, 0.0]}]
    workdir = _workdir(tmp_path / "run", "dvt_deit_small", options, fitted)
    write(ExportBundle.load(workdir), "compiled", tmp_path / "out", Options(gmacs_budget=1.0))
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["thresholds"] == [0.8, 0.0]


def test_a_workdir_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="not the workdir of a run"):
        ExportBundle.load(tmp_path)
    checkpoint.claim_workdir(tmp_path, configs.base())
    with pytest.raises(UserError, match="No checkpoint in"):
        ExportBundle.load(tmp_path)
