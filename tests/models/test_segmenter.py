"""Segmenters: decoders against a literal NumPy form, and dense maps of mixed and merged tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msvit_jax
from msvit_jax.errors import UserError
from tests import jitted

SIDE, CLASSES = 32, 5
SIZES = {"image_size": SIDE, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
LAYOUTS = {
    "budget": {"token_capacity": 64},
    "budget, two": {"token_capacity": (64, 52)},
    "trimmed": {"token_capacity": 64},
    "rows": {"rows": 4, "row_width": 70},
}


def images(count=4, size=(SIDE, SIDE)):
    """Even and noisy squares: gates differ on them."""
    rng = np.random.default_rng(0)
    contrast = rng.uniform(0, 1, (count, size[0] // 8, 1, size[1] // 8, 1, 1)) ** 2
    x = contrast * rng.normal(size=(count, size[0] // 8, 8, size[1] // 8, 8, 3))
    return jnp.asarray(x.reshape(count, *size, 3), jnp.float32)


def create(encoder, decoder="linear", **options):
    options = {**SIZES, "num_classes": CLASSES, **options}
    return msvit_jax.create_model("segmenter", encoder=encoder, decoder=decoder, **options)


@functools.cache
def variables(model):
    """Random, and larger than at the start, so that images and their gates differ."""
    # No layout, reducer or way of decoding has parameters: one program makes those of all.
    plain = model.with_dense_layout().with_backbone(reducer="none", unmerge="copy")
    start = _start(plain.clone(decode="dense"))

    def larger(path, x):
        name = jax.tree_util.keystr(path)
        if "norm" in name and x.ndim == 1:
            return x + 0.3 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32)
        return (20 if "fc4" in name else 3) * x if x.ndim > 1 else x

    return jax.tree_util.tree_map_with_path(larger, start)


@functools.cache
def _start(model):
    return jitted.init(model, images(1))


def output_and_features(model):
    """What a segmenter answers, and what its encoder alone gives: one program computes both."""

    @jax.jit
    def both(variables):
        encoder = {k: v for k, v in variables["params"].items() if k != "decoder"}
        alone = model.encoder.apply({"params": encoder}, images())
        return model.apply(variables, images()), alone.features.patches

    output, patches = both(variables(model))
    return output, np.asarray(patches, np.float64)


# The decoders, literally.


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def literal_block(x, p, heads):
    each = x.shape[1] // heads
    q, k, v = np.split(linear(norm(x, p["norm1"]), p["attn"]["qkv"]), 3, axis=-1)
    out = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * each, (head + 1) * each)
        scores = q[:, part] @ k[:, part].T / math.sqrt(each)
        out[:, part] = softmax(scores) @ v[:, part]
    x = x + linear(out, p["attn"]["proj"])
    hidden = linear(norm(x, p["norm2"]), p["mlp"]["fc1"])
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + linear(hidden, p["mlp"]["fc2"])


def literal_mask_transformer(patches, p, heads):
    """[h, w, D] -> [h, w, classes], float64, one token after the other where it matters."""
    x = linear(patches.reshape(-1, patches.shape[-1]), p["proj_dec"])
    x = np.concatenate([x, p["class_embed"]])
    for layer in range(sum(name.startswith("layers_") for name in p)):
        x = literal_block(x, p[f"layers_{layer}"], heads)
    x = norm(x, p["norm"])
    cells = x[:-CLASSES] @ p["proj_patch"]["kernel"]
    classes = x[-CLASSES:] @ p["proj_class"]["kernel"]
    masks = np.zeros((len(cells), CLASSES))
    for i, j in np.ndindex(masks.shape):
        masks[i, j] = cells[i] @ classes[j] / np.linalg.norm(cells[i]) / np.linalg.norm(classes[j])
    return norm(masks, p["mask_norm"]).reshape(*patches.shape[:2], CLASSES)


@pytest.mark.parametrize("encoder", ["vit", "msvit"])
@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_decoders_are_their_literal_form(encoder, decoder):
    heads = {"decoder_heads": 2} if decoder == "mask" else {}
    model = create(encoder, decoder, depth=1, **heads)
    output, patches = output_and_features(model)
    found = output.logits
    assert found.shape == (4, 8, 8, CLASSES)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables(model)["params"]["decoder"])
    for image in range(4):
        if decoder == "linear":
            expected = linear(patches[image], p["head"])
        else:
            expected = literal_mask_transformer(patches[image], p, heads=2)
        np.testing.assert_allclose(found[image], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reducer", ["none", "mergence"])
def test_cells_that_share_a_token_have_the_same_logits(reducer):
    model = create("msvit", reducer=reducer, reduce_layers=(1,) if reducer != "none" else None)
    rng = np.random.default_rng(1)
    coarse = jnp.asarray(rng.integers(0, 2, (4, 16)), jnp.float32)
    output = jitted.apply(model, variables(model), images(), coarse=coarse)
    logits = np.asarray(output.logits)
    blocks = logits.reshape(4, 4, 2, 4, 2, CLASSES).transpose(0, 1, 3, 2, 4, 5)
    even = (blocks == blocks[:, :, :, :1, :1]).all(axis=(3, 4, 5))
    assert even[np.asarray(coarse).reshape(4, 4, 4) == 1].all()
    if reducer == "none":
        np.testing.assert_array_equal(even, np.asarray(coarse).reshape(4, 4, 4) == 1)
    else:
        maps = np.asarray(output.merge_maps((8, 8)))[:, -1].reshape(4, 64)
        cells = logits.reshape(4, 64, CLASSES)
        assert any((maps[i] != np.arange(64)).any() for i in range(4))
        for image in range(4):
            np.testing.assert_array_equal(cells[image], cells[image][maps[image]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reducer", ["none", "residual", "mergence", "mergence, residual"])
def test_layouts_agree(layout, reducer):
    reduced = {"reducer": "mergence", "reduce_layers": (1,)} if "mergence" in reducer else {}
    if "residual" in reducer:
        reduced |= {"unmerge": "residual"} | ({"reduce_layers": (1, 2)} if reduced else {})
    model = create("msvit", "mask", decoder_depth=1, gate_bias=0.0, **reduced)
    expected = jitted.apply(model, variables(model), images())
    assert len(np.unique(expected.tokens)) > 1
    packed = model.clone(layout=layout.split(",")[0], **LAYOUTS[layout])
    found = jitted.apply(packed, variables(model), images())
    fits = np.asarray(found.within_capacity)
    assert fits.any()
    np.testing.assert_allclose(found.logits[fits], expected.logits[fits], rtol=1e-4, atol=1e-4)
    assert np.isnan(found.logits[~fits]).all()


EVEN = {"gate_bias": 0.0}
MIXED = {  # encoder and what makes its tokens fewer than the cells
    "gate, budget": ("msvit", {"depth": 1, "layout": "budget", "token_capacity": 22, **EVEN}),
    "gate, reducer": ("msvit", {"depth": 1, "reducer": "mergence", **EVEN}),
    "reducer": ("vit", {"reducer": "algm", "keep": (0.6, 0.7)}),
    "dropped": ("vit", {"depth": 1, "reducer": "topk"}),
}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_tokens_decoded_once_give_the_logits_of_every_cell(decoder, case):
    encoder, options = MIXED[case]
    sizes = {"decoder_heads": 2, "decoder_depth": 1} if decoder == "mask" else {}
    model = create(encoder, decoder, decode="mixed", **sizes, **options)
    found, patches = output_and_features(model)
    fits = np.asarray(found.answered)
    assert fits.any()
    if case == "gate, budget":
        assert not fits.all()
        assert np.isnan(found.logits[~fits]).all()
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables(model)["params"]["decoder"])
    for image in np.flatnonzero(fits):
        if decoder == "linear":
            expected = linear(patches[image], p["head"])
        else:
            expected = literal_mask_transformer(patches[image], p, heads=2)
        np.testing.assert_allclose(found.logits[image], expected, rtol=1e-5, atol=1e-5)


def test_decoding_once_costs_what_the_tokens_that_are_left_cost():
    from msvit_jax import flops

    options = {"reducer": "algm", "keep": (0.6, 0.7), "attention_impl": "xla"}
    dense, mixed = (create("vit", "mask", decode=d, **options) for d in ("dense", "mixed"))
    run = lambda p, x: mixed.apply(p, x).logits  # noqa: E731
    counted = flops.xla_macs(run, variables(mixed), images(1))
    assert counted == pytest.approx(float(mixed.macs(64)), rel=0.25)  # norms and GELU are extra
    alone = [float(m.macs(64) - m.encoder.macs(64)) for m in (dense, mixed)]
    blocks = lambda n: 2 * (12 * (n + CLASSES) * 16**2 + 2 * (n + CLASSES) ** 2 * 16)  # noqa: E731
    around = lambda n: (2 * n + CLASSES) * 16**2 + n * 16 * CLASSES  # noqa: E731
    assert alone == [blocks(64) + around(64), blocks(28) + around(28)]
    gated = create("msvit", "linear", decode="mixed")
    extra = gated.macs([16, 64]) - gated.encoder.macs([16, 64])
    np.testing.assert_allclose(extra, [16 * 16 * CLASSES, 64 * 16 * CLASSES])


@pytest.mark.parametrize("encoder", ["vit", "msvit"])
def test_both_ways_of_decoding_learn_the_same(encoder):
    reduced = {"reducer": "mergence", "reduce_layers": (1,)} if encoder == "vit" else {}
    options = {"depth": 1, "decoder_depth": 1, **reduced}
    coarse = {} if encoder == "vit" else {"coarse": jnp.asarray(np.arange(64).reshape(4, 16) % 2.0)}
    grads = []
    for decode in ("dense", "mixed"):
        model = create(encoder, "mask", decode=decode, **options)

        def loss(params, model=model):
            rngs = {"gate": jax.random.key(0)}
            output = model.apply({"params": params}, images(), train=True, rngs=rngs, **coarse)
            return (output.logits * jnp.cos(jnp.arange(CLASSES))[None, None, None]).sum()

        grads.append(jax.device_get(jax.jit(jax.grad(loss))(variables(model)["params"])))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(a).max()),
        *grads,
    )
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]["decoder"]))


def loss_of(model, params, coarse):
    """A loss of the images that fit, through the model as it is in training."""
    output = model.apply(
        {"params": params}, images(), train=True, coarse=coarse, rngs={"gate": jax.random.key(0)}
    )
    weights = jnp.cos(jnp.arange(output.logits.size, dtype=jnp.float32)).reshape(
        output.logits.shape
    )
    answered = output.answered[:, None, None, None]
    return jnp.where(answered, output.logits * weights, 0.0).sum()


@pytest.mark.parametrize(
    "options",
    [{"depth": 1}, {"reducer": "mergence", "reduce_layers": (1,), "unmerge": "residual"}],
    ids=str,
)
def test_an_image_that_does_not_fit_leaves_all_gradients_finite(options):
    small = {"decoder_depth": 1, "layout": "trimmed", "token_capacity": 40}
    model = create("msvit", "mask", **small, **options)
    coarse = jnp.ones((4, 16), jnp.float32).at[0].set(0.0)  # 64 and 16 tokens
    grads = jax.jit(jax.grad(lambda p, c: loss_of(model, p, c)))(variables(model)["params"], coarse)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["decoder"]))


def test_the_gate_learns_what_its_cells_would_become():
    """With a linear decoder the last layer's answer is linear in the decision, but for attention.

    Attention is cut off by a backbone without blocks' weights: what stays is the decoder's own
    dependence on the decision, whose gradient is then exactly the difference of both decisions.
    """
    model = create("msvit", "linear", image_size=8, depth=1)
    x = images(2, (8, 8))
    params = jitted.init(model, x)["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            0 * leaf
            if "proj']['kernel" in jax.tree_util.keystr(path)
            and "attn" in jax.tree_util.keystr(path)
            else leaf
        ),
        params,
    )

    def total(coarse):
        output = model.apply(
            {"params": params}, x, train=True, coarse=coarse, rngs={"gate": jax.random.key(0)}
        )
        weights = jnp.sin(jnp.arange(output.logits.size, dtype=jnp.float32))
        return (output.logits.reshape(-1) * weights).sum()

    coarse = jnp.asarray([[1.0], [0.0]])
    both = jax.jit(jax.value_and_grad(total))
    _, slope = both(coarse)
    for image in range(2):
        one, other = (both(coarse.at[image, 0].set(value))[0] for value in (1.0, 0.0))
        np.testing.assert_allclose(slope[image, 0], one - other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ["vit", "msvit"])
def test_images_of_any_size_are_padded_below_and_on_the_right(encoder):
    model = create(encoder, "mask", depth=1, decoder_depth=1)
    x = images(2, (24, 40))
    found = jitted.apply(model, variables(model), x[:, :21, :37]).logits
    rows, columns = (24, 40)
    padded = jnp.zeros_like(x).at[:, :21, :37].set(x[:, :21, :37])
    expected = jitted.apply(model, variables(model), padded).logits
    assert found.shape == (2, rows // 4, columns // 4, CLASSES)
    np.testing.assert_array_equal(found, expected)


def test_names_say_encoder_and_decoder():
    for name in ("seg_vit_tiny_linear", "msvit_seg_vit_small_mask"):
        model = msvit_jax.create_model(name, num_classes=7)
        assert (model.num_classes, model.image_size, model.task) == (7, 512, "segmentation")
        assert model.has_gate == name.startswith("msvit")
        assert model.decoder == name.rpartition("_")[2]
        assert model.backbone.num_classes == 0
    assert msvit_jax.models.registry.dense_model("msvit_seg_vit_small_mask") == "seg_vit_small_mask"
    # 27 M parameters: Seg-S-Mask/16 (the paper's table 4), 26.4 M without position resizing.
    shapes = jax.eval_shape(
        msvit_jax.create_model("seg_vit_small_mask").init,
        jax.random.key(0),
        jnp.zeros((1, 512, 512, 3)),
    )
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert 26.0e6 < count < 27.5e6


def test_macs_are_the_encoders_and_a_decoder_that_sees_the_whole_grid():
    from msvit_jax import flops

    for decoder in ("linear", "mask"):
        model = create("msvit", decoder)
        extra = np.diff(model.macs([16, 64]) - model.encoder.macs([16, 64]))
        np.testing.assert_allclose(extra, 0)
    model = create("vit", "mask", attention_impl="xla")
    counted = flops.xla_macs(lambda p, x: model.apply(p, x).logits, variables(model), images(1))
    assert counted == pytest.approx(float(model.macs(64)), rel=0.15)  # norms and GELU are extra


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "unet"}, "decoder='unet' is not one of linear, mask"),
        ({"decode": "coarse"}, "decode='coarse' is not one of dense, mixed"),
        ({"decode": "mixed", "attention_impl": "fused"}, "'fused' cannot. Use 'auto' or 'xla'"),
        (
            {"decode": "mixed", "reducer": "algm", "unmerge": "residual"},
            "Use decode='dense', or unmerge='copy'",
        ),
        ({"num_classes": 0}, "segmentation needs a class"),
        ({"decoder": "mask", "decoder_heads": 3}, "not divisible by decoder_heads=3"),
        ({"encoder": "dvt_deit_small"}, "no features to decode"),
        ({"encoder": "seg_vit_tiny_mask"}, "no features to decode"),
        ({"encoder": "vit", "gate": "mlp"}, "no option 'gate'"),
    ],
)
def test_what_does_not_fit_says_so(options, message):
    with pytest.raises(UserError, match=message):
        create(**{"encoder": "vit", **options})
