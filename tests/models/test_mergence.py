"""Models that reduce tokens, and multi-scale features: against plain references, in all layouts."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.special import erf, softmax

import msvit_jax
from msvit_jax import flops
from msvit_jax.errors import UserError
from msvit_jax.models import block as blocks
from msvit_jax.models.attention import IMPLEMENTATIONS, Mask, attention
from msvit_jax.models.msvit import MSViT
from tests.jitted import init
from tests.models.poison import poisonable
from tests.models.test_vit import TINY, reference_forward, rough
from tests.reducers.test_reducers import loop

DENSE, MIXED, MERGENCE = (f"{kind}deit_tiny_patch16_224" for kind in ("", "msvit_", "mergence_"))
REDUCERS = ("mergence", "topk", "evit", "tome", "algm", "random")


@functools.cache
def make(name, batch=3, **options):
    """A model, parameters that are random everywhere, and images."""
    model = msvit_jax.create_model(name, **(TINY | options))
    images = jax.random.normal(jax.random.key(1), (batch, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return model, rough(shapes), images


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def logits(model, variables, images):
    return np.asarray(compiled(model)(variables, images).logits)


# Against references.


def reducing(model, record=None):
    """What `reference_forward` does between attention and MLP for a model's reducer.

    Tokens before, the host of each, the hosts in order and their tokens are appended to `record`.
    """
    prefix = model.prefix_length
    proportional = model.reducer_options.get("proportional_attention", model.reducer == "tome")

    def reduce(layer, x, query, key, size):
        if layer not in model.reductions:
            return x, size, size if proportional else np.ones(len(x))
        asks = query[0]
        if model.pool == "mean":
            asks = np.average(query[prefix:], axis=0, weights=size[prefix:])
        scores = np.einsum("hd,nhd->hn", asks, key) / np.sqrt(key.shape[-1])
        score = softmax(scores, axis=1).mean(axis=0)
        reducer = model.reductions[layer].make()
        options = {"remove": reducer.remove} if model.remove else {"keep": reducer.keep}
        values = (x, size, score, key.mean(axis=1), np.zeros(len(x), int))
        case = model.reducer, {**options, **model.reducer_options}
        where, held, sizes = loop(case, *values, prefix)
        before, x = x, np.stack([held[host] for host in held])
        if record is not None:
            record.append((before, where, list(held), x))
        size = np.array([sizes[host] for host in held])
        return x, size, size if proportional else np.ones(len(x))

    return reduce


@pytest.mark.parametrize(
    "options",
    [
        {"reducer": "mergence"},
        {"reducer": "mergence", "merge_weights": "size", "keep": (0.9, 0.6)},
        {"reducer": "topk", "distilled": True},
        {"reducer": "evit"},
        {"reducer": "tome", "remove": 3, "layer_scale": 0.5},
        {"reducer": "tome", "remove": 3, "distilled": True, "proportional_attention": False},
        {"reducer": "tome", "remove": (5, 2, 0), "depth": 3},
        {"reducer": "tome", "reduce_layers": (2,), "pool": "mean"},
        {"reducer": "tome", "reduce_layers": (1, 2), "pool": "mean", "class_token": False},
        {"reducer": "mergence", "pool": "mean", "class_token": False},
        {"reducer": "evit", "distilled": True, "register_tokens": 3},
    ],
    ids=str,
)
def test_forward_equals_a_numpy_transformer_that_reduces(options):
    model, variables, images = make(DENSE, **{"keep": 0.6} | options)
    expected = reference_forward(variables["params"], images, model, reducing(model))
    found = logits(model, variables, images)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    plain = reference_forward(variables["params"], images, model)
    assert np.abs(plain - expected).max() > 4e-3


@pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS if i != "pallas"])
def test_proportional_attention_is_that_of_every_token_repeated(implementation):
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, 6, 2, 4)).astype(np.float32)
    sizes = rng.integers(1, 5, (2, 6))
    mask = Mask(sizes=jnp.asarray(sizes, jnp.float32))
    found = attention(*map(jnp.asarray, (query, key, value)), mask, implementation=implementation)
    for row in range(2):
        k, v = (np.repeat(x[row], sizes[row], axis=0) for x in (key, value))
        scores = np.einsum("qhd,khd->hqk", query[row], k) / 2
        expected = np.einsum("hqk,khd->qhd", softmax(scores, axis=-1), v)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


# What must equal the plain model.


@pytest.mark.parametrize("reducer", REDUCERS)
def test_keeping_all_tokens_is_the_plain_model_bit_for_bit(reducer):
    plain, variables, images = make(DENSE)
    model, same, _ = make(DENSE, reducer=reducer, keep=1.0)
    chex.assert_trees_all_equal_shapes(same, variables)
    np.testing.assert_array_equal(
        logits(model, variables, images), logits(plain, variables, images)
    )
    assert model.macs(16) == plain.macs(16)


@pytest.mark.parametrize("scales", [(), (8,)])
def test_one_scale_is_the_model_without_scales_bit_for_bit(scales):
    model, variables, images = make(MERGENCE, scales=scales)
    assert set(variables["params"]) == {"backbone"}
    plain = {"params": variables["params"]["backbone"]}
    # Two programs: the compiler may round a sum in another order.
    np.testing.assert_allclose(
        logits(model, variables, images), logits(model.backbone, plain, images), atol=1e-6
    )
    assert (model.macs([9, 16]) == model.backbone.macs([9, 16])).all()


def test_scales_start_as_if_they_were_not_there():
    model, variables, images = make(MERGENCE, scales=(4, 8, 16, 32))
    started = init(model, images)["params"]
    assert {"scale_4", "scale_16", "scale_32", "backbone"} == set(started)
    plain = {"params": variables["params"]["backbone"]}
    variables = {"params": started | {"backbone": plain["params"]}}
    # Two programs: the compiler may round a sum in another order.
    np.testing.assert_allclose(
        logits(model, variables, images), logits(model.backbone, plain, images), atol=1e-6
    )


# Multi-scale features.


def cut(image, size):
    """Patches of an image [H, W, 3] as rows and columns of pixels."""
    side = image.shape[0] // size
    return image.reshape(side, size, side, size, 3).swapaxes(1, 2).reshape(side, side, -1)


def test_features_of_other_scales_are_added_cell_by_cell():
    model, variables, images = make(MERGENCE, scales=(4, 8, 16), reducer="none")
    p = jax.tree.map(np.asarray, variables["params"])

    def features(image, size, y, x):
        scale = p[f"scale_{size}"]
        dense = lambda v, q: v @ q["kernel"].reshape(v.shape[-1], -1) + q["bias"]  # noqa: E731
        embedded = dense(cut(image, size), scale["embed"]["proj"])
        embedded = embedded * (1 + erf(embedded / np.sqrt(2))) / 2
        if size == 4:
            cell = embedded[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(axis=(0, 1))
        else:
            cell = embedded[y // 2, x // 2]
        return dense(cell, scale["proj"])

    dense = model.backbone.bind({"params": variables["params"]["backbone"]})
    added = np.array(
        [
            [[sum(features(i, s, y, x) for s in (4, 16)) for x in range(4)] for y in range(4)]
            for i in np.asarray(images)
        ]
    )
    cells = dense.embed(images) + jnp.asarray(added, jnp.float32)
    expected = jax.jit(lambda x: dense.forward_tokens(x, train=False).logits)(cells)
    np.testing.assert_allclose(logits(model, variables, images), expected, rtol=1e-3, atol=1e-3)


# Costs.


def test_deit_small_costs_what_was_published():
    small = functools.partial(msvit_jax.create_model, "mergence_deit_small_patch16_224")
    fused = small(reducer="evit", scales=(16,))
    np.testing.assert_array_equal(
        fused.layer_tokens(196) + 1, [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3
    )
    assert fused.macs(196) == pytest.approx(3.0e9, rel=0.015)
    single = small(scales=(16,))
    np.testing.assert_array_equal(
        single.layer_tokens(196) + 1, [197] * 3 + [139] * 3 + [98] * 3 + [69] * 3
    )
    # The schedule alone costs 2.997 G. Looking for what matters comes on top: the class token's
    # query, the same through the keys' kernel, and its products with all tokens; then merging.
    looking = sum(2 * 384**2 + count * 384 * 6 for count in (197, 139, 98))
    topk = small(reducer="topk", scales=(16,)).macs(196)
    assert topk - looking == pytest.approx(2.997e9, rel=2e-4)
    assert 2.997e9 < single.macs(196) < 2.997e9 + 0.014e9
    usual = small()
    assert set(usual.scales) == {8, 16}
    assert usual.macs(196) <= 3.10e9
    tome = msvit_jax.create_model("deit_small_patch16_224", reducer="tome", remove=13)
    np.testing.assert_array_equal(tome.layer_tokens(196) + 1, range(184, 40, -13))
    assert tome.macs(196) == pytest.approx(2.70e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (MERGENCE, {"scales": (8, 16, 32)}),
        (DENSE, {"reducer": "evit", "keep": 0.4}),
        (DENSE, {"reducer": "tome", "remove": 8}),
        (MIXED, {"reducer": "mergence"}),
    ],
    ids=str,
)
def test_macs_agree_with_xla(name, options, monkeypatch):
    monkeypatch.setitem(blocks.GELUS, "exact", jax.nn.relu)
    monkeypatch.setattr("msvit_jax.models.mergence.gelu", jax.nn.relu)
    monkeypatch.setattr("msvit_jax.models.gate.gelu", jax.nn.relu)
    sizes = {"image_size": 96, "depth": 2}
    model = msvit_jax.create_model(name, **sizes, **options)
    images = jax.ShapeDtypeStruct((1, 96, 96, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = flops.xla_macs(lambda v, x: model.apply(v, x).logits, variables, images)
    assert model.macs(36) == pytest.approx(counted, rel=0.02)


# Mixed scale, then merged.

SIDE, BATCH = 24, 8  # 9 regions of 8 px: 9 to 36 patch tokens


def mixed(**options):
    return make(MIXED, BATCH, **{"image_size": SIDE, "patch_size": 4, "keep": 0.6} | options)


@functools.cache
def forced(model):
    return jax.jit(lambda v, x, coarse: model.apply(v, x, coarse=coarse))


def decisions(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.random((BATCH, 9)) < rng.random((BATCH, 1)), jnp.float32)


# Two buckets of four images: each more is a compilation of every layer.
BUCKETS = {"layout": "budget", "token_capacity": (18, 36)}
BUDGET = {"layout": "budget", "token_capacity": 24}
GROUPS = {**BUDGET, "row_groups": 2}
ROWS = {"layout": "rows", "rows": 4, "row_width": 64}
TILES = {"layout": "rows", "rows": 2, "row_width": 128, "row_groups": 2}
TRIMMED = {"layout": "trimmed", "token_capacity": (18, 36)}
EVIT = {"reducer": "evit", "distilled": True, "register_tokens": 2}
TOME = {"reducer": "tome", "remove": 6, "keep": 1.0}
WITHOUT_CLASS = {"pool": "mean", "class_token": False}
ONCE = {"reduce_layers": (1,)}  # where both layers would do the same


@pytest.mark.parametrize(
    ("options", "layouts"),
    [
        ({"reducer": "mergence"}, (BUCKETS, ROWS, TILES, TRIMMED)),
        ({"reducer": "mergence", **WITHOUT_CLASS, **ONCE}, (BUCKETS, ROWS)),
        ({"reducer": "topk", "pool": "mean", **ONCE}, (TRIMMED,)),
        (EVIT, (GROUPS, ROWS)),
        (TOME, (BUCKETS, ROWS, TILES, TRIMMED)),
        ({"reducer": "random", **ONCE}, (BUCKETS, ROWS)),
    ],
    ids=str,
)
@hypothesis.given(seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=3)
def test_a_reduced_image_is_the_same_in_every_layout(options, layouts, seed):
    model, variables, images = mixed(**options)
    coarse = decisions(seed)
    expected = forced(model)(variables, images, coarse)
    scale = np.abs(expected.logits).max()
    for layout in layouts:
        output = forced(model.clone(**layout))(variables, images, coarse)
        fits = np.asarray(output.within_capacity)
        np.testing.assert_array_equal(np.isnan(output.logits).all(axis=1), ~fits)
        np.testing.assert_array_equal(output.tokens, expected.tokens)
        np.testing.assert_allclose(
            output.logits[fits] / scale, expected.logits[fits] / scale, atol=1e-4
        )
        for ours, hosts in zip(expected.merge_targets, output.merge_targets, strict=True):
            np.testing.assert_array_equal(hosts[fits], ours[fits])
            assert (np.asarray(hosts)[~fits] == -1).all()


@pytest.mark.parametrize("reducer", ["mergence", "evit", "tome"])
def test_hidden_slots_are_never_kept_hosts_or_counted(reducer, monkeypatch):
    model, variables, images = mixed(reducer=reducer)
    coarse = decisions(1)
    tokens_of = MSViT._tokens

    @jax.jit
    def run(variables, images, coarse, tempt):
        def tempting(*args):
            tokens, weights, areas = tokens_of(*args)
            hidden = weights[:, :, None] <= 0.5
            return jnp.where(tempt & hidden, 7 - 3 * tokens, tokens), weights, areas

        monkeypatch.setattr(MSViT, "_tokens", tempting)
        return model.apply(variables, images, coarse=coarse)

    clean, changed = (run(variables, images, coarse, jnp.asarray(tempt)) for tempt in (False, True))
    np.testing.assert_allclose(changed.logits, clean.logits, rtol=1e-4, atol=1e-4)
    active = np.repeat(np.asarray(coarse) < 0.5, 4, axis=1)
    active[:, ::4] = True
    expected = model.backbone.layer_tokens(active.sum(axis=1))
    for layer, merged in enumerate(clean.merge_positions):
        for image in range(BATCH):
            places = np.unique(np.asarray(merged)[image, active[image]])
            assert (places >= 0).sum() == expected[layer, image]


@pytest.mark.parametrize(
    ("reducer", "layout"), [("mergence", BUDGET), ("evit", ROWS), ("tome", ROWS)], ids=str
)
def test_poison_in_unused_places_reaches_no_result(reducer, layout, monkeypatch):
    model, variables, images = mixed(reducer=reducer)
    model = model.clone(**layout)
    run = poisonable(model, monkeypatch)
    clean, poisoned = (
        run(variables, images, decisions(2), jnp.asarray(poison)) for poison in (False, True)
    )
    np.testing.assert_array_equal(poisoned.logits, clean.logits)
    assert np.asarray(clean.within_capacity).sum() >= 4


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"reducer": "mergence", **ONCE}, {}),
        ({"reducer": "tome"}, {}),
        ({"reducer": "evit", **ONCE}, {"layout": "trimmed", "token_capacity": 36}),
    ],
    ids=str,
)
def test_gradients_are_finite_and_reach_the_gate(options, layout):
    model, variables, images = mixed(gate_bias=0.0, **options)
    model = model.clone(**layout)

    @jax.jit
    def gradient(v):
        def loss(v):
            output = model.apply(v, images, train=True, rngs={"gate": jax.random.key(7)})
            return (output.logits**2).mean()

        return jax.grad(loss)(v)

    gradients = gradient(variables)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


# Under transformations.


@pytest.mark.parametrize(("reducer", "depth"), [("mergence", 1), ("tome", 2)])
def test_recomputed_blocks_have_the_same_gradients(reducer, depth):
    model, variables, images = make(DENSE, reducer=reducer, keep=0.6, depth=depth)
    both = [
        jax.jit(jax.grad(lambda v, m=m: (m.apply(v, images).logits ** 2).sum()))(variables)
        for m in (model, model.clone(remat=True))
    ]
    chex.assert_trees_all_close(*both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"reducer": "mergence"}, {"reducer": "evit"}, {"reducer": "tome", **ONCE}], ids=str
)
def test_bfloat16_stays_near_float32(options):
    model, variables, images = make(DENSE, keep=0.6, **options)
    # As small as at the start: rough ones have attention so sharp that rounding changes the ranks.
    variables = jax.tree.map(lambda leaf: leaf / 10, variables)
    half = compiled(model.clone(dtype=jnp.bfloat16))(variables, images)
    assert half.logits.dtype == jnp.float32
    np.testing.assert_allclose(half.logits, logits(model, variables, images), atol=0.02)


def test_the_same_under_pmap():
    model, variables, images = make(MERGENCE, scales=(4, 8), depth=1)
    expected = logits(model, variables, images)
    spread = jax.pmap(model.apply, in_axes=(None, 0))(variables, images[:2, None])
    np.testing.assert_allclose(spread.logits[:, 0], expected[:2], rtol=1e-4, atol=1e-4)


def test_random_tokens_are_the_images_own():
    model, variables, images = make(DENSE, reducer="random", keep=0.5)
    first = compiled(model)(variables, images).merge_positions[0]
    turned = compiled(model)(variables, images[::-1]).merge_positions[0]
    np.testing.assert_array_equal(first, turned[::-1])
    assert (np.asarray(first[0]) != np.asarray(first[1])).any()


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep=0.0 is not possible: .* above 0 and up to 1"),
        ({"keep": 1.5}, "keep=1.5 is not possible"),
        ({"keep": float("nan")}, "keep=nan is not possible"),
        ({"keep": (0.7, -0.1)}, "keep=-0.1 is not possible"),
        ({"keep": (0.7, 0.7, 0.7)}, r"has 3 rates, but 2 layers reduce \(1, 2\)"),
        ({"reduce_layers": (1, 2, 3)}, "2 different layers at most"),
        ({"reduce_layers": (2, 2)}, "name each once"),
        ({"reduce_layers": (0,)}, "counted from 1 to 2"),
        ({"reduce_layers": (3,)}, "counted from 1 to 2"),
        ({"reducer": "magic"}, "reducer='magic' is not one of none, mergence"),
        ({"merge_weights": "heavy"}, "merge_weights='heavy' is not one of similarity, size"),
        ({"remove": 4}, "remove=4 is for reducer='tome'"),
        ({"proportional_attention": False}, "'mergence' has no option 'proportional_attention'"),
        ({"reducer": "tome", "remove": (4, 2, 1)}, "has 3 numbers, but 2 layers reduce"),
        ({"reducer": "tome", "remove": -1}, "not negative"),
        ({"reducer": "tome", "remove": 7}, "remove=7 is not possible in layer 2: 9 tokens are"),
        ({"reducer": "tome", "keep": 0.4}, "leaves 0.5 of the tokens at least"),
        ({"scan_layers": True}, "needs scan_layers=False"),
        ({"scales": (5, 8)}, "patches of 5 px do not divide an image of 32 px"),
        ({"scales": (0, 8)}, "patches of 0 px do not divide"),
        ({"scales": (12, 8), "image_size": 48, "patch_size": 8}, "12 px neither divides"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_told_when_the_model_is_made(options, message):
    with pytest.raises(UserError, match=message):
        msvit_jax.create_model(MERGENCE, **(TINY | options))


def test_wrong_images_are_told():
    model, variables, _ = make(MERGENCE, scales=(8, 16))
    with pytest.raises(ValueError, match="a multiple of 16"):
        model.apply(variables, jnp.zeros((1, 40, 32, 3)))
