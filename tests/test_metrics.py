import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msvit_jax import metrics
from msvit_jax.models.output import GateOutput, Output

GRID = 16  # tokens of the fine grid: 4 regions of 2 x 2 cells


def _batch(size, seed=0, classes=7):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (size, 4)).astype(np.float32)
    output = Output(
        logits=jnp.asarray(rng.normal(size=(size, classes)), jnp.float32),
        tokens=jnp.asarray(GRID - 3 * coarse.sum(1), jnp.int32),
        gate=GateOutput(
            logits=jnp.asarray(rng.normal(size=(size, 4)), jnp.float32), coarse=jnp.asarray(coarse)
        ),
    )
    labels = jnp.asarray(rng.integers(0, classes, size), jnp.int32)
    mask = jnp.asarray(rng.random((size, 8, 8)) < 0.04, jnp.uint8)
    return output, labels, jnp.asarray(rng.random(size), jnp.float32), mask


def _sums(output, labels, loss, mask, valid=None):
    run = jax.jit(lambda *a: metrics.batch_sums(*a[:3], max_tokens=GRID, mask=a[3], valid=a[4]))
    return metrics.to_host(run(output, labels, loss, mask, valid))


def test_figures_equal_those_counted_by_hand():
    output, labels, loss, mask = _batch(50)
    figures = metrics.summarize(_sums(output, labels, loss, mask), np.arange(GRID + 1) * 1e9)
    logits, tokens = np.asarray(output.logits), np.asarray(output.tokens)
    coarse = np.asarray(output.gate.coarse)
    order = np.argsort(-logits, axis=1)
    hits = order == np.asarray(labels)[:, None]
    assert figures["examples"] == 50
    assert figures["top1"] == pytest.approx(100 * hits[:, 0].mean())
    assert figures["top5"] == pytest.approx(100 * hits[:, :5].any(1).mean())
    assert figures["loss"] == pytest.approx(np.asarray(loss).mean(), rel=1e-6)
    assert figures["tokens_mean"] == pytest.approx(tokens.mean())
    assert figures["tokens_variance"] == pytest.approx(tokens.var())
    assert figures["gmacs_mean"] == pytest.approx(tokens.mean())
    assert figures["fine_share"] == pytest.approx(1 - coarse.mean())
    assert figures["decision_variance"] == pytest.approx(coarse.var(axis=0).mean())
    pairs = [np.mean(a == b) for a, b in itertools.combinations(coarse, 2)]
    assert figures["agreement"] == pytest.approx(np.mean(pairs))


def test_content_figures_equal_those_counted_by_hand():
    output, labels, loss, mask = _batch(40)
    figures = metrics.summarize(_sums(output, labels, loss, mask))
    fine = np.asarray(output.gate.coarse) < 0.5
    content = np.zeros((40, 4), bool)
    for image, row, column in np.ndindex(40, 2, 2):
        square = np.asarray(mask)[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        content[image, 2 * row + column] = square.mean() >= 0.05
    assert 0 < content.mean() < 1
    assert figures["content_fine"] == pytest.approx(fine[content].mean())
    assert figures["plain_coarse"] == pytest.approx((~fine)[~content].mean())
    assert figures["fine_per_content"] == pytest.approx(fine.sum() / content.sum())


@pytest.mark.parametrize("split", [1, 13])
def test_sums_of_parts_add_up_to_those_of_the_whole(split):
    batch = _batch(30)
    cut = lambda part: jax.tree.map(lambda x: x[part], batch)  # noqa: E731
    added = _sums(*cut(slice(split))) + _sums(*cut(slice(split, None)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), _sums(*batch), added)


def test_padding_counts_nowhere_even_if_it_is_poisoned():
    output, labels, loss, mask = _batch(20)
    valid = jnp.arange(20) < 13
    poison = lambda x: x.at[13:].set(jnp.nan)  # noqa: E731
    poisoned = output.replace(logits=poison(output.logits))
    padded = _sums(poisoned, labels, poison(loss), mask, valid)
    cut = jax.tree.map(lambda x: x[:13], (output, labels, loss, mask))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), padded, _sums(*cut))


def test_nan_and_constant_logits_are_not_counted_as_hits():
    output, labels, loss, mask = _batch(8)
    for value in (jnp.nan, 0.0):
        constant = output.replace(logits=jnp.full_like(output.logits, value))
        assert _sums(constant, labels, loss, mask).top1 == 0


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.sampled_from([5, 50, 95, 100]))
def test_percentile_of_a_histogram(values, percent):
    histogram = np.bincount(values, minlength=31).astype(np.float64)
    expected = np.percentile(values, percent, method="inverted_cdf")
    assert metrics.percentile(histogram, percent) == expected


def test_a_fixed_pattern_has_no_variance_and_full_agreement():
    output, labels, loss, mask = _batch(12)
    pattern = jnp.tile(jnp.asarray([[1.0, 0.0, 1.0, 1.0]], jnp.float32), (12, 1))
    gate = output.gate.replace(coarse=pattern)
    figures = metrics.summarize(_sums(output.replace(gate=gate), labels, loss, mask))
    assert figures["decision_variance"] == 0
    assert figures["agreement"] == 1
