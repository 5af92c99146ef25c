import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from msvit_jax import config as configs
from msvit_jax import drawing, losses, sharding
from msvit_jax.pixels import normalize
from msvit_jax.train import optimizer
from msvit_jax.train.capacity_schedule import StepCapacity
from msvit_jax.train.program import TrainProgram
from msvit_jax.train.step import Teacher
from msvit_jax.train_state import TrainState, init_params
from tests import jitted, tiny_run

BATCH = 16
CASES = {
    "vit": lambda **k: tiny_run.config(**k),
    "msvit": lambda **k: tiny_run.msvit(loss__gate__weight=4.0, **k),
    # Two images packed together, wherever they are: those on a device of eight.
    "trimmed": lambda **k: tiny_run.msvit(
        loss__gate__weight=4.0,
        model__layout="trimmed",
        model__token_capacity=(12, 17),
        model__row_groups=8,
        **k,
    ),
    "dvt": lambda **k: tiny_run.dvt(loss__exits__distillation=0.25, **k),
}


@functools.cache
def _batch(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 255, (BATCH, 16, 16, 3), dtype=np.uint8)
    return {"image": images, "label": rng.integers(0, 3, BATCH, dtype=np.int32)}


class Setup:
    """A state and a jitted step on the first devices of this machine."""

    def __init__(self, config, devices=1, fsdp=1):
        config = configs.resolve(config, 3)
        self.mesh = jax.make_mesh(
            (devices // fsdp, fsdp),
            sharding.BATCH_AXES,
            axis_types=(AxisType.Auto,) * 2,
            devices=jax.devices()[:devices],
        )
        self.program = program = TrainProgram.from_config(config, self.mesh, lambda step: 1e-3)
        self.model = program.model
        # `test_same_start_on_every_mesh` is about what starts without it.
        dense, key = program.model.with_dense_layout(), jax.random.key(config.seed)
        begin = functools.partial(init_params, dense, program.gate_loss)
        start = jax.device_get(drawing.needed(begin, key))
        with jax.set_mesh(self.mesh):
            self.state = program.fresh_state(optimizer.flat_names(start))
        self.step = program.jit_step()

    def run(self, steps=2, teacher=None):
        reports = []
        with jax.set_mesh(self.mesh):
            for index in range(steps):
                batch = sharding.shard_batch(self.mesh, _batch(index))
                self.state, reported = self.step(self.state, batch, teacher)
                reports.append(jax.device_get(reported))
        return jax.device_get(self.state), reports


def _assert_close(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


class Outcome(NamedTuple):
    """Reports of three steps, and the states before them, after the first and after the last."""

    start: TrainState
    first: TrainState
    last: TrainState
    reports: list


@functools.cache
def _outcome(case, devices, fsdp):
    """Three steps with every random part on."""
    random = {"model__drop_path": 0.2}
    if case == "vit":  # images and labels are mixed, and parameters averaged, for any model alike
        random |= {"data__mixup": 0.8, "data__cutmix": 1.0, "ema_decay": 0.5}
    else:  # one block to compile instead of all; a cascade's cannot be scanned
        random |= {"model__depth": 1} if case == "dvt" else {"model__scan_layers": True}
    setup = Setup(CASES[case](**random), devices, fsdp)
    start = jax.device_get(setup.state)
    first, reports = setup.run(1)
    _, later = setup.run(2)
    assert setup.step._cache_size() == 1, "compiled more than once"
    return Outcome(start, first, setup.state, reports + later)


@functools.cache
def _plain():
    """One step without random parts: the setup, its parameters before, its state after, reports."""
    setup = Setup(CASES["vit"](loss__label_smoothing=0.1))
    return setup, jax.device_get(setup.state.params["model"]), *setup.run(1)


def _gradients(state):
    """Adam's first moments after one step: the gradient over ten."""
    moments = {n: x for n, x in optimizer.flat_names(state.opt_state).items() if "/mu/" in n}
    assert len(moments) > 20
    return moments


# On eight devices the batch is cut into eight, and the parameters into four.
@pytest.mark.parametrize(("case", "devices", "fsdp"), [("vit", 2, 1), *((c, 8, 4) for c in CASES)])
def test_same_steps_on_any_number_of_devices(case, devices, fsdp):
    alone, many = _outcome(case, 1, 1), _outcome(case, devices, fsdp)
    _assert_close(alone.reports[0], many.reports[0], rtol=1e-5, atol=1e-6)
    # Adam's first step turns rounding of tiny gradients into signs: compare gradients first.
    _assert_close(_gradients(alone.first), _gradients(many.first), rtol=1e-4, atol=1e-7)
    _assert_close(alone.reports, many.reports, rtol=1e-3, atol=1e-4)
    ours, theirs = (jax.device_get(outcome.last.params) for outcome in (alone, many))
    _assert_close(ours, theirs, atol=2e-3)


def test_same_start_on_every_mesh():
    setup = Setup(CASES["msvit"](), 8, 4)
    with jax.set_mesh(setup.mesh):
        fresh = setup.program.fresh_state({})
    _assert_close(fresh, setup.state, rtol=1e-6)


def test_parameters_are_cut_along_fsdp():
    kernel = _outcome("vit", 8, 4).last.params["model"]["blocks_0"]["attn"]["qkv"]["kernel"]
    assert kernel.shape == (16, 48)
    assert {s.data.shape for s in kernel.addressable_shards} == {(16, 12)}


def test_accumulated_gradient_is_that_of_the_whole_batch():
    *_, whole, reports = _plain()
    config = CASES["vit"](optimizer__accum_steps=4, loss__label_smoothing=0.1)
    microbatches, more_reports = Setup(config, 4).run(1)
    # Without random parts and with equal microbatches the mean of means is the mean.
    _assert_close(reports, more_reports, rtol=1e-5, atol=1e-6)
    _assert_close(_gradients(whole), _gradients(microbatches), rtol=1e-4, atol=1e-7)


def test_every_parameter_of_a_gate_and_its_priors_moves():
    outcome = _outcome("msvit", 1, 1)
    before, after = (optimizer.flat_names(s.params) for s in (outcome.start, outcome.last))
    for name, value in after.items():
        if "gate" in name:
            assert np.any(value != before[name]), name


def test_steps_without_alternatives_leave_the_gate_to_its_loss_and_the_others_make_up_for_it():
    """The gate's gradient is a multiple, all others' are the same, whatever places there are."""
    grads = {}
    for factor in (0.0, 1.0, 4.0):
        # No loss of its own: what the gate gets is the task's.
        options = {"model__layout": "trimmed", "model__depth": 1}
        setup = Setup(tiny_run.msvit(loss__gate__kind="none", **options))
        capacity = StepCapacity((20,) if factor else (16,), factor)
        setup.step = setup.program.jit_step(capacity)
        grads[factor] = _gradients(setup.run(1)[0])
    for name, once in grads[1.0].items():
        factor = 4.0 if "gate_mlp" in name else 1.0
        np.testing.assert_allclose(grads[4.0][name], factor * once, rtol=1e-3, atol=1e-7)
        expected = np.zeros_like(once) if "gate_mlp" in name else once
        np.testing.assert_allclose(grads[0.0][name], expected, rtol=1e-3, atol=1e-6)
    assert max(np.abs(x).max() for n, x in grads[1.0].items() if "gate_mlp" in n) > 1e-5


def test_frozen_backbone_stays_bit_for_bit():
    setup = Setup(CASES["msvit"](optimizer__freeze="backbone/"))
    before = jax.device_get(setup.state.params)
    after = setup.run(2)[0].params
    moved = {
        name.split("/")[1] if name.startswith("model") else name.split("/")[0]
        for name, value in optimizer.flat_names(after).items()
        if np.any(value != optimizer.flat_names(before)[name])
    }
    assert moved == {"gate_mlp", "gate_loss"}


def test_ema_follows_the_parameters():
    start, state, *_ = _outcome("vit", 8, 4)
    models = start.params["model"], state.params["model"]
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, *models)
    _assert_close(state.ema, expected, rtol=1e-5, atol=1e-7)


def test_step_loss_by_hand():
    setup, params, _, reports = _plain()
    images = normalize(jnp.asarray(_batch()["image"]), setup.model.mean, setup.model.std)
    output = jitted.apply(setup.model, {"params": params}, images, train=False)
    logits = np.asarray(output.logits)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = np.full((BATCH, 3), 0.1 / 3)
    targets[np.arange(BATCH), _batch()["label"]] += 0.9
    expected = -(targets * log_p).sum(1)
    assert reports[0].scalars["total_loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert reports[0].sums.loss == pytest.approx(expected.sum(), rel=1e-5)


def test_gate_loss_is_weighed_in():
    for reported in _outcome("msvit", 1, 1).reports:
        scalars, sums = reported.scalars, reported.sums
        expected = sums.loss / sums.count + 4.0 * scalars["gate_loss"]
        assert scalars["total_loss"] == pytest.approx(expected, rel=1e-5)
        assert scalars["shaping"] + scalars["hyperprior"] == pytest.approx(scalars["gate_loss"])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_by_hand(kind):
    weighed = {"loss__distillation__weight": 0.25, "loss__distillation__kind": kind}
    config = CASES["vit"](model__depth=1, **weighed)
    config.loss.distillation.temperature = 2.0
    setup = Setup(config)
    # A teacher that wants its images on another scale.
    other = setup.model.clone(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = jnp.asarray(_batch()["image"])
    theirs = jitted.init(other, normalize(pixels, other.mean, other.std), seed=5)
    params = {"params": jax.device_get(setup.state.params["model"])}
    ours, wanted = (
        jitted.apply(m, v, normalize(pixels, m.mean, m.std)).logits
        for m, v in ((setup.model, params), (other, theirs))
    )
    distance = losses.distillation(ours, wanted, temperature=2.0, kind=kind).mean()
    labels = losses.cross_entropy(
        ours, losses.smooth(jnp.asarray(_batch()["label"]), 3, 0.0)
    ).mean()
    _, reports = setup.run(1, Teacher(model=other, variables=theirs))
    expected = 0.75 * labels + 0.25 * distance
    assert reports[0].scalars["total_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_normalize_by_hand():
    pixels = np.array([[[[0, 51, 255]]]], np.uint8)
    out = normalize(jnp.asarray(pixels), (0.0, 0.1, 0.5), (1.0, 0.5, 0.25))
    np.testing.assert_allclose(out[0, 0, 0], [0.0, 0.2, 2.0], rtol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_a_cascade_learns_the_sum_of_its_exits(weight):
    config = tiny_run.dvt(
        model__depth=1, loss__exits__distillation=weight, loss__label_smoothing=0.1
    )
    setup = Setup(config)
    batch, state = _batch(), jax.device_get(setup.state)
    _, (reported,) = setup.run(1)
    images = normalize(jnp.asarray(batch["image"]), setup.model.mean, setup.model.std)
    output = jitted.apply(setup.model, {"params": state.params["model"]}, images, train=True)
    log_p = np.asarray(jax.nn.log_softmax(output.exit_logits), np.float64)
    targets = np.asarray(losses.smooth(jnp.asarray(batch["label"]), 3, 0.1))
    first, last = (-(targets * log_p[:, exit]).sum(1).mean() for exit in (0, 1))
    divergence = (np.exp(log_p[:, 1]) * (log_p[:, 1] - log_p[:, 0])).sum(1).mean()
    expected = last + (1 - weight) * first + weight * divergence
    assert reported.scalars["total_loss"] == pytest.approx(expected, rel=1e-4)
    assert reported.sums.loss / BATCH == pytest.approx(last, rel=1e-4)  # comparable to other models
    right = (output.exit_logits.argmax(-1) == batch["label"][:, None]).sum(0)
    np.testing.assert_array_equal(reported.sums.exit_top1, right)
