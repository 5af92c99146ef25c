"""Losses against known numbers, numerical integration, and one and eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from msvit_jax import losses
from msvit_jax.models import GateOutput
from tests import jitted

X = [0.1, 0.4, 0.2, 0.9]


def full(value, count=4):
    return jnp.full((count,), value)


def logits(values):
    """Sorted along the first axis, as logits."""
    return jax.scipy.special.logit(jnp.sort(jnp.asarray(values), axis=0))


def shaped(cdf):
    return float(losses.empirical_cdf_distance(cdf))


def test_known_numbers_of_the_relaxed_bernoulli():
    cdf = losses.relaxed_bernoulli_cdf(logits(X), full(0.3), full(0.5))
    assert shaped(cdf) == pytest.approx(0.021078696, abs=1e-7)


@pytest.mark.parametrize(("a", "b", "value"), [(0.6, 0.4, 0.032809355), (2.0, 6.0, 0.025332371)])
def test_known_numbers_of_the_beta(a, b, value):
    assert shaped(losses.beta_cdf(jnp.sort(jnp.asarray(X)), a, b)) == pytest.approx(value, abs=1e-7)


def test_known_number_of_the_normal():
    cdf = losses.normal_cdf(jnp.sort(jnp.asarray(X)), 0.6, 0.1)
    assert shaped(cdf) == pytest.approx(0.143163456, abs=1e-7)
    cdf = losses.normal_cdf(jnp.sort(jnp.asarray([0.3, 0.6, 0.2])), 0.3, 0.1)
    assert shaped(cdf) == pytest.approx(0.023390245, abs=1e-7)


def test_known_number_with_a_prior_per_position():
    x = logits([[0.1, 0.9], [0.4, 0.2], [0.2, 0.3], [0.9, 0.8]])
    cdf = losses.relaxed_bernoulli_cdf(x, jnp.asarray([[0.3, 0.6]]), jnp.asarray([[0.5, 0.25]]))
    value = float(losses.empirical_cdf_distance(cdf).mean())
    assert value == pytest.approx(0.023021979, abs=1e-7)


@given(p=st.floats(0.05, 0.95), t=st.floats(0.1, 1.0))
def test_relaxed_bernoulli_is_the_distribution_of_its_samples(p, t):
    uniform = np.random.default_rng(0).random(20000)
    sample = 1 / (1 + np.exp(-(np.log(p / (1 - p)) + np.log(uniform / (1 - uniform))) / t))
    points = np.asarray([0.01, 0.2, 0.5, 0.8, 0.99], np.float32)
    cdf = losses.relaxed_bernoulli_cdf(logits(points), full(p, 5), full(t, 5))
    empirical = (sample[:, None] <= points).mean(0)
    np.testing.assert_allclose(cdf, empirical, atol=4 * 0.5 / np.sqrt(20000))
    assert 1 - float(cdf[2]) == pytest.approx(p, abs=1e-5)


def test_gradient_is_minus_twice_density_times_gap():
    x = jnp.sort(jnp.asarray(X))
    gradient = jax.grad(lambda v: losses.empirical_cdf_distance(losses.beta_cdf(v, 2.0, 6.0)))(x)
    rank = np.arange(1, 5) / 5
    beta = stats.beta(2, 6)
    expected = -2 * beta.pdf(np.asarray(x)) * (rank - beta.cdf(np.asarray(x))) / 4
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


@pytest.mark.parametrize("count", [8, 32, 128])
def test_samples_of_the_prior_score_the_floor(count):
    # The k-th of N uniform numbers has variance k (N + 1 - k) / ((N + 1)^2 (N + 2)).
    draws = np.random.default_rng(0).normal(0.0, 1.0, (count, 4000)).astype(np.float32)
    cdf = losses.normal_cdf(jnp.sort(jnp.asarray(draws), axis=0), 0.0, 1.0)
    mean = float(losses.empirical_cdf_distance(cdf).mean())
    assert mean == pytest.approx(1 / (6 * (count + 1)), rel=0.05)


def loss_of(logits, **options):
    module = losses.GateLoss(**({"region_grid": (3, 3), "target": 0.3} | options))
    output = GateOutput(logits=logits, coarse=jnp.zeros_like(logits))
    return module, output, jitted.init(module, output)


def value(logits, **options):
    module, output, variables = loss_of(logits, **options)
    return float(jitted.apply(module, variables, output).loss)


def test_rate_and_l0_speak_of_the_share_of_fine_regions():
    logits = jnp.full((4, 9), np.log(0.8 / 0.2), jnp.float32)  # P(coarse) = 0.8, so fine = 0.2
    assert value(logits, kind="rate") == pytest.approx(0.01, rel=1e-4)
    assert value(logits, kind="l0") == 0
    assert value(-logits, kind="l0") == pytest.approx(0.5, rel=1e-4)
    assert value(logits, kind="none") == 0


def test_generalized_is_shaping_plus_hyperprior():
    logits = jax.random.normal(jax.random.key(0), (16, 9))
    module, output, variables = loss_of(logits, kind="gbas", temperature=0.4, sigma=0.2)
    result = jitted.apply(module, variables, output)
    fine = np.sort(1 / (1 + np.exp(np.asarray(logits, np.float64))), axis=0)
    mean = 1 / (1 + np.exp(-np.asarray(variables["params"]["logit_mean"], np.float64)))
    rank = np.arange(1, 17)[:, None] / 17
    cdf = 1 / (1 + np.exp(-(0.4 * np.log(fine / (1 - fine)) - np.log(mean / (1 - mean)))))
    shaping = ((rank - cdf) ** 2).mean()
    hyper = ((np.arange(1, 10) / 10 - stats.norm(0.3, 0.2).cdf(np.sort(mean))) ** 2).mean()
    assert float(result.loss) == pytest.approx(shaping + hyper, rel=1e-4)
    assert float(result.terms["hyperprior"]) == pytest.approx(hyper, rel=1e-4)


def test_priors_start_finer_in_the_center_with_the_target_as_their_mean():
    _, _, variables = loss_of(jnp.zeros((2, 25)), kind="gbas", region_grid=(5, 5), target=0.2)
    mean = np.asarray(jax.nn.sigmoid(variables["params"]["logit_mean"])).reshape(5, 5)
    assert mean[2, 2] == mean.max()
    assert mean[0, 0] == mean.min()
    assert mean.mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("kind", ["bas", "gbas"])
def test_a_certain_gate_gets_gradient_unless_it_is_clipped(kind):
    certain = jnp.full((8, 9), 12.0)  # coarse, whatever the image

    def slope(**options):
        module, _, variables = loss_of(certain, kind=kind, **options)
        loss = lambda x: module.apply(variables, GateOutput(logits=x, coarse=x)).loss  # noqa: E731
        return float(jnp.abs(jax.jit(jax.grad(loss))(certain)).max())

    assert slope() > 1e-4
    assert slope(clip=1e-3) == 0


@pytest.mark.parametrize("kind", ["rate", "bas", "gbas"])
def test_descent_brings_the_hard_rate_to_the_target(kind):
    logits = jax.random.normal(jax.random.key(0), (64, 9)) + 1.0
    module, _, variables = loss_of(logits, kind=kind, target=0.3)

    def loss(x, v):
        return module.apply(v, GateOutput(logits=x, coarse=x)).loss

    @jax.jit
    def descend(x, v):
        gx, gv = jax.grad(loss, argnums=(0, 1))(x, v)
        return x - 100.0 * gx, jax.tree.map(lambda a, b: a - 1.0 * b, v, gv)

    for _ in range(400):
        logits, variables = descend(logits, variables)
    if kind == "gbas":  # each position goes to its own prior, P(x > 1/2) = mean
        means = jax.nn.sigmoid(variables["params"]["logit_mean"])
        np.testing.assert_allclose((logits < 0).mean(axis=0), means, atol=0.08)
        assert float(means.mean()) == pytest.approx(0.3, abs=0.1)
    elif kind == "bas":
        np.testing.assert_allclose((logits < 0).mean(axis=0), 0.3, atol=0.06)
    else:
        assert float(jax.nn.sigmoid(-logits).mean()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("kind", ["rate", "bas", "gbas"])
def test_same_value_and_gradient_on_one_device_and_on_eight(kind):
    logits = jax.random.normal(jax.random.key(1), (32, 9))
    module, _, variables = loss_of(logits, kind=kind)

    def loss(v, x, axis_name=None):
        return module.apply(v, GateOutput(logits=x, coarse=x), axis_name=axis_name).loss

    both = jax.value_and_grad(loss, argnums=(0, 1))
    expected_value, (expected_v, expected_x) = jax.jit(both)(variables, logits)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data")))
    got_value, (got_v, got_x) = jax.jit(both)(variables, rows)
    np.testing.assert_allclose(got_value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(got_x, expected_x, rtol=1e-5, atol=1e-8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got_v, expected_v)

    def on_device(v, x):
        # As a data-parallel trainer does it: own rows, then the mean of the gradients. Gradients
        # with respect to a device's own rows stay its own; the mean over devices divides by 8.
        result, (gv, gx) = jax.value_and_grad(
            lambda *args: loss(*args, axis_name="batch"), argnums=(0, 1)
        )(v, x)
        return result, jax.lax.pmean(gv, "batch"), gx / 8

    split = logits.reshape(8, 4, 9)
    results, gv, gx = jax.pmap(on_device, axis_name="batch", in_axes=(None, 0))(variables, split)
    np.testing.assert_allclose(results, np.full(8, expected_value), rtol=1e-6)
    np.testing.assert_allclose(np.reshape(gx, (32, 9)), expected_x, rtol=1e-5, atol=1e-8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5), gv, expected_v)


def test_distillation_is_zero_at_the_teacher_and_gives_it_no_gradient():
    logits = jax.random.normal(jax.random.key(0), (4, 7))
    np.testing.assert_allclose(losses.distillation(logits, logits, temperature=3.0), 0, atol=1e-6)
    gradient = jax.grad(lambda t: losses.distillation(logits, t).sum())(logits + 1.0 * logits)
    np.testing.assert_array_equal(gradient, 0)


def test_soft_distillation_is_the_divergence():
    a, b = (jax.random.normal(jax.random.key(k), (3, 5)) for k in range(2))
    teacher = np.asarray(jax.nn.softmax(b / 2), np.float64)
    student = np.asarray(jax.nn.softmax(a / 2), np.float64)
    expected = 4 * (teacher * np.log(teacher / student)).sum(-1)
    np.testing.assert_allclose(losses.distillation(a, b, temperature=2.0), expected, rtol=1e-4)


def test_hard_distillation_is_cross_entropy_with_the_teachers_label():
    a, b = (jax.random.normal(jax.random.key(k), (3, 5)) for k in range(2))
    labels = jax.nn.one_hot(b.argmax(-1), 5)
    expected = losses.cross_entropy(a, labels)
    np.testing.assert_allclose(losses.distillation(a, b, kind="hard"), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gbsa"}, "not one of none, rate"),
        ({"kind": "bas", "prior": "gamma"}, "neither 'relaxed_bernoulli'"),
        ({"kind": "gbas", "start": "edge"}, "neither 'center'"),
        ({"kind": "gbas", "region_grid": (4, 4)}, "do not fit"),
        ({"target": 0.0}, "between 0 and 1"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(jnp.zeros((2, 9)), **options)


def test_unknown_distillation_is_told():
    with pytest.raises(ValueError, match="neither 'soft' nor 'hard'"):
        losses.distillation(jnp.zeros((1, 2)), jnp.zeros((1, 2)), kind="medium")
