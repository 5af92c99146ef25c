import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from msvit_jax import checkpoint, checkpoint_files, digests, sharding
from msvit_jax.errors import UserError
from msvit_jax.train_state import TrainState
from tests import bitflips, tiny_run

NEW_KEYS = ("digests", "shapes", "scores", "check")


def _state(value, ema=False):
    weights = {"head": {"kernel": jnp.full((2, 3), value, jnp.float32)}}
    return TrainState(
        step=jnp.asarray(value, jnp.int32),
        params={"model": weights, "gate_loss": {}},
        opt_state=({"mu": jnp.full(3, value + 0.5, jnp.float32)},),
        ema=jax.tree.map(lambda x: x * 10, weights) if ema else None,
    )


def _like(ema=False):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(0, ema)
    )


def _save(workdir, scores, ema=False):
    kept = checkpoint.Checkpoints(workdir, keep_latest=2)
    for step, score in scores.items():
        kept.save(_state(step, ema), step, None if score is None else {"top1": score, "loss": 1.0})
    kept.close()


def _steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def _truncate(workdir, step):
    for file in (workdir / "checkpoints" / str(step)).rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_latest_two_and_the_best_are_kept_across_a_restart(tmp_path):
    _save(tmp_path, {1: 5.0, 2: 9.0, 3: 3.0, 4: None})
    assert _steps(tmp_path) == [2, 3, 4]
    _save(tmp_path, {5: 2.0, 6: 4.0})
    assert _steps(tmp_path) == [2, 5, 6]
    assert checkpoint.find_step(tmp_path) == 2
    assert checkpoint.find_step(tmp_path, "latest") == 6
    assert checkpoint.find_step(tmp_path, "5") == 5


def test_best_is_the_newest_where_none_was_evaluated(tmp_path):
    _save(tmp_path, {1: None, 2: None})
    assert checkpoint.find_step(tmp_path) == 2


@pytest.mark.parametrize("ema", [False, True])
def test_state_comes_back_as_it_was(tmp_path, ema):
    _save(tmp_path, {3: 1.0}, ema)
    state, messages = checkpoint.Checkpoints(tmp_path).restore_latest(_like(ema))
    assert messages == []
    assert jax.tree.structure(state) == jax.tree.structure(_state(3, ema))
    jax.tree.map(np.testing.assert_array_equal, state, _state(3, ema))


def test_saving_what_all_devices_have_compiles_nothing(tmp_path, caplog):
    """Orbax would compile a program for each array's shape and each part that a device writes."""
    shared = jax.NamedSharding(sharding.make_mesh(), jax.P())
    arrays = {str(n): jnp.ones((n, 8 * n)) for n in range(1, 5)}
    state = jax.device_put(dataclasses.replace(_state(3), opt_state=arrays), shared)
    kept = checkpoint.Checkpoints(tmp_path)
    with jax.log_compiles():
        kept.save(state, 3, None)
        kept.close()
    assert "XLA compilation" not in caplog.text


def test_an_empty_workdir_has_no_state(tmp_path):
    assert checkpoint.Checkpoints(tmp_path).restore_latest(_like()) == (None, [])


