"""ALGM: squares by a literal rule, pairs by the published one, and both through whole models."""

import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import msvit_jax
from msvit_jax import reducers
from msvit_jax.errors import UserError
from tests import jitted
from tests.models.test_vit import reference_forward, rough
from tests.reducers.test_tome import published

WIDTH, BATCH = 5, 3
CASES = [  # grid, tokens before it, keep
    ((4, 4), 0, 0.25),
    ((6, 4), 1, 0.6),
    ((5, 7), 3, 0.55),
    ((3, 8), 1, 0.9),
    ((2, 2), 1, 0.99),
]
SIZES = {"image_size": 32, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def squares(x, grid, prefix, keep):
    """The published first step on one image: its groups, their own token first, in reading order.

    Every whole 2 x 2 square gets the mean similarity of its six pairs. The most alike ones become
    one token each, as many as leave at least the share `keep`.
    """
    rows, columns = grid
    patches = rows * columns
    stay = math.ceil(round(keep * patches, 6))
    found = []
    for row, column in itertools.product(range(rows // 2), range(columns // 2)):
        inside = [prefix + (2 * row + y) * columns + 2 * column + x for y in (0, 1) for x in (0, 1)]
        pairs = [cosine(x[i], x[j]) for i, j in itertools.combinations(inside, 2)]
        found.append((sum(pairs) / 6, inside))
    found.sort(reverse=True)
    merged = [inside for _, inside in found[: (patches - stay) // 3]]
    gone = {token for inside in merged for token in inside[1:]}
    by_first = {inside[0]: inside for inside in merged}
    margin = min((a[0] - b[0] for a, b in itertools.pairwise(found)), default=1.0)
    return [by_first.get(i, [i]) for i in range(len(x)) if i not in gone], margin


@functools.cache
def compiled(grid, prefix, keep):
    reducer = reducers.ALGM(keep=keep, parent=None)
    count = prefix + grid[0] * grid[1]
    table = reducer.keep_table(count - prefix)

    @jax.jit
    def run(x):
        tokens = reducers.Tokens(
            x=x,
            member=jnp.ones((BATCH, count, 1), bool),
            prefix=jnp.tile(jnp.arange(count) < prefix, (BATCH, 1)),
            size=jnp.ones((BATCH, count)),
            grid=grid,
        )
        merge = reducer.apply({}, tokens, table, table.capacity(count, prefix, 1))
        return merge.kept, merge.tokens(x), merge.positions(count)

    return run


@pytest.mark.parametrize(("grid", "prefix", "keep"), CASES, ids=str)
@hypothesis.given(seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=10)
def test_the_most_alike_squares_become_their_mean(grid, prefix, keep, seed):
    rng = np.random.default_rng(seed)
    count = prefix + grid[0] * grid[1]
    x = rng.normal(size=(BATCH, count, WIDTH)).astype(np.float32)
    expected = [squares(image.astype(np.float64), grid, prefix, keep) for image in x]
    hypothesis.assume(min(margin for _, margin in expected) > 1e-5)
    kept, merged, place = jax.device_get(compiled(grid, prefix, keep)(x))
    for image, (groups, _) in enumerate(expected):
        assert merged.shape[1] == len(groups) >= keep * (count - prefix) + prefix - 1e-6
        for position, group in enumerate(groups):
            assert kept[image, position] == group[0]
            assert (place[image, group] == position).all()
            np.testing.assert_allclose(
                merged[image, position], x[image, group].mean(axis=0), atol=1e-5
            )


@pytest.mark.parametrize("options", [{}, {"class_token": False, "pool": "mean"}], ids=str)
def test_a_whole_model_is_a_numpy_transformer_that_merges_squares_and_then_pairs(options):
    """The second step is ToMe's, of the tokens themselves and not of attention's keys."""
    model = msvit_jax.create_model(
        "vit", reducer="algm", keep=(0.6, 0.7), num_classes=3, **SIZES, **options
    )
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = rough(jax.eval_shape(model.init, jax.random.key(0), images))
    prefix = model.prefix_length

    def reduce(layer, x, query, key, size):
        if layer == 0:
            groups, _ = squares(x, (8, 8), prefix, 0.6)
        else:
            patches = len(x) - prefix
            remove = min(patches - math.ceil(round(0.7 * patches, 6)), patches // 2)
            groups, _ = published(x, prefix, remove)
        x = np.stack([np.average(x[g], axis=0, weights=size[g]) for g in groups])
        size = np.array([size[g].sum() for g in groups])
        return x, size, np.ones(len(x))

    expected = reference_forward(variables["params"], images, model, reduce)
    found = jitted.apply(model, variables, images).logits
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    # 64 patches, 8 squares less, then 28 of 40 stay.
    np.testing.assert_array_equal(model.layer_tokens(64), [40, 28])


def test_a_segmenter_puts_squares_and_pairs_back_where_they_came_from():
    model = msvit_jax.create_model(
        "segmenter", encoder="vit", reducer="algm", keep=(0.6, 0.8), num_classes=4, **SIZES
    )
    images = jax.random.normal(jax.random.key(1), (2, 24, 40, 3))  # a grid of 6 x 10
    variables = rough(jax.eval_shape(model.init, jax.random.key(0), images))
    output = jitted.apply(model, variables, images)
    assert output.logits.shape == (2, 6, 10, 4)
    maps = np.asarray(output.merge_maps((6, 10)))
    for image in range(2):
        first, last = maps[image]
        corners = {(y, x) for y, x in np.ndindex(6, 10) if first[y, x] != 10 * y + x}
        assert len(corners) == 3 * 8  # 60 patches, 36 stay
        for y, x in corners:
            assert first[y, x] == 10 * (y // 2 * 2) + x // 2 * 2
        assert len(np.unique(last)) == math.ceil(0.8 * 36)
        cells = np.asarray(output.logits[image]).reshape(60, 4)
        np.testing.assert_array_equal(cells, cells[last.reshape(-1)])
        assert len(np.unique(cells, axis=0)) == len(np.unique(last))


def test_layers_are_the_published_ones():
    for depth, layers in ((12, (1, 5)), (4, (1, 2)), (2, (1, 2)), (1, (1,))):
        model = msvit_jax.create_model("vit", reducer="algm", depth=depth)
        assert tuple(layer + 1 for layer in model.reductions) == layers


def test_macs_are_those_of_the_tokens_that_are_left_and_little_more():
    dense = msvit_jax.create_model("seg_vit_small_mask")
    assert float(dense.macs(1024)) == pytest.approx(38.6e9, rel=0.05)  # published
    model = dense.with_backbone(reducer="algm", keep=(0.7, 0.8))
    left = 1 + model.layer_tokens(1024)  # after each layer's reduction, with the class token
    np.testing.assert_array_equal(left, [719] * 4 + [576] * 8)
    width, before = 384, np.array([1025, *left[:-1]], float)
    attention = 4 * before * width**2 + 2 * before**2 * width
    blocks = (attention + 8 * left * width**2).sum()
    full = 12 * (4 * 1025 * width**2 + 2 * 1025**2 * width + 8 * 1025 * width**2)
    expected = float(dense.macs(1024)) - full + blocks
    assert expected < float(model.macs(1024)) < 1.01 * expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit", {"keep": (0.2, 0.7)}, "leaves 0.25 of the tokens at least"),
        ("vit", {"keep": (0.7, 0.4)}, "leaves 0.5 of the tokens at least"),
        ("vit", {"remove": 4}, "remove=4 is for reducer='tome'"),
        ("msvit", {}, "squares of a whole grid, which the gate does already"),
    ],
    ids=str,
)
def test_what_is_not_possible_is_told_when_the_model_is_made(name, options, message):
    encoder = {"encoder": name, "num_classes": 3} if name == "msvit" else {}
    with pytest.raises(UserError, match=message):
        msvit_jax.create_model(
            "segmenter" if encoder else name, reducer="algm", **encoder, **SIZES, **options
        )


def test_a_grid_with_too_few_whole_squares_is_told():
    model = msvit_jax.create_model(
        "vit", reducer="algm", keep=(0.3, 0.7), **{**SIZES, "image_size": 20}
    )
    with pytest.raises(ValueError, match="grid of 5 x 5 tokens, which has 4 whole squares"):
        model.init(jax.random.key(0), jnp.zeros((1, 20, 20, 3)))


def test_mixed_scale_tokens_take_the_global_step_alone():
    model = msvit_jax.create_model(
        "segmenter", encoder="msvit", reducer="algm", keep=(1.0, 0.7), num_classes=4, **SIZES
    )
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = rough(jax.eval_shape(model.init, jax.random.key(0), images))
    coarse = np.tile(np.arange(16) % 2, (2, 1)).astype(np.float32)
    output = jitted.apply(model, variables, images, coarse=coarse)
    maps = np.asarray(output.merge_maps((8, 8)))
    tokens = [len(np.unique(step)) for step in maps[0]]
    assert tokens == [40, math.ceil(0.7 * 40)]
