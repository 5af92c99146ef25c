"""Whole runs of segmentation: training, evaluation, starting from other weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msvit_jax import checkpoint, evaluate, metrics, sharding, tasks
from msvit_jax import config as configs
from msvit_jax.errors import UserError
from msvit_jax.models.output import Output
from msvit_jax.segmentation import IGNORED
from msvit_jax.train import loop, optimizer
from tests import tiny_masks, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose evaluation looks at windows that overlap."""
    workdir = tmp_path_factory.mktemp("segmenter")
    loop.train(tiny_masks.config(data__window_stride=8), workdir)
    return workdir


def records(workdir, kind):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def test_a_run_learns_and_reports(run):
    first, last = records(run, "eval")
    assert last["miou"] > first["miou"] > 0
    assert set(last["iou"]) == set(tiny_masks.CLASSES)
    assert last["examples"] == tiny_masks.VALIDATION < last["windows"]
    assert last["tokens_mean"] == 16
    assert "top1" not in last
    train = records(run, "train")
    assert train[-1]["total_loss"] < train[0]["total_loss"]
    assert train[-1]["pixel_accuracy"] > train[0]["pixel_accuracy"]
    scores = run.glob("checkpoints/*/metrics/metrics")
    assert {name for file in scores for name in json.loads(file.read_text())} == {"miou"}


def test_an_evaluation_is_that_of_the_loop_and_counts_every_labeled_pixel(run):
    found = evaluate.evaluate_run(run, which="latest", batch_size=16)
    last = records(run, "eval")[-1]
    assert found["miou"] == pytest.approx(last["miou"], abs=1e-6)
    assert found["examples"] == last["examples"]
    loaded = checkpoint.load_run(run, "latest")
    evaluator = evaluate.Evaluator(
        loaded.model, loaded.config.data, batch_size=8, mesh=sharding.make_mesh()
    )
    evaluator(loaded.variables["params"])
    counts = evaluator._batches.confusion.counts
    sizes = (16 * 24, 20 * 16, 12 * 30)
    assert counts.sum() == sum(sizes) * tiny_masks.VALIDATION // 3 - 4 * tiny_masks.VALIDATION


def test_several_scales_and_mirrored_views_run(run):
    overrides = ["data.eval_scales=(1.0,1.5)", "data.eval_flip=true"]
    found = evaluate.evaluate_run(run, overrides=overrides)
    assert 0 < found["miou"] <= 100
    assert found["windows"] > 2 * records(run, "eval")[-1]["windows"]


def test_a_gate_is_trained_from_a_dense_segmenter_in_the_trimmed_layout(run, tmp_path):
    config = tiny_masks.config(
        "msvit", init_from=str(run), epochs=1.0, eval_every_epochs=1.0, model__layout="trimmed"
    )
    figures = loop.train(config, tmp_path)
    assert figures["tokens_mean"] <= 16
    assert {"fine_share", "agreement", "content_fine", "miou"} <= set(figures)
    loaded = checkpoint.load_run(tmp_path)
    start = checkpoint.load_params(run)
    trained = loaded.variables["params"]
    moved = np.abs(np.asarray(trained["decoder"]["class_embed"]) - start["decoder"]["class_embed"])
    assert moved.max() < 0.1  # taken over, and three steps of training
    sweep = evaluate.evaluate_run(tmp_path, thresholds=[0.2, 0.8])["sweep"]
    assert sweep[0]["tokens_mean"] <= sweep[1]["tokens_mean"]
    assert (tmp_path / "sweep.png").is_file()


def test_a_segmenter_starts_from_a_classifier_and_other_decoders_start_fresh(run, tmp_path, capsys):
    loop.train(tiny_run.config(steps=1, model__pos_init="sincos"), tmp_path / "classifier")
    steps = {"steps": 1, "eval_every_epochs": 8.0}
    for source in (tmp_path / "classifier", run):
        config = tiny_masks.config(init_from=str(source), model__decoder="linear", **steps)
        loop.train(config, tmp_path / f"from_{source.name}")
        told = next(
            line for line in capsys.readouterr().out.splitlines() if "starting from" in line
        )
        assert "fresh: decoder/head/bias (not in the source)" in told


