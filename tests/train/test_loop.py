import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from msvit_jax import checkpoint, checkpoint_files, data
from msvit_jax.errors import UserError
from msvit_jax.train import loop
from msvit_jax.train.reporter import NotFiniteError
from tests import tiny_run


def _records(workdir, kind):
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if r["kind"] == kind}


def _saved(workdir, step):
    """Every array of a checkpoint, by item and name."""
    directory = pathlib.Path(workdir) / "checkpoints" / str(step)
    items = [i for i in ("model", "ema", "trainer") if (directory / i).exists()]
    return {i: checkpoint_files.read_tree(directory.absolute() / i) for i in items}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted mixed-scale run of 12 steps with everything random switched on."""
    workdir = tmp_path_factory.mktemp("whole")
    figures = loop.train(_config(), workdir)
    return workdir, figures


def _config(**changes):
    # Blocks that are scanned are traced and compiled as one.
    scanned = {"model__scan_layers": True, "model__drop_path": 0.1}
    return tiny_run.msvit(
        data__mixup=0.8, data__pad_shift=2, ema_decay=0.9, **{**scanned, **changes}
    )


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(whole_run, tmp_path, capsys):
    workdir, figures = whole_run
    loop.train(_config(steps=5), tmp_path)
    resumed = loop.train(_config(), tmp_path)
    assert "resumed at step 5" in capsys.readouterr().out
    assert resumed == figures
    jax.tree.map(np.testing.assert_array_equal, _saved(tmp_path, 12), _saved(workdir, 12))
    ours, theirs = _records(tmp_path, "train"), _records(workdir, "train")
    for step in (8, 10, 12):  # a report that spans the interruption covers fewer steps
        assert ours[step]["total_loss"] == theirs[step]["total_loss"]
        assert ours[step]["tokens_mean"] == theirs[step]["tokens_mean"]


def test_reports_and_files_of_a_run(whole_run):
    workdir, figures = whole_run
    train, evaluated = _records(workdir, "train"), _records(workdir, "eval")
    assert list(train) == [2, 4, 6, 8, 10, 12]
    assert list(evaluated) == [6, 12]
    assert {k: evaluated[12][k] for k in figures} == figures
    assert figures["examples"] == tiny_run.VALIDATION
    assert train[2]["examples"] == 2 * 16
    assert train[2]["learning_rate"] > train[12]["learning_rate"]
    assert {"gate_loss", "grad_norm", "shaping", "images_per_second", "tokens_p95"} <= set(train[2])
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "config.json").read_text())["model"]["num_classes"] == 3


def test_a_finished_run_is_only_evaluated_again(whole_run, capsys):
    workdir, figures = whole_run
    assert loop.train(_config(), workdir) == figures
    assert "resumed at step 12" in capsys.readouterr().out


def test_a_run_evaluates_and_keeps_its_moving_average(whole_run):
    workdir, _ = whole_run
    run = checkpoint.load_run(workdir, "latest")
    saved = _saved(workdir, 12)
    jax.tree.map(np.testing.assert_array_equal, run.variables["params"], saved["ema"])
    assert np.any(
        saved["ema"]["backbone"]["head"]["kernel"] != saved["model"]["backbone"]["head"]["kernel"]
    )


def test_a_workdir_of_another_config_is_refused_with_what_differs(whole_run):
    workdir, _ = whole_run
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError) as error:
        loop.train(_config(optimizer__b1=0.8, seed=3), workdir)
    assert "optimizer.b1: 0.8 here, 0.9 in the workdir" in str(error.value)
    assert "seed: 3 here, 0 in the workdir" in str(error.value)
    assert "another --workdir" in str(error.value)
    assert (workdir / "config.json").read_text() == before


def test_training_learns_the_colors(tmp_path):
    figures = loop.train(tiny_run.config(epochs=40.0, eval_every_epochs=40.0), tmp_path)
    assert figures["top1"] == 100


@pytest.mark.fault(17)
def test_infinite_loss_names_step_seed_and_last_good_checkpoint(tmp_path):
    config = tiny_run.config(
        optimizer__learning_rate=1e30, optimizer__clip_norm=0.0, checkpoint__every_steps=1
    )
    config.optimizer.min_learning_rate = 1e30
    with pytest.raises(NotFiniteError) as error:
        loop.train(config, tmp_path)
    message = str(error.value)
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert f"Its checkpoints: step {min(steps)} (loss 1.1" in message, "what each is worth"
    assert "new --workdir" in message
    assert f"at step {max(steps) + 1} (its batch is that of seed 0, step {max(steps)})" in message
    weights = _saved(tmp_path, max(steps))["model"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(weights))


@pytest.mark.slow
def test_a_signal_saves_and_stops_and_the_run_goes_on(whole_run, tmp_path, monkeypatch, capsys):
    _, figures = whole_run
    real = data.train_iterator

    def interrupted(*arguments, **options):
        for index, batch in enumerate(real(*arguments, **options)):
            if index == 6:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(data, "train_iterator", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    stopped = loop.train(_config(), tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert f"stopped at step {stopped['step']}" in capsys.readouterr().out
    assert stopped["step"] < 12
    monkeypatch.setattr(data, "train_iterator", real)
    assert loop.train(_config(), tmp_path) == figures


# Reads that were under way when Orbax gave up report to an event loop that is gone.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_newest_checkpoint_is_set_aside(whole_run, tmp_path, capsys):
    _, figures = whole_run
    loop.train(_config(steps=6), tmp_path)
    loop.train(_config(steps=8), tmp_path)
    truncate(tmp_path / "checkpoints" / "8")
    assert loop.train(_config(), tmp_path) == figures
    out = capsys.readouterr().out
    assert "warning: checkpoint 8 is damaged" in out
    assert "resumed at step 6" in out
    assert (tmp_path / "damaged_checkpoints" / "8").is_dir()


@pytest.mark.fault(15)
def test_a_workdir_that_is_removed_is_noticed(tmp_path, monkeypatch):
    def removed(*arguments, **options):
        for index, batch in enumerate(real(*arguments, **options)):
            if index == 3:
                shutil.rmtree(tmp_path / "run")
            yield batch

    real = data.train_iterator
    monkeypatch.setattr(data, "train_iterator", removed)
    with pytest.raises(UserError, match="removed or moved while the run went on"):
        loop.train(_config(), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def truncate(directory):
    for file in directory.rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, r"batch_size=12 .* use 8 or 16"),
        ({"epochs": 0.0}, "epochs=0.0 is not a valid value: .* of more than 0"),
        ({"epochs": 1e-3}, "0 steps is not possible"),
        ({"steps": 500}, "500 steps is not possible"),
        ({"model__patch_size": 5}, "not divisible by patch_size=5"),
        ({"mesh__fsdp": 3}, "8 devices"),
        ({"data__name": "tinny"}, "tinny"),
        ({"data__data_dir": "/nowhere"}, "nowhere"),
        ({"init_from": "/nowhere"}, "There is no weights file or workdir '/nowhere'"),
        ({"loss__distillation__teacher": "/nowhere.npz"}, "loss.distillation.model"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        loop.train(tiny_run.config(**changes), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_coarse_patch_that_does_not_divide_the_image(tmp_path):
    config = tiny_run.msvit(model__patch_size=16)
    with pytest.raises(UserError, match="coarse patch of 32 px"):
        loop.train(config, tmp_path)
