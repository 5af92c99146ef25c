"""Early exit: the answers of all exits computed and chosen from afterwards, in any batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msvit_jax
from msvit_jax import sharding
from msvit_jax.errors import UserError
from msvit_jax.exits import exit_thresholds
from msvit_jax.inference import Predictor
from msvit_jax.pixels import normalize
from tests.models.test_vit import rough

COUNT = 23
SIZES = {
    **{"image_size": 16, "width": 16, "depth": 1, "heads": 2, "num_classes": 4},
    **{"grid_sizes": (1, 2, 4), "feature_width": 4, "feature_hidden": 8},
}


@functools.cache
def _images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), np.uint8)


@functools.cache
def _made(reuse=True):
    model = msvit_jax.create_model(
        "dvt_deit_small", feature_reuse=reuse, relation_reuse=reuse, **SIZES
    )
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    variables = rough(jax.eval_shape(model.init, jax.random.key(0), images))
    output = jax.jit(lambda v, x: model.apply(v, x).exit_logits)
    logits = output(variables, normalize(jnp.asarray(_images()), model.mean, model.std))
    return model, variables, np.asarray(logits)


def _thresholds(logits):
    """By which each exit answers several images; halfway between two, so that rounding is none."""
    certain = exit_thresholds.certainty(logits)
    first = np.sort(certain[:, 0])[[-8, -7]].mean()
    left = np.sort(certain[certain[:, 0] < first, 1])
    return float(first), float(left[[-6, -5]].mean())


@functools.cache
def _predictor(batch, devices=1, reuse=True):
    model, variables, _ = _made(reuse)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    return Predictor(model, variables, batch_size=batch, mesh=mesh)


@pytest.mark.parametrize(
    ("batch", "devices", "reuse"), [(4, 1, True), (32, 1, True), (4, 2, True), (4, 1, False)]
)
def test_same_answers_as_all_exits_computed_and_chosen_afterwards(batch, devices, reuse):
    _, _, logits = _made(reuse)
    predictor = _predictor(batch, devices, reuse)
    predictor.thresholds = _thresholds(logits)
    told = []
    found = predictor(_images(), progress=told.append)
    wanted = exit_thresholds.leave(exit_thresholds.certainty(logits), predictor.thresholds)
    assert set(wanted) == {0, 1, 2}
    np.testing.assert_array_equal(found.exit_index, wanted)
    np.testing.assert_allclose(found.logits, logits[np.arange(COUNT), wanted], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.tokens, np.asarray([1, 4, 16])[wanted])
    assert sum(told) == COUNT


def test_each_stage_computes_no_more_batches_than_it_needs(monkeypatch):
    _, _, logits = _made()
    predictor = _predictor(4)
    predictor.thresholds = _thresholds(logits)
    calls = []
    run = predictor._executables.run_stage
    monkeypatch.setattr(
        predictor._executables,
        "run_stage",
        lambda stage, *rest: calls.append(stage) or run(stage, *rest),
    )
    found = predictor(_images())
    for stage in range(3):
        assert calls.count(stage) == -(-np.sum(found.exit_index >= stage) // 4)


def test_without_thresholds_the_last_exit_answers_and_everything_is_compiled_once():
    _, _, logits = _made()
    predictor = Predictor(*_made()[:2], batch_size=4, mesh=_predictor(4)._mesh).warm_up()
    found = predictor(_images())
    np.testing.assert_allclose(found.logits, logits[:, -1], rtol=1e-4, atol=1e-4)
    assert (found.exit_index == 2).all()
    assert set(predictor.compiled) == set(predictor.programs)
    assert [n for n in predictor.programs if n.startswith("stage")] == [
        "stage 1",
        "stage 2",
        "stage 3",
    ]


def test_calibrated_exits_stay_within_the_budget():
    model, _, _ = _made()
    predictor = _predictor(4)
    macs = model.exit_macs()
    for budget in (float(macs[0] + macs[2]) / 2e9, 1.1 * macs[0] / 1e9):
        thresholds = predictor.calibrate_exits(_images(), budget)
        assert predictor.thresholds == thresholds
        spent = model.macs(predictor(_images()).tokens).mean()
        assert 0.8 * budget <= spent / 1e9 <= budget * (1 + 1e-6)


def test_what_is_not_possible_is_told():
    model, variables, _ = _made()
    with pytest.raises(UserError, match="1 thresholds for 3 exits"):
        Predictor(model, variables, thresholds=(0.5,))
    with pytest.raises(UserError, match="below the cost of the first exit"):
        _predictor(4).calibrate_exits(_images(), 1e-9)
    dense = msvit_jax.create_model("deit_tiny_patch16_224", image_size=16, depth=1, num_classes=4)
    plain = Predictor(dense, {"params": {}}, batch_size=4)
    assert plain.thresholds is None
    with pytest.raises(UserError, match="no cascade"):
        plain.thresholds = (0.5,)
    with pytest.raises(UserError, match="no cascade"):
        plain.calibrate_exits(_images(), 1.0)
