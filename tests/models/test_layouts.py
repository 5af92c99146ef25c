"""Layouts: the same logits as slots for every image that fits, and a true report of the others."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import msvit_jax
from msvit_jax.models.msvit import MSViT
from tests.jitted import apply
from tests.models.poison import poisonable
from tests.models.test_vit import TINY, rough

NAME = "msvit_deit_tiny_patch16_224"
SIDE = 24  # 9 regions of 8 px: 9 to 36 patch tokens
BATCH = 8


@functools.cache
def slots(**options):
    """A model of 9 regions, rough parameters, images, and its compiled forward pass."""
    sizes = {"image_size": SIDE, "patch_size": 4}
    model = msvit_jax.create_model(NAME, **(TINY | sizes | options))
    images = jax.random.normal(jax.random.key(3), (BATCH, SIDE, SIDE, 3))
    return model, rough(jax.eval_shape(model.init, jax.random.key(0), images)), images


@functools.cache
def compiled(model):
    return jax.jit(lambda v, x, coarse: model.apply(v, x, coarse=coarse))


def run(model, variables, images, coarse):
    return compiled(model)(variables, images, coarse)


def decisions(seed, share):
    rng = np.random.default_rng(seed)
    rate = np.clip(share + rng.normal(0, 0.2, (BATCH, 1)), 0, 1)
    return jnp.asarray(rng.random((BATCH, 9)) < rate, jnp.float32)


LAYOUTS = [
    {"layout": "budget", "token_capacity": 24},
    {
        "layout": "budget",
        "token_capacity": (18, 36),
    },  # each further part compiles every layer again
    {"layout": "budget", "token_capacity": (18, 24), "row_groups": 2},
    {"layout": "rows", "rows": 4, "row_width": 64},
    {"layout": "rows", "rows": 4, "row_width": 64, "row_groups": 2},
    {"layout": "rows", "rows": 2, "row_width": 128, "row_groups": 2},  # whole tiles
    {"layout": "trimmed", "token_capacity": 36},
    {"layout": "trimmed", "token_capacity": (15, 18, 24, 45)},
]
PREFIXES = [{"distilled": True, "register_tokens": 2}, {"pool": "mean", "class_token": False}]
CASES = [({}, layout) for layout in LAYOUTS] + [
    (prefix, LAYOUTS[i]) for prefix in PREFIXES for i in (1, 4, 6)
]


@pytest.mark.parametrize(("options", "layout"), CASES, ids=str)
@hypothesis.given(seed=st.integers(0, 2**31), share=st.sampled_from([0.0, 0.4, 0.7, 1.0]))
@hypothesis.settings(max_examples=5)
def test_logits_equal_slots_where_an_image_fits(options, layout, seed, share):
    model, variables, images = slots(**options)
    coarse = decisions(seed, share)
    expected = run(model, variables, images, coarse)
    output = run(model.clone(**layout), variables, images, coarse)
    fits = np.asarray(output.within_capacity)
    np.testing.assert_array_equal(np.isnan(output.logits).all(axis=1), ~fits)
    scale = np.abs(expected.logits).max()
    np.testing.assert_allclose(
        output.logits[fits] / scale, expected.logits[fits] / scale, atol=1e-4
    )
    np.testing.assert_array_equal(output.tokens, expected.tokens)
    np.testing.assert_array_equal(expected.tokens, 36 - 3 * np.asarray(coarse).sum(axis=1))
    capacities = layout.get("token_capacity")
    if isinstance(capacities, int):
        np.testing.assert_array_equal(fits, np.asarray(output.tokens) <= capacities)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3]], ids=str)
def test_bfloat16_agrees(layout):
    model, variables, images = slots(dtype=jnp.bfloat16)
    coarse = decisions(1, 0.6)
    expected = run(model, variables, images, coarse)
    output = run(model.clone(**layout), variables, images, coarse)
    fits = np.asarray(output.within_capacity)
    assert fits.sum() >= 4
    scale = np.abs(expected.logits).max()
    np.testing.assert_allclose(
        output.logits[fits] / scale, expected.logits[fits] / scale, atol=2e-2
    )


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3]], ids=str)
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_poison_in_unused_places_reaches_no_result(layout, pool, monkeypatch):
    model, variables, images = slots(pool=pool)
    model = model.clone(**layout)
    coarse = decisions(2, 0.7)
    tokens_of, masked = MSViT._tokens, poisonable(model, monkeypatch)

    @jax.jit
    def run(variables, images, coarse, poison):
        def poisoned_tokens(*args):
            tokens, weights, areas = tokens_of(*args)
            hidden = weights[:, :, None] <= 0.5
            return jnp.where(poison & hidden, jnp.nan, tokens), weights, areas

        with monkeypatch.context() as patched:
            patched.setattr(MSViT, "_tokens", poisoned_tokens)
            return masked(variables, images, coarse, poison)

    clean, poisoned = (
        run(variables, images, coarse, jnp.asarray(poison)) for poison in (False, True)
    )
    np.testing.assert_array_equal(poisoned.within_capacity, clean.within_capacity)
    np.testing.assert_array_equal(poisoned.logits, clean.logits)
    assert np.asarray(clean.within_capacity).sum() >= 4


@pytest.mark.parametrize("layout", LAYOUTS[0:4:3] + LAYOUTS[1:2], ids=str)
def test_the_order_of_the_batch_does_not_matter(layout):
    model, variables, images = slots()
    model = model.clone(**{**layout, "row_groups": 1})
    coarse = decisions(5, 0.7)
    order = np.random.default_rng(0).permutation(BATCH)
    first = run(model, variables, images, coarse)
    second = run(model, variables, images[order], coarse[order])
    both = np.asarray(first.within_capacity)[order] & np.asarray(second.within_capacity)
    assert both.sum() >= 4
    np.testing.assert_array_equal(
        np.sort(np.asarray(first.tokens)[~np.asarray(first.within_capacity)]),
        np.sort(np.asarray(second.tokens)[~np.asarray(second.within_capacity)]),
    )
    np.testing.assert_allclose(first.logits[order][both], second.logits[both], atol=1e-4)


def training_gradient(model, variables, images):
    labels = jnp.arange(BATCH) % 3

    def loss(v):
        output = model.apply(v, images, train=True, rngs={"gate": jax.random.key(7)})
        return -jax.nn.log_softmax(output.logits)[jnp.arange(BATCH), labels].mean()

    return jax.jit(jax.grad(loss))(variables)


@pytest.mark.parametrize("options", [{}, {"pool": "mean", "class_token": False}], ids=str)
def test_trimmed_gradients_equal_those_of_slots_when_nothing_is_cut(options):
    model, variables, images = slots(scan_layers=True, **options)  # compiled once for both layers
    expected = training_gradient(model, variables, images)
    found = training_gradient(model.clone(layout="trimmed", token_capacity=45), variables, images)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected["params"]["gate_mlp"]))
    assert largest > 1e-4
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("capacity", [24, (18, 45)], ids=str)
def test_trimmed_training_answers_as_slots_do(capacity):
    model, variables, images = slots()
    coarse = decisions(3, 0.7)
    rngs = {"gate": jax.random.key(1)}
    ours, theirs = (
        apply(m, variables, images, train=True, coarse=coarse, rngs=rngs)
        for m in (model.clone(layout="trimmed", token_capacity=capacity), model)
    )
    fits = np.asarray(ours.within_capacity)
    assert fits.sum() >= 4
    np.testing.assert_allclose(ours.logits[fits], theirs.logits[fits], atol=1e-4)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"scan_layers": True},
        {"drop_path": 0.5},
        {"drop_path": 0.5, "reducer": "mergence", "reduce_layers": (1,)},
    ],
    ids=str,
)
def test_stochastic_depth_drops_the_same_images_in_every_layout(options):
    model, variables, images = slots(**options)
    coarse = decisions(4, 0.6)
    rngs = {"gate": jax.random.key(1), "dropout": jax.random.key(2)}

    def train(model):
        return apply(model, variables, images, train=True, coarse=coarse, rngs=rngs)

    expected = train(model).logits
    for layout in (
        {"layout": "budget", "token_capacity": 36, "row_groups": 2},
        {"layout": "rows", "rows": 8, "row_width": 40},
    ):
        output = train(model.clone(**layout))
        assert output.within_capacity.all()
        np.testing.assert_allclose(output.logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (LAYOUTS[2], {}),
        (LAYOUTS[4], {}),
        (LAYOUTS[4], {"reducer": "mergence", "reduce_layers": (1,)}),
        (
            {"layout": "budget", "token_capacity": 24, "row_groups": 2},
            {"reducer": "tome", "reduce_layers": (1,)},
        ),
    ],
    ids=str,
)
def test_layouts_run_sharded_and_move_no_tokens_between_devices(layout, options):
    model, variables, images = slots(**options)
    model = model.clone(**layout)
    mesh = jax.make_mesh(
        (2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
    )
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    coarse = decisions(6, 0.7)
    function = jax.jit(
        lambda v, x, c: model.apply(v, x, coarse=c).logits,
        in_shardings=(whole, spread, spread),
        out_shardings=spread,
    )
    program = function.lower(variables, images, coarse).compile()
    text = program.as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
    placed = jax.device_put((variables, images, coarse), (whole, spread, spread))
    found = program(*placed)
    np.testing.assert_allclose(found, run(model, variables, images, coarse).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "packed"}, "layout='packed' is not one of slots"),
        ({"layout": "budget"}, "needs token_capacity="),
        (
            {"layout": "budget", "token_capacity": 37},
            "token_capacity=37 is not possible: an image has 9 to 36",
        ),
        (
            {"layout": "trimmed", "token_capacity": 46},
            "token_capacity=46 is not possible: an image has 9 to 45",
        ),
        ({"layout": "budget", "token_capacity": (8, 16)}, "token_capacity=8 is not possible"),
        ({"layout": "budget", "token_capacity": (10, 12, 14)}, "8 images .* cannot be cut into 3"),
        (
            {"layout": "budget", "token_capacity": 20, "row_groups": 3},
            "8 cannot be cut into row_groups=3",
        ),
        ({"layout": "rows", "row_width": 64}, "needs rows="),
        ({"layout": "rows", "rows": 4, "row_width": 36}, "one image can need 37 tokens"),
        ({"layout": "rows", "rows": 3, "row_width": 64, "row_groups": 2}, "rows=3 cannot be cut"),
    ],
)
def test_sizes_that_do_not_fit_are_told(options, message):
    model, variables, images = slots()
    with pytest.raises(ValueError, match=message):
        model.clone(**options).apply(variables, images)


def test_gate_only_decides_like_the_whole_model():
    model, variables, images = slots(gate_bias=0.0)
    alone = apply(model, variables, images, threshold=0.4, method="gate_only")
    whole = apply(model, variables, images, threshold=0.4)
    np.testing.assert_array_equal(alone.coarse, whole.gate.coarse)
    assert 0 < np.asarray(alone.coarse).mean() < 1


def test_create_model_takes_layouts():
    model = msvit_jax.create_model(NAME, layout="rows", rows=9, row_width=512)
    assert (model.layout, model.rows, model.row_width) == ("rows", 9, 512)
