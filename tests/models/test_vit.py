"""The plain transformer: published sizes and costs, and a NumPy reference of its forward pass."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

import msvit_jax
from msvit_jax import flops
from msvit_jax.errors import UserError
from msvit_jax.models import block as blocks
from msvit_jax.models.registry import BACKBONES, CASCADES, MERGENCE, MIXED_SCALE, SEGMENTERS
from tests.jitted import apply, init

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "num_classes": 5,
}


@functools.cache
def make(name="deit_tiny_patch16_224", **overrides):
    """A model, the variables that it starts with, and images."""
    model, images = _model_and_images(name, **overrides)
    return model, init(model, images), images


@functools.cache
def make_rough(name="deit_tiny_patch16_224", **overrides):
    """A model, rough variables, for which nothing is compiled, and images."""
    model, images = _model_and_images(name, **overrides)
    return model, rough(jax.eval_shape(model.init, jax.random.key(0), images)), images


def _model_and_images(name, **overrides):
    model = msvit_jax.create_model(name, **(TINY | overrides))
    return model, jax.random.normal(jax.random.key(1), (3, model.image_size, model.image_size, 3))


def rough(variables, seed=5):
    """Parameters of the same shapes, random everywhere, so that no term hides behind a zero."""
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    return tree.unflatten(
        [jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    )


# timm's models with 1000 classes.
PUBLISHED = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_tiny_patch16_384": 5_790_376,
    "vit_small_patch16_384": 22_196_584,
    "vit_base_patch16_384": 86_859_496,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(name, count):
    model = msvit_jax.create_model(name)
    side = model.image_size
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


@pytest.mark.parametrize(
    ("name", "official"),
    [("vit_small_patch14_dinov2", 22_056_576), ("vit_small_patch14_reg4_dinov2", 22_058_112)],
)
def test_dinov2_has_the_official_size(name, official):
    model = msvit_jax.create_model(name)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 518, 518, 3)))
    params = variables["params"]
    params.pop("head")  # the official backbones have none
    mask_token = 384  # theirs alone, for pretraining
    class_position = 0 if model.prefix_positions else 384  # as timm, folded into the class token
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == official - mask_token - class_position


@pytest.mark.parametrize(
    ("name", "published"), [("deit_tiny", 1.26e9), ("deit_small", 4.6e9), ("deit_base", 17.6e9)]
)
def test_analytic_macs_agree_with_publications_and_with_xla(name, published, monkeypatch):
    # XLA counts the polynomial behind erf, 50 element-wise operations; a MAC count must not.
    monkeypatch.setitem(blocks.GELUS, "exact", jax.nn.relu)
    model = msvit_jax.create_model(f"{name}_patch16_224")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    analytic = flops.macs_per_image(model, [196])[0]
    counted = flops.xla_macs(lambda v, x: model.apply(v, x).logits, variables, images)
    assert analytic == pytest.approx(published, rel=0.006)
    assert analytic == pytest.approx(counted, rel=0.02)


def reference_forward(params, images, model, reduce=None, head=True):
    """DeiT's forward pass, image by image in float64 NumPy, written without the library.

    `reduce(layer, x, query, key, size)` may change tokens [N, D] and their sizes between attention
    and MLP; queries and keys are [N, heads, d], and it returns tokens, their sizes and those that
    attention counts. Without `head` it returns the list of the images' tokens before the last norm.
    """
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    patch, heads = model.patch_size, model.heads

    def norm(x, q):
        centered = x - x.mean(-1, keepdims=True)
        return (
            centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * q["scale"]
            + q["bias"]
        )

    def dense(x, q):
        return x @ q["kernel"] + q["bias"]

    def one(image):
        kernel = p["patch_embed"]["proj"]["kernel"].reshape(-1, model.width)
        rows = [
            image[y : y + patch, x : x + patch].reshape(-1)
            for y in range(0, image.shape[0], patch)
            for x in range(0, image.shape[1], patch)
        ]
        tokens = np.stack(rows) @ kernel + p["patch_embed"]["proj"]["bias"]
        prefix = [p[k] for k in ("cls_token", "dist_token") if k in p]
        x = np.concatenate([*prefix, tokens]) + p["pos_embed"]
        first = model.prefix_length
        if "reg_tokens" in p:
            x = np.concatenate([x[: len(prefix)], p["reg_tokens"], x[len(prefix) :]])
        size, counted = np.ones(len(x)), np.ones(len(x))
        for layer in range(model.depth):
            b = p[f"blocks_{layer}"]
            y = dense(norm(x, b["norm1"]), b["attn"]["qkv"])
            query, key, value = np.split(y, 3, axis=-1)
            mixed = []
            for h in range(heads):
                cut = slice(h * model.width // heads, (h + 1) * model.width // heads)
                scores = query[:, cut] @ key[:, cut].T / np.sqrt(model.width // heads)
                mixed.append(softmax(scores + np.log(counted), axis=-1) @ value[:, cut])
            y = dense(np.concatenate(mixed, axis=-1), b["attn"]["proj"])
            x = x + y * b.get("ls1", {"gamma": 1.0})["gamma"]
            if reduce is not None:
                apart = (t.reshape(len(x), heads, -1) for t in (query, key))
                x, size, counted = reduce(layer, x, *apart, size)
            y = dense(norm(x, b["norm2"]), b["mlp"]["fc1"])
            y = dense(y * (1 + erf(y / np.sqrt(2))) / 2, b["mlp"]["fc2"])
            x = x + y * b.get("ls2", {"gamma": 1.0})["gamma"]
        if not head:
            return x
        x = norm(x, p["norm"])
        if model.pool == "mean":
            return dense(np.average(x[first:], axis=0, weights=size[first:]), p["head"])
        logits = dense(x[0], p["head"])
        return (logits + dense(x[1], p["head_dist"])) / 2 if "head_dist" in p else logits

    answers = [one(np.asarray(image, np.float64)) for image in images]
    return np.stack(answers) if head else answers


@pytest.mark.parametrize(
    "overrides", [{}, {"distilled": True}, {"pool": "mean"}, {"layer_scale": 0.1}]
)
def test_forward_equals_a_numpy_transformer(overrides):
    model, variables, images = make_rough(**overrides)
    expected = reference_forward(variables["params"], images, model)
    np.testing.assert_allclose(
        apply(model, variables, images).logits, expected, rtol=2e-4, atol=2e-4
    )


def test_distilled_model_returns_both_heads_in_training():
    model, variables, images = make_rough(distilled=True)
    train = apply(model, variables, images, train=True)
    chex.assert_trees_all_close(
        (train.logits + train.distilled_logits) / 2, apply(model, variables, images).logits
    )


def test_register_tokens_are_seen_but_have_no_position():
    model, variables, images = make_rough(register_tokens=3, prefix_positions=False)
    assert variables["params"]["pos_embed"].shape == (16, 16)
    changed = jax.tree.map(lambda x: x, variables)
    # Not by a constant, which layer norms take away.
    changed["params"]["reg_tokens"] = changed["params"]["reg_tokens"][:, ::-1]
    difference = apply(model, changed, images).logits - apply(model, variables, images).logits
    assert jnp.abs(difference).max() > 1e-3


def stack_blocks(params, depth):
    layers = [params[f"blocks_{layer}"] for layer in range(depth)]
    rest = {k: v for k, v in params.items() if not k.startswith("blocks_")}
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_and_recomputed_blocks_compute_the_same(remat):
    model, variables, images = make_rough()
    scanned = model.clone(scan_layers=True, remat=remat)
    stacked = {"params": stack_blocks(variables["params"], model.depth)}

    def loss_and_gradient(module, variables):
        loss = lambda v: (module.apply(v, images).logits ** 2).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(variables)

    loss, gradient = loss_and_gradient(scanned, stacked)
    plain_loss, plain = loss_and_gradient(model, variables)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
    plain = stack_blocks(plain["params"], model.depth)
    chex.assert_trees_all_close(gradient["params"], plain, rtol=1e-3, atol=1e-4)


def test_a_scan_keeps_results_of_products_and_no_more():
    model, variables, images = make_rough(scan_layers=True, dtype=jnp.bfloat16, drop_path=0.1)
    rngs = {"dropout": jax.random.key(3)}
    loss = lambda v: model.apply(v, images, train=True, rngs=rngs).logits.sum()  # noqa: E731
    kept = jax.tree.leaves(jax.eval_shape(lambda v: jax.vjp(loss, v)[1], variables))
    tokens = (len(images), 17)
    of_tokens = [x for x in kept if x.ndim > 2 and x.shape[0] == model.depth and 17 in x.shape]
    logarithms = (model.depth, tokens[0], model.heads, tokens[1])
    found = [x for x in of_tokens if x.shape != logarithms or x.dtype != jnp.float32]
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    # Queries, keys, values, attention's result and its projection, a block's input, and four times
    # as many hidden channels.
    channels = sum(x.size for x in found) / (model.depth * np.prod(tokens) * model.width)
    assert channels == 6 + 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_apart_and_together_are_the_same_and_have_the_same_gradients(dtype):
    rng = np.random.default_rng(0)
    x, kernel, bias, weights = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((2, 5, 8), (8, 3, 2, 4), (3, 1, 1, 2, 4), (3, 2, 5, 2, 4))
    )

    def outputs_and_gradients(project):
        def loss(*given):
            parts = jnp.stack(project(*given))
            return (parts * weights).sum().astype(jnp.float32), parts

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, kernel, bias)

    # Sums of ten to thirty normal numbers, to bfloat16's eight bits or float32's 24.
    close = functools.partial(
        chex.assert_trees_all_close, rtol=0, atol=1e-5 if dtype == jnp.float32 else 0.1
    )
    apart, together = map(outputs_and_gradients, (blocks._heads_apart, blocks._heads_together))
    close(together[0][1], apart[0][1])
    close(together[1], apart[1])


def test_positions_are_resized_for_other_image_sizes():
    model, variables, _ = make_rough()
    larger = jax.random.normal(jax.random.key(2), (2, 48, 32, 3))
    output = apply(model, variables, larger)
    chex.assert_shape(output.logits, (2, 5))
    np.testing.assert_array_equal(output.tokens, 6 * 4)
    flat = {"params": dict(variables["params"])}
    constant = jnp.ones((16, 16))
    flat["params"]["pos_embed"] = jnp.concatenate([variables["params"]["pos_embed"][:1], constant])
    bound = model.bind(flat)
    np.testing.assert_allclose(bound.positions((6, 4)), np.ones((6, 4, 16)), rtol=1e-5)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    out = blocks.drop_path(x, jnp.float32(0.25), jax.random.key(0))
    kept = out[:, 0, 0] > 0
    np.testing.assert_allclose(out, jnp.where(kept[:, None, None], 4 / 3, 0.0) * x, rtol=1e-6)
    assert abs(float(kept.mean()) - 0.75) < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_drop_path_acts_in_training_alone():
    model, variables, images = make_rough(drop_path=0.9)
    still = apply(model, variables, images).logits
    a, b = (
        apply(model, variables, images, train=True, rngs={"dropout": jax.random.key(k)}).logits
        for k in range(2)
    )
    chex.assert_trees_all_close(still, apply(model, variables, images).logits)
    assert jnp.abs(a - b).max() > 1e-5


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model, variables, images = make()
    half = model.clone(dtype=jnp.bfloat16)
    started = jax.eval_shape(half.init, jax.random.key(0), images)
    chex.assert_trees_all_equal_dtypes(started, variables)
    output = apply(half, variables, images)
    assert output.logits.dtype == jnp.float32
    np.testing.assert_allclose(output.logits, apply(model, variables, images).logits, atol=0.02)


class ModulesUnderTransformations(chex.TestCase):
    @chex.all_variants(with_pmap=True)
    def test_same_logits_under_every_variant(self):
        model, variables, images = make("msvit_deit_tiny_patch16_224")
        varied = self.variant(lambda v, x: model.apply(v, x).logits)
        np.testing.assert_allclose(
            np.reshape(varied(variables, images), (-1, 3, 5))[0],
            apply(model, variables, images).logits,
            rtol=2e-5,
            atol=2e-6,
        )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 32, 32, 1), "convert gray"),
        ((2, 32, 32, 4), "RGB"),
        ((32, 32, 3), "batch axis"),
        ((2, 30, 32, 3), "multiple of 8"),
    ],
)
def test_wrong_images_are_told(shape, message):
    model, variables, _ = make_rough()
    with pytest.raises(ValueError, match=message):
        model.apply(variables, jnp.zeros(shape))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 33}, "not divisible by patch_size"),
        ({"heads": 3}, "not divisible by heads"),
        ({"pool": "max"}, "is not one of token, mean"),
        ({"class_token": False}, "needs class_token"),
        ({"distilled": True, "pool": "mean"}, "needs pool='token'"),
    ],
)
def test_values_that_do_not_fit_together_are_told(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_rough(**overrides)


def test_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match="deit_small_patch16_224"):
        msvit_jax.create_model("deit_smal_patch16_224")


def test_unknown_option_names_the_nearest():
    with pytest.raises(UserError, match="'drop_path'"):
        msvit_jax.create_model("deit_tiny_patch16_224", drop_pth=0.1)


def test_every_listed_model_can_be_made():
    assert set(msvit_jax.list_models()) == {
        *(*BACKBONES, *MIXED_SCALE, *MERGENCE, *CASCADES, *SEGMENTERS)
    }
    for name in msvit_jax.list_models():
        assert msvit_jax.create_model(name, num_classes=7).num_classes == 7
