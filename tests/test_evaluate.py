import csv
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from msvit_jax import checkpoint, data, evaluate, flops, sharding, weights
from msvit_jax import config as configs
from msvit_jax.errors import UserError
from msvit_jax.exits import budget_curve
from msvit_jax.pixels import normalize
from msvit_jax.train import loop
from msvit_jax.tree import flat_names
from tests import jitted, tiny_run

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dense")
    loop.train(tiny_run.config(steps=6), workdir)
    return workdir


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mixed")
    loop.train(tiny_run.msvit(steps=6), workdir)
    return workdir


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cascade")
    loop.train(tiny_run.dvt(steps=6), workdir)
    return workdir


def test_weights_by_other_names_are_evaluated_like_their_run(dense, tmp_path, capsys):
    run, file = checkpoint.load_run(dense), tmp_path / "w.safetensors"
    save_file(weights.to_theirs("timm", flat_names(run.variables["params"]), run.model), file)
    config = tmp_path / "config.py"
    config.write_text("from tests import tiny_run\n\nget_config = tiny_run.config\n")
    expected = evaluate.evaluate_run(dense)
    figures = evaluate.evaluate_weights(str(file), str(config))
    assert figures.pop("weights") == str(file)
    assert f"{file}: 32 parameters matched" in capsys.readouterr().out
    same = expected.keys() - {"workdir", "step"}
    assert {key: figures[key] for key in same} == {key: expected[key] for key in same}


@pytest.mark.fault(4)
def test_weights_whose_answers_are_not_finite_have_no_figures(dense, tmp_path):
    run, file = checkpoint.load_run(dense), tmp_path / "w.safetensors"
    theirs = weights.to_theirs("timm", flat_names(run.variables["params"]), run.model)
    save_file({name: np.float32(1e38) * np.sign(x) for name, x in theirs.items()}, file)
    config = tmp_path / "config.py"
    config.write_text("from tests import tiny_run\n\nget_config = tiny_run.config\n")
    with pytest.raises(UserError, match="The loss is nan, so the other figures mean nothing"):
        evaluate.evaluate_weights(str(file), str(config))


def _expected(run):
    """Figures of an evaluation without batches, padding or jit."""
    batches = data.eval_batches(run.config.data, batch_size=tiny_run.VALIDATION)
    (batch,) = list(batches)
    images = normalize(jnp.asarray(batch["image"]), run.model.mean, run.model.std)
    output = jitted.apply(run.model, run.variables, images, train=False)
    logits = np.asarray(output.logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = np.arange(tiny_run.VALIDATION)
    tokens = np.asarray(output.tokens)
    return {
        "examples": tiny_run.VALIDATION,
        "top1": 100 * np.mean(logits.argmax(1) == batch["label"]),
        "top5": 100.0,
        "loss": -log_p[rows, batch["label"]].mean(),
        "tokens_mean": tokens.mean(),
        "gmacs_mean": flops.macs_per_image(run.model, tokens).mean() / 1e9,
    }


@pytest.mark.parametrize("batch_size", [8, 16, 64])
@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_every_example_counts_once_whatever_the_batch_size(kind, batch_size, request):
    run = checkpoint.load_run(request.getfixturevalue(kind))
    figures = evaluate.evaluate(
        run.model, run.variables["params"], run.config.data, batch_size=batch_size
    )
    for name, value in _expected(run).items():
        assert figures[name] == pytest.approx(value, rel=1e-4), name


def test_one_device_and_eight_agree(mixed):
    run = checkpoint.load_run(mixed)
    alone = jax.make_mesh(
        (1, 1),
        sharding.BATCH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:1],
    )
    params = run.variables["params"]
    figures = [
        evaluate.evaluate(run.model, params, run.config.data, batch_size=8, mesh=mesh)
        for mesh in (alone, sharding.make_mesh())
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_thresholds_change_the_decisions_and_compile_once(mixed):
    run = checkpoint.load_run(mixed)
    mesh = sharding.make_mesh()
    evaluator = evaluate.Evaluator(run.model, run.config.data, batch_size=16, mesh=mesh, samples=2)
    params = jax.device_put(run.variables["params"], sharding.replicated(mesh))
    tokens = [evaluator(params, t).figures["tokens_mean"] for t in (0.0, 0.5, 1.0)]
    assert tokens[0] == 4
    assert tokens[2] == 16
    assert tokens[0] <= tokens[1] <= tokens[2]
    assert evaluator._step._cache_size() == 1
    result = evaluator(params)
    assert result.figures["tokens_mean"] == tokens[1]
    assert result.samples.images.shape == (2, 16, 16, 3)
    assert result.samples.coarse.shape == result.samples.probability.shape == (2, 4)
    decided = result.samples.probability > 0.5
    np.testing.assert_array_equal(result.samples.coarse, decided)


def test_samples_of_a_model_that_reduces_tokens_are_its_merge_maps():
    config = tiny_run.config("mergence_tiny_patch16_224")
    config.model.update(scales=(2, 4), keep=0.6)
    model = configs.build_model(configs.resolve(config, len(tiny_run.CLASSES)))
    params = jitted.init(model, jnp.zeros((1, 16, 16, 3)))["params"]
    mesh = sharding.make_mesh()
    evaluator = evaluate.Evaluator(model, config.data, batch_size=16, mesh=mesh, samples=3)
    samples = evaluator(jax.device_put(params, sharding.replicated(mesh))).samples
    assert samples.coarse is None
    images = normalize(jnp.asarray(samples.images), model.mean, model.std)
    expected = jitted.apply(model, {"params": params}, images)
    assert samples.merge_maps.shape == (3, 2, 4, 4)
    np.testing.assert_array_equal(
        samples.merge_maps.reshape(3, 2, 16)[:, 1], expected.merge_targets[1]
    )


def test_same_weights_behind_another_gate(mixed, capsys):
    figures = evaluate.evaluate_run(mixed, overrides=["model.gate=random", "model.fine_share=0.25"])
    assert figures["tokens_mean"] == 3 + 4
    coarse = evaluate.evaluate_run(mixed, overrides=["model.gate=coarse"])
    assert coarse["tokens_mean"] == 4
    assert "tokens_mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ["model.gatee=random"]}, "no option 'gatee'"),
        ({"overrides": ["data.mixupp=1"]}, r"'data\.mixup'"),
        ({"overrides": ["model.depth=3"]}, "do not fit"),
        ({"which": "7"}, "No checkpoint '7'"),
        ({"split": "test"}, "test"),
    ],
)
def test_bad_requests(mixed, options, message):
    with pytest.raises(UserError, match=message):
        evaluate.evaluate_run(mixed, **options)