# Reads that were under way when Orbax gave up report to an event loop that is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoints_are_passed_over(tmp_path):
    _save(tmp_path, {1: 5.0, 2: 4.0, 3: 3.0})
    _truncate(tmp_path, 3)
    _truncate(tmp_path, 2)
    kept = checkpoint.Checkpoints(tmp_path)
    state, messages = kept.restore_latest(_like())
    assert int(state.step) == 1
    assert [m.split(" (")[0] for m in messages] == [
        "checkpoint 3 is damaged",
        "checkpoint 2 is damaged",
    ]
    assert _steps(tmp_path) == [1]
    kept.save(_state(3), 3, {"top1": 1.0})  # the number is free again
    kept.close()
    assert _steps(tmp_path) == [1, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_but_damaged_checkpoints(tmp_path):
    _save(tmp_path, {1: 5.0})
    _truncate(tmp_path, 1)
    with pytest.raises(UserError, match=r"No checkpoint .* can be restored(.|\n)*step 1:"):
        checkpoint.Checkpoints(tmp_path).restore_latest(_like())
    assert _steps(tmp_path) == [1]
    with pytest.raises(UserError, match=r"Checkpoint 1 .* is damaged"):
        checkpoint.load_params(tmp_path)


def test_parameters_are_the_moving_average_where_there_is_one(tmp_path):
    _save(tmp_path / "a", {3: 1.0}, ema=True)
    _save(tmp_path / "b", {3: 1.0})
    assert checkpoint.load_params(tmp_path / "a")["head"]["kernel"][0, 0] == 30
    assert checkpoint.load_params(tmp_path / "b")["head"]["kernel"][0, 0] == 3


def test_loading_says_nothing_and_leaves_what_is_said_as_it_was(tmp_path, caplog):
    _save(tmp_path, {3: 1.0})
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # whatever ran before in this process
    try:
        caplog.clear()
        checkpoint.load_params(tmp_path)
        checkpoint.read_about(tmp_path)
        assert caplog.records == []
        assert logging.get_verbosity() == logging.WARNING
    finally:
        logging.set_verbosity(before)


def test_workdirs_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"not the workdir of a run.*train\.py"):
        checkpoint.load_run(tmp_path)
    checkpoint.claim_workdir(tmp_path, tiny_run.config())
    with pytest.raises(UserError, match="has the run saved one yet"):
        checkpoint.load_run(tmp_path)
    _save(tmp_path, {3: 1.0})
    with pytest.raises(UserError, match=r"No checkpoint '4'.*\[3\]"):
        checkpoint.find_step(tmp_path, "4")


def test_a_workdir_without_a_checkpoint_may_be_claimed_again(tmp_path):
    checkpoint.claim_workdir(tmp_path, tiny_run.config())
    mended = tiny_run.config()
    mended.seed = 7
    checkpoint.claim_workdir(tmp_path, mended)
    assert checkpoint.read_config(tmp_path).seed == 7
    _save(tmp_path, {3: 1.0})
    with pytest.raises(UserError, match="seed: 0 here, 7 in the workdir"):
        checkpoint.claim_workdir(tmp_path, tiny_run.config())


