"""The correction of a gate's bias, by hand, and that it holds any gate to its target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msvit_jax import config as configs
from msvit_jax.models import GateOutput
from msvit_jax.train import gate_target
from tests import tiny_run


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
def test_only_a_gate_that_learns_towards_a_target_is_corrected(changes, applies):
    config = configs.resolve(tiny_run.msvit(**changes), 3)
    assert gate_target.applies(configs.build_model(config), config) == applies


def test_dense_models_have_nothing_to_correct():
    config = configs.resolve(tiny_run.config(), 3)
    assert not gate_target.applies(configs.build_model(config), config)
