"""Which patch holds the token that each patch is part of.

That it is the same in every layout is checked in test_mergence.py, whose programs say it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

import msvit_jax
from msvit_jax import reducers
from tests.jitted import apply, init

SIDE, GRID = 32, 64
SIZES = {"image_size": SIDE, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 3}
REDUCED = {"reduce_layers": (1, 3), "keep": 0.6}


def _images(count=8):
    """Even on the left, noisy on the right: their gates differ."""
    rng = np.random.default_rng(0)
    contrast = rng.uniform(0, 1, (count, 4, 1, 4, 1, 1)) ** 2
    images = contrast * rng.normal(size=(count, 4, 8, 4, 8, 3))
    return jnp.asarray(images.reshape(count, SIDE, SIDE, 3), jnp.float32)


@functools.cache
def _variables(name):
    """Random, and larger than at the start, so that images and their gates differ."""
    model = msvit_jax.create_model(name, **SIZES)
    start = init(model, _images(1))

    def larger(path, x):
        return (20 if "fc4" in jax.tree_util.keystr(path) else 3) * x if x.ndim > 1 else x

    return jax.tree_util.tree_map_with_path(larger, start)


@functools.cache
def _apply(name, **options):
    model = msvit_jax.create_model(name, **SIZES, **REDUCED, **options)
    # As long as `_variables` is: no reducer has parameters.
    return jax.device_get(jax.jit(model.apply)(_variables(name), _images()))


def test_a_model_that_reduces_nothing_has_no_hosts():
    model = msvit_jax.create_model("vit_tiny_patch16_224", **SIZES)
    assert apply(model, _variables("vit_tiny_patch16_224"), _images()).merge_targets is None


@functools.cache
def _first_layer(name):
    """What attention of the first layer sees: [B, 1 + N, D]."""

    @jax.jit
    def first(variables, images):
        dense = msvit_jax.create_model(name, **SIZES).bind(variables)
        x = dense.with_prefix(dense.embed(images).reshape(8, GRID, -1))
        return dense.blocks[0].norm1(x)

    return np.asarray(first(_variables(name), _images()))


@pytest.mark.parametrize("reducer", ["mergence", "topk", "evit"])
def test_the_hosts_are_the_patches_that_the_class_token_looks_at_most(reducer):
    name = "vit_tiny_patch16_224"
    first, _ = _apply(name, reducer=reducer).merge_targets
    x, qkv = _first_layer(name), _variables(name)["params"]["blocks_0"]["attn"]["qkv"]
    projected = x @ np.asarray(qkv["kernel"]) + np.asarray(qkv["bias"])
    query, key, _ = np.moveaxis(projected.reshape(8, 1 + GRID, 3, 2, 8), 2, 0)
    scores = np.einsum("bhd,bnhd->bhn", query[:, 0], key) / np.sqrt(8)
    received = softmax(scores, axis=-1)[:, :, 1:].mean(axis=1)
    crucial = int(np.ceil(0.6 * GRID))
    kept = crucial + (reducer == "evit")  # the first of the others holds their sum
    for image in range(8):
        most = np.argsort(-received[image])[:kept]
        np.testing.assert_array_equal(np.setdiff1d(first[image], [-1]), np.sort(most))
        gone = np.delete(first[image], most)
        if reducer == "topk":
            assert (gone == -1).all()
        elif reducer == "evit":
            assert (gone == most[-1]).all()
        else:
            assert (gone >= 0).all()


@pytest.mark.parametrize("reducer", reducers.REDUCERS)
def test_hosts_tell_the_same_groups_as_places(reducer):
    output = _apply("vit_tiny_patch16_224", reducer=reducer)
    for places, hosts in zip(output.merge_positions, output.merge_targets, strict=True):
        for place, host in zip(places, hosts, strict=True):
            np.testing.assert_array_equal(place < 0, host < 0)
            alive = place >= 0
            pairs = set(zip(place[alive].tolist(), host[alive].tolist(), strict=True))
            assert len(pairs) == len({p for p, _ in pairs}) == len({h for _, h in pairs})
            assert all(place[h] == p for p, h in pairs)  # a host is part of its own token
            if reducer not in ("tome", "algm"):  # in their order; ToMe's is in test_tome.py
                assert [h for _, h in sorted(pairs)] == sorted(h for _, h in pairs)


def test_slots_without_a_token_have_no_host_and_are_none():
    output = _apply("msvit_tiny_patch16_224", reducer="mergence", gate_bias=0.0)
    hidden = np.zeros((8, 16, 4), bool)
    hidden[:, :, 1:] = output.gate.coarse[:, :, None] == 1
    hidden = hidden.reshape(8, GRID)
    for hosts in output.merge_targets:
        np.testing.assert_array_equal(hosts == -1, hidden)
        assert not np.take_along_axis(hidden, np.maximum(hosts, 0), axis=1).any()


def test_maps_of_mixed_scale_tokens_cover_their_regions():
    output = _apply("msvit_tiny_patch16_224", reducer="mergence", gate_bias=0.0)
    maps = np.asarray(jax.tree.map(jnp.asarray, output).merge_maps((8, 8)))
    assert maps.shape == (8, 2, 8, 8)

    def cell(slot):  # regions row by row, slots row by row within a region
        region, inner = divmod(int(slot), 4)
        return region // 4 * 2 + inner // 2, region % 4 * 2 + inner % 2

    for stage, hosts in enumerate(output.merge_targets):
        for image, slot in np.ndindex(8, GRID):
            region, inner = divmod(slot, 4)
            own = slot - inner if output.gate.coarse[image, region] else slot
            row, column = cell(hosts[image, own])
            assert maps[(image, stage, *cell(slot))] == 8 * row + column


def test_maps_of_plain_tokens_are_their_grid():
    output = _apply("vit_tiny_patch16_224", reducer="topk")
    maps = np.asarray(output.merge_maps((8, 8)))
    np.testing.assert_array_equal(maps[:, 1].reshape(8, GRID), output.merge_targets[1])
    assert (maps == -1).any()