def test_a_dense_model_has_no_threshold_to_sweep(dense):
    with pytest.raises(UserError, match="no gate"):
        evaluate.evaluate_run(dense, thresholds=[0.5])


def _eval(*arguments):
    return subprocess.run(
        [sys.executable, "eval.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_prints_a_table_and_then_json(mixed):
    done = _eval(f"--workdir={mixed}", "--sweep", "--thresholds=0,0.5,1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["model"] == "msvit_tiny_patch16_224"
    assert result["examples"] == tiny_run.VALIDATION
    assert {"top1", "top5", "loss", "tokens_mean", "gmacs_mean", "agreement"} <= set(result)
    with (mixed / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["tokens_mean"]) for r in rows] == [r["tokens_mean"] for r in result["sweep"]]
    assert (mixed / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_ends_with_a_message_and_no_traceback(tmp_path):
    done = _eval(f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_build_model_of_a_run_is_what_was_trained(mixed):
    run = checkpoint.load_run(mixed)
    assert run.model == configs.build_model(checkpoint.read_config(mixed))
    assert run.model.num_classes == 3


def test_a_cascade_is_evaluated_exit_by_exit(cascade, capsys):
    figures = evaluate.evaluate_run(cascade, batch_size=8)
    run = checkpoint.load_run(cascade)
    (batch,) = data.eval_batches(run.config.data, batch_size=tiny_run.VALIDATION)
    images = normalize(jnp.asarray(batch["image"]), run.model.mean, run.model.std)
    exits = jitted.apply(run.model, run.variables, images).exit_logits
    right = exits.argmax(-1) == batch["label"][:, None]
    assert figures["exits_top1"] == pytest.approx(100 * np.asarray(right).mean(0))
    assert figures["top1"] == figures["exits_top1"][-1]
    assert figures["exits_gmacs"] == pytest.approx(run.model.exit_macs() / 1e9)
    assert figures["gmacs_mean"] == figures["exits_gmacs"][-1]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-2:]] == [["1", "4"], ["2", "16"]]


def test_budget_curve_of_a_cascade(cascade, capsys):
    cost = checkpoint.load_run(cascade).model.exit_macs() / 1e9
    middle = float(cost.mean())
    options = {"gmacs_budgets": [middle], "fit_examples": 30}
    figures = evaluate.evaluate_run(cascade, batch_size=16, curve=options)
    rows = figures["budget_curve"]
    json.dumps(figures)
    exits = [row for row in rows if row["kind"].startswith("exit")]
    assert [row["top1"] for row in exits] == pytest.approx(figures["exits_top1"])
    assert [row["gmacs_mean"] for row in exits] == pytest.approx(figures["exits_gmacs"])
    assert len([row for row in rows if row["kind"] == "geometric"]) == 59
    (found,) = [row for row in rows if row["kind"] == "search"]
    assert found["gmacs_mean"] == pytest.approx(np.dot(found["shares"], cost))
    with (cascade / "budget_curve.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in written] == [row["top1"] for row in rows]
    assert (cascade / "budget_curve.png").stat().st_size > 1000
    assert "search" in capsys.readouterr().out
    assert list(budget_curve.fitted_thresholds(cascade, 2 * middle)) == found["thresholds"]
    with pytest.raises(UserError, match="No thresholds in"):
        budget_curve.fitted_thresholds(cascade, 0.9 * middle)


def test_a_budget_curve_that_is_not_possible_is_told(cascade, dense):
    with pytest.raises(UserError, match="not a cascade"):
        evaluate.evaluate_run(dense, curve={})
    with pytest.raises(UserError, match="below the cost of the first exit"):
        evaluate.evaluate_run(cascade, curve={"gmacs_budgets": [1e-9]})
    with pytest.raises(UserError, match=r"run eval\.py"):
        budget_curve.fitted_thresholds(dense, 1.0)
