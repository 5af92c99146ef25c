"""Patches that were merged or dropped, put back on the grid with features of their own."""

import jax
import numpy as np
import pytest

import msvit_jax
from tests import jitted
from tests.models.test_mergence import DENSE, REDUCERS, make, reducing
from tests.models.test_vit import reference_forward

RESIDUAL = {"depth": 3, "reduce_layers": (1, 3), "keep": 0.6, "unmerge": "residual"}
REPRODUCED = [name for name in REDUCERS if name not in ("algm", "random")]  # by `reducing`


def literal(tokens, stages):
    """Undoes one image's merges one by one, the last one first."""
    for before, host_of, hosts, merged in reversed(stages):
        whole = before.copy()
        for token in range(len(before)):
            if (host := host_of[token]) is not None:
                position = hosts.index(host)
                whole[token] += tokens[position] - merged[position]
        tokens = whole
    return tokens


def normalized(x, p):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return (x - x.mean(-1, keepdims=True)) / deviation * p["scale"] + p["bias"]


@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("reducer", REPRODUCED)
def test_a_patch_has_its_own_features_and_what_its_token_gained(reducer, scale):
    model, variables, images = make(DENSE, num_classes=0, reducer=reducer, **RESIDUAL)
    params = {**variables["params"]}
    params["pos_embed"] = scale * params["pos_embed"]  # sharper attention, scores and likenesses
    record = []
    tokens = reference_forward(params, images, model, reducing(model, record), head=False)
    found = jitted.apply(model, {"params": params}, images).features
    for image, final in enumerate(tokens):
        stages = record[2 * image : 2 * image + 2]
        expected = normalized(literal(final, stages), params["norm"])
        prefix, width = model.prefix_length, model.width
        patches = np.asarray(found.patches[image]).reshape(-1, width)
        np.testing.assert_allclose(patches, expected[prefix:], rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(found.class_token[image], expected[0], rtol=2e-4, atol=2e-4)
        assert len(np.unique(patches, axis=0)) == len(patches)
        if reducer == "topk":
            assert (np.abs(patches).max(axis=1) > 0).all()


@pytest.mark.parametrize("reducer", ["mergence", "algm"])
def test_a_last_layer_that_keeps_its_tokens_changes_nothing(reducer):
    """Merging alone loses nothing: only later layers see less of the patches."""
    options = {"num_classes": 0, "depth": 2, "reducer": reducer, "unmerge": "residual"}
    model, variables, images = make(DENSE, **options, reduce_layers=(1, 2), keep=(1.0, 0.6))
    params = {**variables["params"]}
    params["blocks_1"] = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "fc2" in jax.tree_util.keystr(path) else x, params["blocks_1"]
    )
    plain = model.clone(reducer="none")
    found, expected = (jitted.apply(m, {"params": params}, images).features for m in (model, plain))
    assert (np.asarray(model.layer_tokens(16)) < 16).any()
    np.testing.assert_allclose(found.patches, expected.patches, rtol=1e-5, atol=1e-5)


def test_a_coarse_regions_cells_have_what_its_token_gained():
    """Beside each coarse cell's own embedding; every step of it written out."""
    options = {"image_size": 32, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
    model = msvit_jax.create_model("msvit", num_classes=0, unmerge="residual", **options)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    variables = jitted.init(model, images)
    coarse = np.float32([rng.permutation(16) < count for count in (8, 8, 5)])
    found = jitted.apply(model, variables, images, coarse=coarse).features

    bound = model.bind(variables)
    fine, of_region = map(np.asarray, bound.embed_scales(images))
    vit = bound.backbone

    @jax.jit
    def encode(tokens):
        x = vit.with_prefix(tokens[None])
        for block in vit.blocks:
            x = block(x, None, None)
        return x[0]

    for image in range(3):
        whole = [r for r in range(16) if coarse[image, r]]
        rows = [of_region[image, r] for r in whole]
        rows += [x for r in range(16) if not coarse[image, r] for x in fine[image, r]]
        x = np.asarray(encode(np.stack(rows)))
        after = iter(x[vit.prefix_length :])
        cells = np.zeros((16, 4, 16), np.float32)
        for r in whole:
            cells[r] = next(after) + fine[image, r] - of_region[image, r]
        for r in range(16):
            for cell in range(4) if r not in whole else ():
                cells[r, cell] = next(after)
        expected = np.zeros((8, 8, 16), np.float32)
        for r, cell in np.ndindex(16, 4):
            expected[2 * (r // 4) + cell // 2, 2 * (r % 4) + cell % 2] = cells[r, cell]
        expected = normalized(expected.astype(np.float64), variables["params"]["backbone"]["norm"])
        np.testing.assert_allclose(found.patches[image], expected, rtol=1e-4, atol=1e-4)
        token = normalized(x[0].astype(np.float64), variables["params"]["backbone"]["norm"])
        np.testing.assert_allclose(found.class_token[image], token, rtol=1e-4, atol=1e-4)


def test_what_a_classifier_answers_does_not_depend_on_it():
    options = {"reducer": "mergence", "pool": "mean", "keep": 0.6}
    model, variables, images = make(DENSE, **options)
    other = model.clone(unmerge="residual")
    found, expected = (jitted.apply(m, variables, images).logits for m in (other, model))
    np.testing.assert_array_equal(found, expected)


def test_an_unknown_way_is_told_when_the_model_is_made():
    with pytest.raises(msvit_jax.errors.UserError, match=r"unmerge.*'copy'"):
        msvit_jax.create_model("vit", unmerge="copies")