def test_a_run_made_before_a_key_existed_can_be_resumed(tmp_path):
    config = tiny_run.config()
    checkpoint.claim_workdir(tmp_path, config)
    _save(tmp_path, {3: 1.0})
    old = json.loads((tmp_path / "config.json").read_text())
    del old["loss"]["exits"], old["ema_decay"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert checkpoint.read_config(tmp_path).ema_decay == 0.0
    checkpoint.claim_workdir(tmp_path, config)
    config.ema_decay = 0.9  # not what was done then
    with pytest.raises(UserError, match=r"ema_decay: 0\.9 here, 0\.0 in the workdir"):
        checkpoint.claim_workdir(tmp_path, config)


# Reads that were under way when Orbax gave up report to an event loop that is gone.
@pytest.mark.fault(1)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("flips", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_flipped_bits_are_found_or_harmless(tmp_path, flips):
    _save(tmp_path / "run", {1: 5.0}, ema=True)
    kept, step = checkpoint.Checkpoints(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "1"
    shutil.copytree(step, tmp_path / "whole")
    wanted = _read(step)
    rng, found = np.random.default_rng(flips), 0
    for _ in range(flips):
        where = bitflips.flip(step, rng)
        if kept.damage(1):
            found += 1
        else:
            same = jax.tree.map(np.array_equal, _read(step), wanted)
            assert all(jax.tree.leaves(same)), where
        shutil.copytree(tmp_path / "whole", step, dirs_exist_ok=True)
    kept.close()
    assert flips // 4 < found < flips


def _read(step):
    items = {name: checkpoint_files.read_tree(step / name) for name in checkpoint_files.ITEMS}
    return {**items, "about": checkpoint_files.read_about(step)}


# Reads that were under way when Orbax gave up report to an event loop that is gone.
@pytest.mark.fault(1)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    _save(tmp_path, {1: 5.0, 2: 4.0})
    data = max((tmp_path / "checkpoints" / "2").rglob("d/*"), key=lambda f: f.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # a block of zeros
    data.write_bytes(content)
    state, (message,) = checkpoint.Checkpoints(tmp_path).restore_latest(_like())
    assert int(state.step) == 1
    assert re.fullmatch(r"checkpoint 2 is damaged \(.*\); moved to damaged.*, using 1", message)


# Reads that were under way when Orbax gave up report to an event loop that is gone.
@pytest.mark.fault(14)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_printed_of_a_damaged_checkpoint_but_its_line(tmp_path):
    """In a process of its own, as commands read it: Orbax would print tracebacks of its threads."""
    _save(tmp_path, {1: 5.0, 2: 4.0})
    _truncate(tmp_path, 2)
    code = (
        "import sys; from msvit_jax import checkpoint, errors; checkpoint.quiet_orbax();"
        "errors.run(lambda _: checkpoint.load_params(sys.argv[1], '2'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Checkpoint 2 in ")


def test_a_changed_array_is_named_and_the_weights_are_not_used(tmp_path):
    _save(tmp_path, {1: 5.0})
    about = tmp_path / "checkpoints" / "1" / "about" / "metadata"
    described = json.loads(about.read_text())
    (name,) = described["digests"]["model"]
    assert name == "head/kernel"
    described["digests"]["model"][name] = "0" * 16
    del described["check"]
    about.write_text(json.dumps(digests.seal(described)))
    with pytest.raises(UserError, match=r"Checkpoint 1 .* damaged .*model/head/kernel changed"):
        checkpoint.load_params(tmp_path)


def test_an_empty_dict_of_another_name_is_found(tmp_path):
    _save(tmp_path, {1: 5.0})
    listed = tmp_path / "checkpoints" / "1" / "trainer" / "_METADATA"
    listed.write_text(listed.read_text().replace("gate_loss", "gate_losc"))
    kept = checkpoint.Checkpoints(tmp_path)
    assert "trainer/gate_loss changed" in kept.damage(1)
    kept.close()


def test_checkpoints_from_before_there_were_digests_are_read(tmp_path):
    _save(tmp_path, {1: 5.0})
    about = tmp_path / "checkpoints" / "1" / "about" / "metadata"
    old = {k: v for k, v in json.loads(about.read_text()).items() if k not in NEW_KEYS}
    about.write_text(json.dumps(old))
    state, messages = checkpoint.Checkpoints(tmp_path).restore_latest(_like())
    assert (int(state.step), messages) == (1, [])
    assert checkpoint.find_step(tmp_path) == 1
    assert set(checkpoint.load_params(tmp_path)) == {"head"}


@pytest.mark.fault(11)
@pytest.mark.parametrize("content", ["", "{", '{"top1": 99.0}', '{"top1": null}'])
def test_a_damaged_score_is_that_of_the_description(tmp_path, content):
    _save(tmp_path, {1: 5.0, 2: 4.0})
    (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_text(content)
    assert checkpoint.find_step(tmp_path) == 1
    _save(tmp_path, {3: 3.0, 4: 2.0})  # what Orbax keeps goes by it as well
    assert _steps(tmp_path) == [1, 3, 4]


@pytest.mark.fault(6)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "null", '{"model": 5}', '{"a": ' + "[" * 10**5, "\xff"]
)
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json' is damaged .*checkpoint"):
        checkpoint.load_run(tmp_path)


@pytest.mark.fault(6)
@pytest.mark.parametrize("text", ["", "{", "[]", "5", "\xff"])
def test_a_damaged_description_is_named(tmp_path, text):
    _save(tmp_path, {1: 5.0})
    (tmp_path / "checkpoints" / "1" / "about" / "metadata").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"Checkpoint 1 .* is damaged"):
        checkpoint.read_about(tmp_path)
    with pytest.raises(UserError, match=r"No checkpoint .* can be restored"):
        checkpoint.Checkpoints(tmp_path).restore_latest(_like())
