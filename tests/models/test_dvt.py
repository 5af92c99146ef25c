"""The cascade: official sizes and costs, a NumPy reference of both reuses, stages on their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

import msvit_jax
from msvit_jax import flops
from msvit_jax.errors import UserError
from msvit_jax.models import block as blocks
from msvit_jax.models import dvt
from tests.models.test_vit import rough
from tests.tokens.test_grid import nearest_then_pooled

TINY = {
    "image_size": 16,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "num_classes": 5,
    "grid_sizes": (2, 3, 4),
    "feature_width": 4,
    "feature_hidden": 8,
}


@functools.cache
def make(name="dvt_deit_small", **overrides):
    model = msvit_jax.create_model(name, **(TINY | overrides))
    side = model.image_size
    images = jax.random.normal(jax.random.key(1), (3, side, side, 3))
    return model, rough(jax.eval_shape(model.init, jax.random.key(0), images)), images


def shapes(model):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "official", "trained"),
    [
        ("dvt_deit_small", 70_442_232, 70_442_232),
        ("dvt_t2t_vit_12", 22_461_516, 22_360_140),
        ("dvt_t2t_vit_14", 67_881_836, 67_735_916),
    ],
)
def test_parameter_counts_are_the_official_ones(name, official, trained):
    params = shapes(msvit_jax.create_model(name))
    assert count(params) == official
    fixed = 0
    if "t2t" in name:
        for stage in range(3):
            own = params[f"stage_{stage}"]
            fixed += own["pos_embed"].size
            fixed += 2 * own["patch_embed"]["performer_1"]["random_features"].size
    assert official - fixed == trained


# GMACs of the paper: first exit, then with (features, relations) of second and third exit.
REUSES = [(False, False), (True, False), (False, True), (True, True)]
PUBLISHED = {
    "dvt_t2t_vit_12": (0.4725, (1.3707, 1.4251, 1.4081, 1.4625), (3.1454, 3.3077, 3.3353, 3.4975)),
    "dvt_t2t_vit_14": (1.2065, (3.6112, 3.7301, 3.7220, 3.8409), (8.4115, 8.7649, 8.9742, 9.3276)),
    "dvt_deit_small": (1.1453, (3.4501, 3.5743, 3.5321, 3.6563), (8.0584, 8.4273, 8.4749, 8.8438)),
}


@pytest.mark.parametrize("variant", range(4))
@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_are_the_published_ones(name, variant):
    features, relations = REUSES[variant]
    model = msvit_jax.create_model(name, feature_reuse=features, relation_reuse=relations)
    first, second, third = PUBLISHED[name]
    wanted = [first, second[variant], third[variant]]
    found = model.exit_macs(dvt.PUBLISHED_NORM_COST) / 1e9
    np.testing.assert_allclose(found, wanted, rtol=0.005)
    np.testing.assert_allclose(model.exit_macs() / 1e9, wanted, rtol=0.011)  # without layer norms


def test_macs_agree_with_xla(monkeypatch):
    # XLA counts the polynomial behind erf; a MAC count must not.
    monkeypatch.setitem(blocks.GELUS, "exact", jax.nn.relu)
    monkeypatch.setattr(dvt, "gelu", jax.nn.relu)
    model = msvit_jax.create_model("dvt_deit_small", depth=1, grid_sizes=(7, 10))
    params = {"params": shapes(model)}
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    counted = flops.xla_macs(lambda v, x: model.apply(v, x).exit_logits, params, images)
    assert model.exit_macs()[-1] == pytest.approx(counted, rel=0.03)


def test_macs_by_tokens_are_those_of_the_exit():
    model, _, _ = make()
    np.testing.assert_array_equal(model.exit_tokens, [4, 9, 16])
    cost = model.exit_macs()
    assert (np.diff(cost) > 0).all()
    np.testing.assert_array_equal(model.macs([4, 9, 16, 5]), cost[[0, 1, 2, 1]])


def reference(params, image, model):
    """Logits of every exit for one image, in float64 and by loops over heads and channels."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    width, heads, depth = model.backbone.width, model.backbone.heads, model.backbone.depth

    def norm(x, q):
        centered = x - x.mean(-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * q["scale"] + q["bias"]

    def dense(x, q):
        return x @ q["kernel"] + q["bias"]

    def gelu(x):
        return x * (1 + erf(x / np.sqrt(2))) / 2

    def square(column, old, new):
        """One channel of the patch tokens, brought to the new grid."""
        return nearest_then_pooled(column.reshape(old, old), (new, new)).reshape(-1)

    def relation(scores, old, new):
        """[n + 1, n + 1] -> [N + 1, N + 1]: keys of every row, then queries of every column."""
        wide = np.stack([np.concatenate([row[:1], square(row[1:], old, new)]) for row in scores])
        tall = [np.concatenate([col[:1], square(col[1:], old, new)]) for col in wide.T]
        return np.stack(tall, axis=1)

    def tokens_of(q, side):
        patch = -(-model.image_size // side)
        before = (patch * side - model.image_size) // 2
        canvas = np.zeros((patch * side, patch * side, 3))
        canvas[before:, before:][: model.image_size, : model.image_size] = image
        rows = [
            canvas[y * patch :, x * patch :][:patch, :patch].reshape(-1)
            for y in range(side)
            for x in range(side)
        ]
        kernel = q["patch_embed"]["proj"]["kernel"].reshape(-1, width)
        embedded = np.stack(rows) @ kernel + q["patch_embed"]["proj"]["bias"]
        return np.concatenate([q["cls_token"], embedded]) + q["pos_embed"]

    exits, upstream, relations = [], None, None
    for stage, side in enumerate(model.grid_sizes):
        q = p[f"stage_{stage}"]
        x = tokens_of(q, side)
        old = model.grid_sizes[stage - 1]
        if stage and model.relation_reuse:
            r = p[f"reuse_{stage}"]["relation"]
            mixed = np.moveaxis(
                dense(gelu(dense(np.moveaxis(relations, 0, -1), r["fc1"])), r["fc2"]), -1, 0
            )
        seen = []
        for layer in range(depth):
            b = q[f"blocks_{layer}"]
            query, key, value = np.split(dense(norm(x, b["norm1"]), b["attn"]["qkv"]), 3, axis=-1)
            out = []
            for h in range(heads):
                cut = slice(h * width // heads, (h + 1) * width // heads)
                scores = query[:, cut] @ key[:, cut].T / np.sqrt(width // heads)
                if stage and model.relation_reuse:
                    scores = scores + relation(mixed[layer * heads + h], old, side)
                seen.append(scores)
                out.append(softmax(scores, axis=-1) @ value[:, cut])
            x = x + dense(np.concatenate(out, axis=-1), b["attn"]["proj"])
            y = x
            if stage and model.feature_reuse:
                f = p[f"reuse_{stage}"][f"blocks_{layer}"]
                context = dense(gelu(dense(norm(upstream, f["norm"]), f["fc1"])), f["fc2"])[1:]
                context = np.stack([square(c, old, side) for c in context.T], axis=1)
                context = np.concatenate([np.zeros((1, context.shape[1])), context])
                y = np.concatenate([x, context], axis=-1)
            x = x + dense(gelu(dense(norm(y, b["norm2"]), b["mlp"]["fc1"])), b["mlp"]["fc2"])
        upstream, relations = x, np.stack(seen)
        exits.append(dense(norm(x, q["norm"])[0], q["head"]))
    return np.stack(exits)


@pytest.mark.parametrize(("features", "relations"), REUSES)
def test_exits_equal_a_numpy_cascade(features, relations):
    # All three stages where both are on: then scores that were added to are handed on.
    grid_sizes = (2, 3, 4) if features and relations else (2, 3)
    switches = {"feature_reuse": features, "relation_reuse": relations}
    model, variables, images = make(grid_sizes=grid_sizes, **switches)
    found = jax.jit(lambda v, x: model.apply(v, x))(variables, images)
    expected = np.stack([reference(variables["params"], np.asarray(x), model) for x in images])
    np.testing.assert_allclose(found.exit_logits, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found.exit_logits[:, -1], found.logits)


def by_stages(model, variables, images):
    """Every stage by itself, for other rows every time; returns {(image, stage): logits}."""
    run = jax.jit(
        lambda v, x, handed, stage: model.apply(v, x, handed, stage=stage, method="run_stage"),
        static_argnums=3,
    )
    rows, handed, found = np.arange(len(images)), None, {}
    for stage in range(len(model.grid_sizes)):
        done = run(variables, images[rows], handed, stage)
        found |= {(int(row), stage): done.logits[i] for i, row in enumerate(rows)}
        left = np.arange(len(rows))[stage % 2 :][::-1]  # fewer images, in another order
        rows = rows[left]
        handed = jax.tree.map(lambda x: x[left], done.handed)  # noqa: B023
    assert handed is None
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [("dvt_deit_small", {}), ("dvt_t2t_vit_12", {"grid_sizes": (1, 2, 4), "depth": 1})],
)
def test_stages_alone_give_the_exits_of_one_call(name, options):
    model, variables, images = make(name, **options)
    exits = jax.jit(lambda v, x: model.apply(v, x).exit_logits)(variables, images)
    found = by_stages(model, variables, images)
    assert len(found) == 3 + 3 + 2
    for (row, stage), logits in found.items():
        np.testing.assert_allclose(logits, exits[row, stage], rtol=1e-4, atol=1e-4)


def test_what_is_switched_off_has_no_parameters():
    width, hidden, channels = 16, 8, 4  # channels: 2 layers of 2 heads
    size = {
        reuse: count(make(feature_reuse=reuse[0], relation_reuse=reuse[1])[1]) for reuse in REUSES
    }
    made = 2 * width + width * hidden + hidden + hidden * 4 + 4  # norm, fc1, fc2
    wider = 2 * 4 + 4 * 32  # norm2 and fc1
    mixed = channels * 12 + 12 + 12 * channels + channels
    assert size[True, False] - size[False, False] == 2 * 2 * (made + wider)
    assert size[False, True] - size[False, False] == 2 * mixed
    assert size[True, True] - size[False, False] == 2 * 2 * (made + wider) + 2 * mixed


def test_mixing_of_scores_starts_as_a_convolution_of_pytorch():
    mix = dvt.RelationReuse(3).init(jax.random.key(0), jnp.zeros((1, 4, 2, 2)))["params"]
    for layer, fan_in in (("fc1", 4), ("fc2", 12)):
        for leaf in mix[layer].values():
            assert 0.2 * fan_in**-0.5 < jnp.abs(leaf).max() <= fan_in**-0.5


def test_gradient_of_the_last_exit_reaches_every_stage():
    model, variables, images = make(grid_sizes=(2, 3, 4), depth=1)
    loss = lambda v: (model.apply(v, images).logits ** 2).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(variables)["params"]
    for stage in range(3):
        qkv = gradient[f"stage_{stage}"]["blocks_0"]["attn"]["qkv"]["kernel"]
        assert jnp.abs(qkv).max() > 0
    assert jnp.abs(gradient["stage_0"]["head"]["kernel"]).max() == 0


def test_recomputed_blocks_have_the_same_gradient():
    model, variables, images = make(grid_sizes=(2, 3), depth=1)
    again = model.clone(backbone=model.backbone.clone(remat=True))

    def gradient(module):
        loss = lambda v: (module.apply(v, images).exit_logits ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(variables)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3),
        gradient(again),
        gradient(model),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"grid_sizes": (3, 2)}, "larger than the one before"),
        ({"grid_sizes": ()}, "give one or more"),
        ({"grid_sizes": (2, 40)}, "not from 1 to image_size=16"),
        ({"grid_sizes": (2, 7)}, "some would lie outside"),
        ({"patch_size": 4}, "no option 'patch_size'"),
    ],
)
def test_what_does_not_fit_is_told(overrides, message):
    with pytest.raises(UserError, match=message):
        make(**overrides)


def test_a_t2t_grid_that_does_not_fit_is_told():
    with pytest.raises(UserError, match=r"sides that fit: 1, 2, 4"):
        make("dvt_t2t_vit_12", grid_sizes=(2, 3))


def test_a_stage_without_what_it_reuses_and_a_wrong_image_size_are_told():
    model, variables, images = make()
    with pytest.raises(ValueError, match="Stage 1 needs the carry of stage 0"):
        model.apply(variables, images, stage=1, method="run_stage")
    with pytest.raises(ValueError, match="images must be 16 x 16 px"):
        model.apply(variables, jnp.zeros((1, 20, 20, 3)))
