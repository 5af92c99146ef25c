import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msvit_jax import create_model, labels
from msvit_jax.errors import UserError
from msvit_jax.losses import smooth
from msvit_jax.tree import flat_names
from tests import jitted
from tests.export import made

NAMES = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=6, unique=True)


def test_other_counts_are_refused_with_both():
    labels.check_count(3, 3)
    with pytest.raises(UserError, match=r"The teacher has 3 classes but the data set has 5"):
        labels.check_count(3, 5, of="The teacher")


@given(NAMES, st.randoms(use_true_random=False))
def test_names_in_another_order_are_brought_together_by_name_alone(names, random):
    data = random.sample(names, len(names))
    assert labels.order(names, names, labels.EXACTLY) is None
    assert labels.order(names, data, labels.BY_NUMBER) is None
    if data == names:
        return
    with pytest.raises(UserError, match=r"another order.*match_classes=by_name.*by_number"):
        labels.order(names, data, labels.EXACTLY)
    indices = labels.order(names, data, labels.BY_NAME)
    assert [names[place] for place in indices] == data


@pytest.mark.parametrize("how", [labels.EXACTLY, labels.BY_NAME])
def test_other_names_are_refused_and_both_named(how):
    with pytest.raises(UserError, match=r"'cat'.*against 'car'.*match_classes=by_number"):
        labels.order(("cat", "dog"), ("car", "dog"), how)


def test_names_that_are_not_known_are_not_compared():
    for unknown in ((), ("LABEL_0", "LABEL_1")):
        assert labels.order(unknown, ("cat", "dog"), labels.EXACTLY) is None
        assert labels.order(("cat", "dog"), unknown, labels.EXACTLY) is None


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "dvt_deit_small"])
def test_heads_in_another_order_answer_in_that_order(name):
    source = made.source(name)
    model, flat = source.model, source.params
    indices = np.asarray([2, 0, 1])
    images = made.images(2).astype(np.float32)
    tree = lambda flat: {"params": _tree(flat)}  # noqa: E731
    before = jitted.apply(model, tree(flat), images, train=False)
    after = jitted.apply(model, tree(labels.in_order(flat, indices)), images, train=False)
    np.testing.assert_array_equal(after.logits, np.asarray(before.logits)[:, indices])
    if before.exit_logits is not None:
        np.testing.assert_array_equal(
            after.exit_logits, np.asarray(before.exit_logits)[..., indices]
        )
    assert labels.in_order(flat, None) is flat


def _tree(flat):
    tree = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return tree


def test_heads_are_all_that_goes():
    model = create_model("msvit_tiny_patch16_224", **made.SIZES)
    images = np.zeros((1, 16, 16, 3), np.float32)
    flat = flat_names(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    gone = flat.keys() - labels.without_heads(flat).keys()
    assert gone == {"backbone/head/kernel", "backbone/head/bias"}


def test_a_label_that_is_no_class_makes_no_loss_of_zero():
    targets = np.asarray(smooth(np.asarray([0, 2, 3, -1]), 3, 0.1))
    np.testing.assert_allclose(targets[:2].sum(axis=1), 1, rtol=1e-6)
    assert np.isnan(targets[2:]).all()


def test_classes_of_a_mask_transformer_are_reordered_in_all_its_parameters():
    rng = np.random.default_rng(0)
    flat = {
        "decoder/class_embed": rng.normal(size=(3, 4)),
        "decoder/mask_norm/scale": rng.normal(size=3),
        "decoder/norm/scale": rng.normal(size=4),
        "decoder/head/kernel": rng.normal(size=(4, 3)),
    }
    found = labels.in_order(flat, np.asarray([2, 0, 1]))
    np.testing.assert_array_equal(
        found["decoder/class_embed"], flat["decoder/class_embed"][[2, 0, 1]]
    )
    for name in ("decoder/mask_norm/scale", "decoder/head/kernel"):
        np.testing.assert_array_equal(found[name], flat[name][..., [2, 0, 1]])
    np.testing.assert_array_equal(found["decoder/norm/scale"], flat["decoder/norm/scale"])
    assert set(labels.without_heads(flat)) == {"decoder/norm/scale"}
