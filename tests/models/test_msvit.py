"""MSViT: the slots layout against the paper's 245-token transformer, gates, gradients."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import msvit_jax
from msvit_jax import flops
from msvit_jax.models import block as blocks
from msvit_jax.models import gate as gates
from tests.jitted import apply, init
from tests.models.test_vit import TINY, make, make_rough, rough

NAME = "msvit_deit_tiny_patch16_224"


@functools.partial(jax.jit, static_argnums=3)
def literal_msvit(variables, images, coarse, model):
    """MSViT as the paper writes it: all coarse and all fine tokens, masked softmax attention.

    Its own tokens, order, positions and attention; of the library it uses only single layers.
    """
    params = variables["params"]
    backbone = model.backbone
    p, patch = params["backbone"], backbone.patch_size
    kernel = p["patch_embed"]["proj"]["kernel"]
    bias = p["patch_embed"]["proj"]["bias"]

    def embed(x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (patch, patch), "VALID", dimension_numbers=dims)
        return y + bias[None, None, None]

    side = images.shape[1] // patch
    positions = p["pos_embed"][backbone.positioned_prefix :].reshape(side, side, -1)
    half = jax.image.resize(
        images,
        (len(images), images.shape[1] // 2, images.shape[2] // 2, 3),
        "bilinear",
        antialias=False,
    )
    coarse_positions = jax.image.resize(
        positions, (side // 2, side // 2, positions.shape[-1]), "bilinear", antialias=False
    )
    fine_tokens = (embed(images) + positions[None]).reshape(len(images), -1, backbone.width)
    coarse_tokens = (embed(half) + coarse_positions[None]).reshape(len(images), -1, backbone.width)
    decisions = coarse.reshape(len(images), side // 2, side // 2)
    fine_active = 1 - jnp.repeat(jnp.repeat(decisions, 2, axis=1), 2, axis=2)
    prefix = p["cls_token"] + p["pos_embed"][:1]
    x = jnp.concatenate(
        [
            jnp.broadcast_to(prefix[None], (len(images), 1, backbone.width)),
            coarse_tokens,
            fine_tokens,
        ],
        1,
    )
    mask = jnp.concatenate(
        [jnp.ones((len(images), 1)), coarse, fine_active.reshape(len(images), -1)], axis=1
    )
    for layer in range(backbone.depth):
        block = blocks.Block(backbone.width, backbone.heads, backbone.mlp_hidden)
        bound = block.bind({"params": p[f"blocks_{layer}"]})
        qkv = jnp.split(
            bound.norm1(x) @ p[f"blocks_{layer}"]["attn"]["qkv"]["kernel"]
            + p[f"blocks_{layer}"]["attn"]["qkv"]["bias"][None, None],
            3,
            axis=-1,
        )
        query, key, value = (t.reshape(*t.shape[:2], backbone.heads, -1) for t in qkv)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(
            query.shape[-1], dtype=np.float32
        )
        scores = jnp.where(mask[:, None, None] > 0, scores, -jnp.inf)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value).reshape(
            x.shape
        )
        projection = p[f"blocks_{layer}"]["attn"]["proj"]
        x = x + mixed @ projection["kernel"] + projection["bias"][None, None]
        x = bound._mlp_residual(x, None, None)
    x = blocks.LayerNorm(epsilon=1e-6).apply({"params": p["norm"]}, x)
    return x[:, 0] @ p["head"]["kernel"] + p["head"]["bias"][None]


@hypothesis.given(seed=st.integers(0, 2**31), share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
@hypothesis.settings(max_examples=15)
def test_slots_equal_the_papers_masked_transformer(seed, share):
    model, variables, images = make_rough(NAME)
    variables = rough(variables, seed % 1000)
    rng = np.random.default_rng(seed)
    coarse = jnp.asarray(rng.random((3, 4)) < share, jnp.float32)
    output = apply(model, variables, images, coarse=coarse)
    expected = literal_msvit(variables, images, coarse, model)
    scale = jnp.abs(expected).max()
    np.testing.assert_allclose(output.logits / scale, expected / scale, atol=1e-5)
    np.testing.assert_array_equal(output.tokens, 16 - 3 * coarse.sum(1).astype(int))


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_all_fine_is_the_plain_transformer(pool):
    model, variables, images = make_rough(NAME, gate="fine", pool=pool)
    plain = apply(model.backbone, {"params": variables["params"]["backbone"]}, images)
    output = apply(model, variables, images)
    np.testing.assert_allclose(output.logits, plain.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output.tokens, 16)


def test_all_coarse_is_the_plain_transformer_on_the_halved_image():
    model, variables, images = make_rough(NAME, gate="coarse")
    halved = (
        images[:, ::2, ::2] + images[:, 1::2, ::2] + images[:, ::2, 1::2] + images[:, 1::2, 1::2]
    ) / 4
    backbone = dict(variables["params"]["backbone"])
    prefix, grid = backbone["pos_embed"][:1], backbone["pos_embed"][1:].reshape(2, 2, 2, 2, 16)
    backbone["pos_embed"] = jnp.concatenate([prefix, grid.mean(axis=(1, 3)).reshape(4, 16)])
    small = model.backbone.clone(image_size=16)
    output = apply(model, variables, images)
    expected = apply(small, {"params": backbone}, halved).logits
    np.testing.assert_allclose(output.logits, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(output.tokens, 4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coarse_embedding": "separate"},
        {"scale_embedding": True},
        {"coarse_residual": True},
        {"scan_layers": True, "remat": True},
        {"pool": "mean"},
    ],
)
def test_gradients_reach_every_parameter(options):
    depth = 2 if options.get("scan_layers") else 1
    model, variables, images = make_rough(NAME, gate_bias=0.0, depth=depth, **options)
    labels = jnp.asarray([0, 1, 2])

    def loss(v):
        output = model.apply(v, images, train=True, rngs={"gate": jax.random.key(7)})
        return -jax.nn.log_softmax(output.logits)[jnp.arange(3), labels].mean()

    gradients = jax.jit(jax.grad(loss))(variables)
    if model.backbone.pool == "mean":  # the class token serves no purpose in the last layer's mean
        gradients["params"]["backbone"].pop("cls_token")
    dead = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not jnp.abs(leaf).max() > 0
    ]
    assert not dead


@pytest.mark.parametrize("options", [{"scale_embedding": True}, {"coarse_residual": True}])
def test_zero_initialized_options_start_as_the_model_without(options):
    plain, variables, images = make_rough(NAME)
    model = plain.clone(**options)
    started = init(model, images)["params"]
    added = {name: started[name] for name in started.keys() - variables["params"].keys()}
    assert added
    extended = {"params": {**variables["params"], **added}}
    coarse = jnp.asarray([[0, 1, 0, 1.0]] * 3)
    chex.assert_trees_all_close(
        apply(model, extended, images, coarse=coarse).logits,
        apply(plain, variables, images, coarse=coarse).logits,
    )


def test_separate_coarse_embedding_sees_full_resolution():
    model, variables, images = make_rough(NAME, gate="coarse", coarse_embedding="separate")
    kernel = variables["params"]["coarse_embed"]["proj"]["kernel"]
    assert kernel.shape == (16, 16, 3, 16)
    checker = jnp.asarray(np.indices((32, 32)).sum(0) % 2 * 2.0 - 1, jnp.float32)[None, :, :, None]
    difference = (
        apply(model, variables, images + checker).logits - apply(model, variables, images).logits
    )
    assert jnp.abs(difference).max() > 1e-4  # the pooled image could not tell them apart


def test_mean_coarse_embedding_is_a_separate_one_that_repeats_the_fine_kernel():
    model, variables, images = make_rough(NAME, gate="coarse", coarse_embedding="mean")
    proj = variables["params"]["backbone"]["patch_embed"]["proj"]
    kernel = jnp.tile(proj["kernel"], (2, 2, 1, 1)) / 4
    separate = {**variables["params"], "coarse_embed": {"proj": {**proj, "kernel": kernel}}}
    np.testing.assert_allclose(
        apply(model, variables, images).logits,
        apply(model.clone(coarse_embedding="separate"), {"params": separate}, images).logits,
        rtol=1e-4,
        atol=1e-6,
    )


def test_gate_starts_fine_or_coarse_and_threshold_moves_it():
    model, variables, images = make(NAME, gate_bias=-2.0)
    np.testing.assert_array_equal(apply(model, variables, images).tokens, 16)
    model, variables, images = make(NAME)
    np.testing.assert_array_equal(apply(model, variables, images).tokens, 4)
    finest = apply(model, variables, images, threshold=jnp.float32(1.0))
    np.testing.assert_array_equal(finest.tokens, 16)
    allowing = model.clone(threshold=1.0)
    np.testing.assert_array_equal(apply(allowing, variables, images).tokens, 16)


def test_thresholds_trade_tokens_monotonically():
    model, variables, images = make_rough(NAME, gate_bias=0.0)
    tokens = [
        apply(model, variables, images, threshold=jnp.float32(t)).tokens
        for t in np.linspace(0, 1, 9)
    ]
    assert (np.diff(np.stack(tokens), axis=0) >= 0).all()


@hypothesis.given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_a_fixed_share_takes_the_least_coarse_regions(share, seed):
    logits = jax.random.normal(jax.random.key(seed), (4, 9))
    coarse = np.asarray(gates.finest(logits, share).coarse)
    count = round(share * 9)
    np.testing.assert_array_equal((coarse < 0.5).sum(1), count)
    for row, decision in zip(np.asarray(logits), coarse, strict=True):
        if 0 < count < 9:
            assert row[decision < 0.5].max() <= row[decision > 0.5].min()


def test_sampled_decisions_are_hard_and_follow_the_probability():
    logits = jnp.full((20000, 1), 0.8)
    coarse = gates.sample(logits, jax.random.key(0), 2 / 3).coarse
    assert set(np.unique(coarse)) <= {0.0, 1.0}
    p = 1 / (1 + np.exp(-0.8))
    assert abs(float(coarse.mean()) - p) < 4 * np.sqrt(p * (1 - p) / 20000)


def test_straight_through_gradient_is_the_relaxed_decisions():
    logits, key = jnp.asarray([[0.3, -1.0, 2.0]]), jax.random.key(3)
    noise = jax.random.logistic(key, logits.shape, logits.dtype)
    expected = jax.grad(lambda x: jax.nn.sigmoid((x + noise) / 0.5).sum())(logits)
    chex.assert_trees_all_close(
        jax.grad(lambda x: gates.sample(x, key, 0.5).coarse.sum())(logits), expected
    )


def test_gate_sees_its_own_region_alone():
    model, variables, images = make_rough(NAME)
    changed = images.at[:, :16, 16:].add(1.0)  # region 1 of 2 x 2
    before, after = (apply(model, variables, x).gate.logits for x in (images, changed))
    moved = np.abs(np.asarray(after - before)).max(0) > 1e-6
    np.testing.assert_array_equal(moved, [False, True, False, False])


def test_untrained_gates():
    model, variables, _ = make_rough(NAME, image_size=64, gate="center", fine_share=0.25)
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    center = np.asarray(apply(model, variables, images).gate.coarse).reshape(2, 4, 4)
    np.testing.assert_array_equal(center[:, 1:3, 1:3], 0)
    assert center.sum() == 2 * 12
    busy = jnp.zeros((2, 64, 64, 3)).at[:, 16:32, 32:48].set(images[:, 16:32, 32:48])
    entropy = model.clone(gate="entropy", fine_share=1 / 16)
    entropy = np.asarray(apply(entropy, variables, busy).gate.coarse)
    np.testing.assert_array_equal(np.flatnonzero(entropy[0] == 0), [6])
    random = model.clone(gate="random")
    first = apply(random, variables, images).gate.coarse
    swapped = apply(random, variables, images[::-1]).gate.coarse
    np.testing.assert_array_equal(first, swapped[::-1])  # an image's pattern is its own
    assert (np.asarray(first[0]) != np.asarray(first[1])).any()


def test_entropy_is_that_of_the_histogram():
    rng = np.random.default_rng(0)
    pixels = rng.random((1, 1, 2, 8, 8, 3)) ** 2
    probability = jax.nn.sigmoid(
        gates.untrained_logits("entropy", jnp.asarray(pixels, jnp.float32))
    )
    for region in range(2):
        gray = pixels[0, 0, region] @ [0.299, 0.587, 0.114]
        share = np.histogram(gray, bins=32, range=(0, 1))[0] / gray.size
        entropy = -sum(s * np.log2(s) for s in share if s)
        np.testing.assert_allclose(probability[0, region], 1 - entropy / 5, atol=1e-5)


def test_gate_costs_at_most_two_percent_of_the_dense_model():
    model = msvit_jax.create_model("msvit_small_patch16_224")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    gate = variables["params"]["gate_mlp"]
    assert sum(leaf.size for leaf in jax.tree.leaves(gate)) == pytest.approx(1.48e6, rel=0.02)
    cost = gates.mlp_macs(49, 32, 384)
    assert cost == pytest.approx(0.072e9, rel=0.01)
    assert cost <= 0.02 * flops.macs_per_image(model.backbone, [196])[0]


@pytest.mark.parametrize(
    "options", [{}, {"coarse_embedding": "separate"}, {"coarse_residual": True}, {"gate": "fine"}]
)
def test_macs_agree_with_xla(options, monkeypatch):
    monkeypatch.setitem(blocks.GELUS, "exact", jax.nn.relu)
    monkeypatch.setattr(gates, "gelu", jax.nn.relu)
    model = msvit_jax.create_model("msvit_deit_small_patch16_224", **options)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = flops.xla_macs(lambda v, x: model.apply(v, x).logits, variables, images)
    # Slots compute the whole fine grid, so the count is that of an image that is fine everywhere.
    assert flops.macs_per_image(model, [196])[0] == pytest.approx(counted, rel=0.02)


def test_macs_fall_with_the_tokens():
    model = msvit_jax.create_model(NAME, **TINY)
    macs = flops.macs_per_image(model, np.arange(4, 17))
    assert (np.diff(macs) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 40}, "coarse patch of 16 px"),
        ({"gate": "magic"}, "not one of mlp"),
        ({"fine_share": 1.5}, "at least 0 and at most 1"),
        ({"coarse_embedding": "none"}, "not one of shared, mean, separate"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        make_rough(NAME, **options)


def test_bad_images_and_decisions_are_told():
    model, variables, images = make_rough(NAME)
    with pytest.raises(ValueError, match="multiple of 16"):
        model.apply(variables, jnp.zeros((1, 40, 32, 3)))
    with pytest.raises(ValueError, match="coarse has shape"):
        model.apply(variables, images, coarse=jnp.zeros((3, 5)))
