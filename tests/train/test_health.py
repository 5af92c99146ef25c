"""What a run warns of, once and with a remedy, and what it does not."""

import numpy as np

from msvit_jax.train import health


def warnings(norms=(), top1=(), rates=(), steps=300, half_epoch=100):
    """All warnings of a run whose figures are functions of the step, or constant."""
    watch = health.Health(batch_size=64, half_epoch=half_epoch)
    rng, said = np.random.default_rng(0), []
    for step in range(steps):
        scalars = {"grad_norm_gate": norms(step) if norms else 1 + 0.3 * rng.random()}
        if rates:
            scalars["fine_rate"] = rates(step)
        accuracy = top1(step) if top1 else 60 + 6 * rng.normal()
        said += watch.observe(scalars, accuracy)
    return said


def test_a_healthy_run_is_silent():
    assert warnings(rates=lambda step: 0.3) == []


def test_a_norm_that_stays_a_hundred_times_its_start_is_told_once():
    (text,) = warnings(norms=lambda step: 2.0 if step < 50 else 300.0)
    assert "grad_norm_gate grows: 300" in text
    assert "gate_learning_rate" in text
    assert warnings(norms=lambda step: 1e6 if step == 70 else 2.0) == []  # a single one


def test_a_gate_that_saturates_for_half_an_epoch_is_told():
    (text,) = warnings(rates=lambda step: 1.0)
    assert "all regions fine for 100 steps" in text
    (text,) = warnings(rates=lambda step: 0.3 if step < 50 else 0.001)
    assert "all regions coarse for 100 steps" in text
    assert warnings(rates=lambda step: 1.0 if step < 90 else 0.4) == []


def test_accuracy_far_below_its_start_is_told():
    (text,) = warnings(top1=lambda step: 70.0 if step < 30 else 40.0)
    assert "training top-1 falls" in text
    assert "learning_rate" in text
    assert warnings(top1=lambda step: 70.0 if step < 30 else 60.0) == []