def test_tasks_and_data_have_to_fit(tmp_path):
    labels = {"target": "label", "name": "scattered_digits/tiny", "data_dir": ""}
    config = tiny_masks.config(**{f"data__{key}": value for key, value in labels.items()})
    with pytest.raises(UserError, match=r"does segmentation, and data\.target=label; set data\."):
        loop.train(config, tmp_path)
    config = tiny_masks.config()
    config.model = {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch_size": 4}
    with pytest.raises(UserError, match="does classification"):
        loop.train(config, tmp_path)


def judged(logits, targets, **options):
    output = Output(logits=jnp.asarray(logits), tokens=jnp.full(len(logits), 4, jnp.int32))
    model = configs.build_model(configs.resolve(tiny_masks.config(), 3))
    size = targets.shape[1:]
    return tasks.Segmentation().judge(output, jnp.asarray(targets), size, model, **options)


def reported_loss(found):
    """The loss that training and evaluation report for one batch."""
    count = len(found.losses)
    output = Output(logits=jnp.zeros((count, 4, 4, 3)), tokens=jnp.full(count, 4, jnp.int32))
    sums = metrics.batch_sums(
        output, None, found.losses, max_tokens=16, weights=found.weights, pixels=found.pixels
    )
    return metrics.summarize(metrics.to_host(sums))["loss"]


def test_the_loss_is_the_mean_over_pixels_that_have_a_class():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 4, 3)).astype(np.float32)
    targets = rng.integers(0, 3, (3, 16, 16)).astype(np.uint8)
    targets[0, :12] = IGNORED
    targets[1] = IGNORED
    found = judged(logits, targets)
    upsampled = jax.image.resize(logits, (3, 16, 16, 3), "bilinear")
    pixels = optax.softmax_cross_entropy_with_integer_labels(
        upsampled, np.where(targets == IGNORED, 0, targets).astype(np.int32)
    )
    counted = targets != IGNORED
    assert float(found.mean()) == pytest.approx(float(pixels[counted].mean()), rel=1e-5)
    assert found.losses[1] == 0
    right = (np.asarray(upsampled).argmax(-1) == targets) & counted
    assert float(found.pixels.right) == right.sum()
    assert float(found.pixels.count) == counted.sum()
    assert reported_loss(found) == pytest.approx(float(pixels[counted].mean()), rel=1e-5)
    smoothed = judged(logits, targets, smoothing=0.3)
    even = -np.asarray(jax.nn.log_softmax(upsampled)).mean(axis=-1)
    expected = 0.7 * np.asarray(pixels)[counted].mean() + 0.3 * even[counted].mean()
    assert float(smoothed.mean()) == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_without_classes_has_no_loss_and_no_gradient():
    targets = np.full((2, 16, 16), IGNORED, np.uint8)
    logits = np.ones((2, 4, 4, 3), np.float32)
    value, grad = jax.value_and_grad(lambda x: judged(x, targets).mean())(jnp.asarray(logits))
    assert value == 0
    assert not np.asarray(grad).any()


# The optimizer's part.


def options(**changes):
    made = configs.base().optimizer
    made.update(changes)
    return made


def test_the_poly_schedule_falls_by_a_power_of_what_is_left():
    rate = optimizer.schedule(
        options(schedule="poly", learning_rate=0.1, min_learning_rate=0.0), 100, 10.0
    )
    for step in (0, 37, 99):
        assert float(rate(step)) == pytest.approx(0.1 * (1 - step / 100) ** 0.9, rel=1e-5)
    warm = optimizer.schedule(
        options(schedule="poly", learning_rate=0.1, warmup_epochs=2.0, cooldown_epochs=1.0), 100, 10
    )
    assert float(warm(0)) == 0
    assert float(warm(20)) == pytest.approx(0.1)
    assert float(warm(95)) == pytest.approx(1e-5)


def test_sgd_is_pytorch_s_and_encoders_have_their_own_rate():
    names = ("decoder/head/kernel", "blocks_0/mlp/fc1/kernel", "gate_mlp/fc1/kernel")
    params = {"model": {}, "gate_loss": {}}
    for name in names:
        here = params["model"]
        *parents, leaf = name.split("/")
        for parent in parents:
            here = here.setdefault(parent, {})
        here[leaf] = jnp.ones((2, 2), jnp.float32)
    chosen = options(
        name="sgd", learning_rate=0.1, encoder_learning_rate=0.01, weight_decay=0.5, clip_norm=0.0
    )
    update = optimizer.make_optimizer(chosen, params, optax.constant_schedule(0.1))
    state, current = update.init(params), params
    expected = {name: np.ones((2, 2)) for name in names}
    buffer = {name: np.zeros((2, 2)) for name in names}
    for grad in (0.3, -0.1, 0.2):
        grads = jax.tree.map(lambda x: jnp.full_like(x, grad), params)  # noqa: B023
        updates, state = update.update(grads, state, current)
        current = optax.apply_updates(current, updates)
        for name in names:
            buffer[name] = 0.9 * buffer[name] + grad + 0.5 * expected[name]
            expected[name] = expected[name] - (0.01 if "blocks" in name else 0.1) * buffer[name]
    for name, leaf in optimizer.flat_names(current["model"]).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5)
