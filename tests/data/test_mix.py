"""Mixup and cutmix: what they promise about images, targets, and independence of devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from msvit_jax.data import mix
from msvit_jax.errors import UserError

B, S, C = 8, 12, 5


def batch(seed=0):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.normal(size=(B, S, S, 3)), jnp.float32)
    return images, jax.nn.one_hot(jnp.asarray(rng.integers(C, size=B)), C, dtype=jnp.float32)


def constant_images():
    """Image i is i everywhere, so that a pixel tells which image it came from."""
    return jnp.broadcast_to(jnp.arange(B, dtype=jnp.float32)[:, None, None, None], (B, S, S, 3))


@given(st.integers(0, 2**31), st.floats(0.1, 2.0), st.floats(0.1, 2.0), st.floats(0.0, 1.0))
def test_targets_stay_distributions(seed, mixup, cutmix, switch):
    images, targets = batch()
    mixed = mix.mix(
        jax.random.key(seed), images, targets, mixup=mixup, cutmix=cutmix, switch_prob=switch
    )
    np.testing.assert_allclose(mixed.targets.sum(1), np.ones(B), rtol=1e-6)
    assert (np.asarray(mixed.targets) >= 0).all()


@given(st.integers(0, 2**31))
def test_cutmix_pastes_one_rectangle_whose_area_is_the_targets_share(seed):
    targets = jnp.eye(B, dtype=jnp.float32)
    mixed = mix.mix(jax.random.key(seed), constant_images(), targets, cutmix=1.0)
    pixels, got = np.asarray(mixed.images), np.asarray(mixed.targets)
    for row in range(B):
        foreign = pixels[row, :, :, 0] == B - 1 - row
        assert ((pixels[row, :, :, 0] == row) | foreign).all()
        np.testing.assert_allclose(got[row, B - 1 - row], foreign.mean(), atol=1e-6)
        rows, columns = foreign.any(1), foreign.any(0)
        assert foreign.sum() == rows.sum() * columns.sum()
        assert (np.diff(np.flatnonzero(rows)) == 1).all()


@given(st.integers(0, 2**31))
def test_mixup_blends_with_the_reversed_batch_by_the_targets_share(seed):
    targets = jnp.eye(B, dtype=jnp.float32)
    mixed = mix.mix(jax.random.key(seed), constant_images(), targets, mixup=0.8)
    lam = np.asarray(mixed.targets)[0, 0]
    own = np.arange(B)
    expected = lam * own + (1 - lam) * own[::-1]
    np.testing.assert_allclose(mixed.images[:, 3, 4, 1], expected, rtol=1e-5, atol=1e-5)


def test_draws_follow_the_beta_distribution_and_the_probabilities():
    targets = jnp.eye(B, dtype=jnp.float32)

    def share(key):
        return mix.mix(key, constant_images(), targets, mixup=0.8, prob=0.5).targets[0, 0]

    kept = np.asarray(jax.vmap(share)(jax.random.split(jax.random.key(3), 2000)))
    assert abs((kept == 1).mean() - 0.5) < 0.05
    mixed = kept[kept < 1]
    # Beta(0.8, 0.8) has mean 1/2 and variance 1 / (4 (2 * 0.8 + 1)).
    assert abs(mixed.mean() - 0.5) < 0.04
    assert abs(mixed.var() - 1 / (4 * 2.6)) < 0.02


def test_off_returns_the_batch_itself():
    images, targets = batch()
    chex.assert_trees_all_equal(
        mix.mix(jax.random.key(0), images, targets), mix.Mixed(images, targets)
    )
    unmixed = mix.mix(jax.random.key(0), images, targets, mixup=0.8, cutmix=1.0, prob=0.0)
    chex.assert_trees_all_equal(unmixed, mix.Mixed(images, targets))


@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_same_result_on_eight_devices(alphas):
    images, targets = batch()
    key = jax.random.key(5)
    alone = mix.mix(key, images, targets, **alphas)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put((images, targets), NamedSharding(mesh, P("data")))
    spread = jax.jit(lambda key, *b: mix.mix(key, *b, **alphas))(key, *sharded)
    assert len(sharded[0].devices()) == 8
    chex.assert_trees_all_close(jax.device_get(spread), jax.device_get(alone), atol=1e-6)


@pytest.mark.parametrize("bad", [{"mixup": -1.0}, {"cutmix": 1.0, "prob": 1.5}])
def test_bad_settings_are_named(bad):
    with pytest.raises(UserError, match=r"data\.mixup"):
        mix.mix(jax.random.key(0), *batch(), **bad)
