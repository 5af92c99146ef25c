"""The correction of a gate's bias, by hand, and that it holds any gate to its target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msvit_jax import config as configs
from msvit_jax.models import GateOutput
from msvit_jax.models import gate as gates
from msvit_jax.train import gate_target
from tests import jitted, tiny_run
from tests.train.test_step import Setup


def measured(logits, threshold=0.5, target=0.25):
    logits = jnp.asarray(logits, jnp.float32)
    gate = GateOutput(logits=logits, coarse=logits)
    return {k: float(v) for k, v in gate_target.measure(gate, threshold, target).items()}


def test_the_offset_is_the_logit_below_which_the_targets_share_lies():
    logits = np.arange(-3.0, 6.0).reshape(3, 3)  # -3, -2, ... 5; a quarter lies below -1
    found = measured(logits)
    assert found["fine_rate"] == pytest.approx(4 / 9)
    assert found["gate_offset"] == pytest.approx(-1.0)
    # A region is coarse where its probability exceeds 0.9, a logit of 2.197.
    found = measured(logits, threshold=0.9)
    assert found["fine_rate"] == pytest.approx(6 / 9)
    assert found["gate_offset"] == pytest.approx(-1.0 - np.log(9), rel=1e-5)


@given(
    seed=st.integers(0, 1000),
    target=st.floats(0.1, 0.9),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    start=st.floats(-20, 20),
)
@settings(max_examples=20)
def test_the_target_is_met_whatever_the_gates_scale_and_start(seed, target, spread, start):
    rng = np.random.default_rng(seed)
    bias, name = np.float32(start), gate_target.BIAS.split("/")
    correct = jax.jit(gate_target.correct)
    for _ in range(150):
        logits = jnp.asarray(rng.normal(0, spread, (64, 16)) + bias, jnp.float32)
        found = gate_target.measure(GateOutput(logits=logits, coarse=logits), 0.5, target)
        params = jnp.asarray(bias)
        for key in reversed(name):
            params = {key: params}
        params = correct(params, found, 0.1)
        for key in name:
            params = params[key]
        bias = np.asarray(params)
    fine = (rng.normal(0, spread, 100_000) + bias <= 0).mean()
    assert fine == pytest.approx(target, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "applies"),
    [
        ({}, True),
        ({"loss__gate__correction": 0.0}, False),
        ({"loss__gate__kind": "none"}, False),
        ({"loss__gate__kind": "bas", "loss__gate__prior": "beta"}, False),
        ({"model__gate": "random"}, False),
        ({"model__fine_share": 0.5}, False),
        ({"optimizer__freeze": ("gate",)}, False),
    ],
)
def test_only_a_gate_that_learns_toward_a_target_is_corrected(changes, applies):
    config = configs.resolve(tiny_run.msvit(**changes), 3)
    assert gate_target.applies(configs.build_model(config), config) == applies


@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.1, 3.0, 60.0]), price=st.floats(-5, 5))
@settings(max_examples=20)
def test_a_held_level_is_blind_to_any_price_of_fine_regions(seed, spread, price):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, spread, (6, 9)), jnp.float32)
    wanted = jnp.asarray(rng.normal(size=(6, 9)), jnp.float32)

    @jax.jit
    def passed_on(logits, price):
        def loss(logits):
            held = gates.hold_level(logits)
            return (held * wanted).sum() + price * jax.nn.sigmoid(held).sum()

        return jax.grad(loss)(logits)

    plain, priced = passed_on(logits, 0.0), passed_on(logits, price)
    np.testing.assert_allclose(plain, priced, atol=1e-4)
    if np.abs(np.asarray(logits)).min() < 5:  # not all certain
        assert abs(float(plain.sum())) < 1e-3
    np.testing.assert_array_equal(gates.hold_level(logits), logits)


def test_what_is_held_back_is_a_multiple_of_the_mean_probabilitys_gradient():
    config = configs.resolve(tiny_run.msvit(model__depth=1), 3)
    model = configs.build_model(config)
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    params = jitted.init(model, images, seed=1)["params"]

    def gradient(params, of, **attributes):
        def scalar(params):
            asked = {"train": True, "rngs": {"gate": jax.random.key(2)}}
            output = model.clone(**attributes).apply({"params": params}, images, **asked)
            return of(output)

        grads = jax.grad(scalar)(params)["gate_mlp"]
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(grads)])

    loss = lambda output: jnp.sin(3 * output.logits).sum()  # noqa: E731
    mean = lambda output: jax.nn.sigmoid(output.gate.logits).sum()  # noqa: E731

    @jax.jit  # one program, which computes once what all three need
    def gradients(params):
        held = gradient(params, loss, hold_level=True)
        return gradient(params, mean), gradient(params, loss), held

    level, free, held = map(np.asarray, gradients(params))
    taken = free - held
    share = taken @ level / (level @ level)
    assert np.linalg.norm(taken) > 0.01 * np.linalg.norm(free)
    np.testing.assert_allclose(taken, share * level, atol=1e-4 * np.abs(free).max())


def test_the_trainer_moves_a_gates_bias_by_the_correction_alone():
    config = tiny_run.msvit(loss__gate__correction=0.25, model__depth=1)
    setup = Setup(config)
    read = lambda params: float(params["model"]["gate_mlp"]["fc4"]["bias"][0])  # noqa: E731
    before = read(jax.device_get(setup.state.params))
    after, (report,) = setup.run(1)
    moved = -0.25 * float(report.scalars["gate_offset"])
    assert abs(moved) > 0.01
    assert read(after.params) - before == pytest.approx(moved, rel=1e-5)


def test_dense_models_have_nothing_to_correct():
    config = configs.resolve(tiny_run.config(), 3)
    assert not gate_target.applies(configs.build_model(config), config)
