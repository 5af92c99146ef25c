"""The Predictor against one plain forward pass of the same model in slots."""

import concurrent.futures
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import msvit_jax
from msvit_jax import sharding
from msvit_jax.errors import UserError
from msvit_jax.inference import Predictor
from msvit_jax.models import MSViT
from msvit_jax.pixels import normalize
from tests import jitted

SIDE, REGIONS, GRID, POOL = 32, 16, 64, 40
OPTIONS = {"image_size": SIDE, "patch_size": 4, "width": 16, "depth": 1, "heads": 2}
# Name -> options and devices. Batches of three lengths, all layouts, one device and eight.
KINDS = {
    "slots": ({"layout": "slots", "batch_size": 16}, 8),
    "budget": ({"layout": "budget", "batch_size": 8, "buckets": (24, 40)}, 8),
    "rows": ({"layout": "rows", "batch_size": 16, "row_width": 66, "max_programs": 8}, 8),
    "rows, one device": ({"layout": "rows", "batch_size": 5, "max_programs": 8}, 1),
    "auto": ({"batch_size": 6, "buckets": (30, 45), "max_programs": 11}, 2),
}


def _mesh(devices):
    return sharding.make_mesh(devices=jax.devices()[:devices])


@functools.cache
def _pool():
    """Images from even to noisy, region by region."""
    rng = np.random.default_rng(0)
    contrast = rng.uniform(0, 1, (POOL, 4, 1, 4, 1, 1)) ** 2
    noise = rng.integers(-120, 120, (POOL, 4, 8, 4, 8, 3))
    return (128 + contrast * noise).astype(np.uint8).reshape(POOL, SIDE, SIDE, 3)


def _larger(variables):
    """Random weights made larger, so that decisions and logits differ between images."""

    def larger(path, x):
        name = jax.tree_util.keystr(path)
        if "fc4" in name:
            return 20 * x
        return 4 * x if "kernel" in name and "gate_mlp" not in name else x

    return jax.tree_util.tree_map_with_path(larger, variables)


@functools.cache
def _model(**changes):
    options = {"num_classes": 5, "gate_bias": 0.0, **OPTIONS, **changes}
    return msvit_jax.create_model("msvit_tiny_patch16_224", **options)


@functools.cache
def _variables():
    zeros = jnp.zeros((1, SIDE, SIDE, 3))
    return _larger(jitted.init(_model(), zeros, seed=1))


@functools.cache
def _forward(**changes):
    model = _model(**changes)

    def apply(variables, images, **threshold):
        images = normalize(images, model.mean, model.std)
        return model.apply(variables, images, train=False, **threshold)

    return jax.jit(apply)


@functools.cache
def _expected(threshold=None, **changes):
    """Output for the pool, all at once, on one device."""
    given = {} if threshold is None else {"threshold": jnp.float32(threshold)}
    return jax.device_get(_forward(**changes)(_variables(), _pool(), **given))


@functools.cache
def _thresholds():
    """Some that give few, middling and many tokens, clear of all probabilities."""
    logits = np.sort(_expected(0.5).gate.logits, axis=None)
    between = np.argsort(np.diff(logits))[-200:]  # the widest gaps
    places = [between[np.abs(between - share * logits.size).argmin()] for share in (0.2, 0.5, 0.8)]
    return [float(jax.nn.sigmoid((logits[p] + logits[p + 1]) / 2)) for p in places]


@functools.cache
def _predictor(kind):
    options, devices = KINDS[kind]
    return Predictor(_model(), _variables(), mesh=_mesh(devices), **options)


def _check(predictions, expected, indices):
    np.testing.assert_array_equal(predictions.tokens, expected.tokens[indices])
    np.testing.assert_allclose(predictions.logits, expected.logits[indices], atol=1e-4, rtol=1e-4)
    coarse = predictions.coarse.reshape(len(indices), -1)
    np.testing.assert_array_equal(coarse, expected.gate.coarse[indices] == 1)
    probability = predictions.coarse_probability.reshape(len(indices), -1)
    np.testing.assert_allclose(
        probability, jax.nn.sigmoid(expected.gate.logits[indices]), atol=1e-5
    )


def test_the_pool_tells_wrong_answers_from_right_ones():
    for threshold in _thresholds():
        expected = _expected(threshold)
        assert len(np.unique(expected.tokens)) > 5
    distance = np.abs(expected.logits[:, None] - expected.logits[None]).max(-1)
    assert distance[~np.eye(POOL, dtype=bool)].min() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(data=st.data())
def test_answers_depend_on_the_image_alone(kind, data):
    indices = data.draw(st.lists(st.integers(0, POOL - 1), min_size=1, max_size=POOL))
    threshold = data.draw(st.sampled_from(_thresholds()))
    predictor = _predictor(kind)
    predictor.threshold = threshold
    told = []
    predictions = predictor(_pool()[indices], progress=told.append)
    assert sum(told) == len(predictions) == len(indices)
    _check(predictions, _expected(threshold), indices)


@pytest.mark.parametrize("kind", ["budget", "rows"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_coarse_and_all_fine(kind, share):
    predictor = _predictor(kind)
    predictor.threshold = share * 2 - 0.5  # below, or above, all probabilities
    predictions = predictor(_pool()[:11])
    assert set(predictions.tokens) == {GRID if share else REGIONS}
    _check(predictions, _expected(predictor.threshold), list(range(11)))


def test_normalized_floats_and_lists_are_the_same_images():
    model, predictor = _model(), _predictor("budget")
    predictor.threshold = _thresholds()[1]
    floats = np.asarray(normalize(jnp.asarray(_pool()[:9]), model.mean, model.std))
    for images in (floats, list(floats), jnp.asarray(floats), list(_pool()[:9])):
        _check(predictor(images), _expected(predictor.threshold), list(range(9)))


@pytest.mark.parametrize("devices", [1, 8])
def test_models_without_a_gate(devices):
    model = _model().backbone
    variables = {"params": _variables()["params"]["backbone"]}
    predictor = Predictor(model, variables, batch_size=8, mesh=_mesh(devices))
    predictions = predictor(_pool()[:11])
    images = normalize(jnp.asarray(_pool()[:11]), model.mean, model.std)
    expected = jitted.apply(model, variables, images).logits
    np.testing.assert_allclose(predictions.logits, expected, atol=1e-4)
    assert predictions.coarse is None
    assert predictions.merge_maps is None
    assert predictions.coarse_probability is None
    assert set(predictions.tokens) == {GRID}
    assert predictor.programs[0] == "normalize"
    assert predictor.programs[-1] == "dense"
    assert predictor.threshold is None
    for change in (
        lambda: predictor.calibrate(_pool(), 30),
        lambda: Predictor(model, variables, threshold=0.3),
        lambda: setattr(predictor, "threshold", 0.3),
    ):
        with pytest.raises(UserError, match="no gate with a threshold"):
            change()


REDUCED = {"depth": 2, "reduce_layers": (1, 2), "keep": 0.6}


@pytest.mark.parametrize(
    ("name", "reducer"),
    [
        ("mergence_tiny_patch16_224", "mergence"),
        ("vit_tiny_patch16_224", "topk"),
        ("vit_tiny_patch16_224", "tome"),
    ],
)
def test_models_that_reduce_tokens(name, reducer):
    scales = {"scales": (4, 8)} if name.startswith("mergence") else {}
    options = {**OPTIONS, **REDUCED, **scales, "num_classes": 5, "reducer": reducer}
    model = msvit_jax.create_model(name, **options)
    variables = _larger(jitted.init(model, jnp.zeros((1, SIDE, SIDE, 3))))
    images = normalize(jnp.asarray(_pool()[:11]), model.mean, model.std)
    expected = jax.jit(model.apply)(variables, images)
    predictions = Predictor(model, variables, batch_size=4, mesh=_mesh(2))(_pool()[:11])
    np.testing.assert_allclose(predictions.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert set(predictions.tokens) == {GRID}
    assert predictions.merge_maps.shape == (11, 2, 8, 8)
    for stage, (places, hosts) in enumerate(
        zip(expected.merge_positions, expected.merge_targets, strict=True)
    ):
        merged = predictions.merge_maps[:, stage].reshape(11, GRID)
        np.testing.assert_array_equal(merged, hosts)
        np.testing.assert_array_equal(merged == -1, places == -1)


@functools.cache
def _reducing():
    """A mixed-scale model that reduces tokens, its variables, and its output in slots."""
    model = _model(**REDUCED, reducer="mergence")
    zeros = jnp.zeros((1, SIDE, SIDE, 3))
    variables = _larger(jitted.init(model, zeros, seed=1))
    images = normalize(jnp.asarray(_pool()[:9]), model.mean, model.std)
    return model, variables, jax.jit(model.apply)(variables, images)


@pytest.mark.parametrize(
    "options",
    [{"layout": "budget", "buckets": (40,)}, {"layout": "rows", "row_width": 66}],
    ids=["budget", "rows"],
)
def test_mixed_scale_models_that_reduce_tokens_answer_as_in_slots(options):
    model, variables, expected = _reducing()
    assert len(np.unique(expected.tokens)) > 2
    predictor = Predictor(model, variables, batch_size=4, mesh=_mesh(1), max_programs=8, **options)
    predictions = predictor(_pool()[:9])
    np.testing.assert_array_equal(predictions.tokens, expected.tokens)
    np.testing.assert_allclose(predictions.logits, expected.logits, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(predictions.merge_maps, expected.merge_maps((8, 8)))


def test_rows_cost_what_their_layers_leave():
    """A batch in rows costs less if layers reduce; without it as many full layers as before."""
    dense, reduced = (
        Predictor(_model(**change), None, layout="rows", mesh=_mesh(1), batch_size=8)
        for change in ({"depth": 2}, {**REDUCED, "reducer": "topk"})
    )
    for predictor in (dense, reduced):
        assert predictor._policy.shapes[-1].row_width == 128
    wide, narrow = (predictor._policy.shapes[-1].macs for predictor in (dense, reduced))
    block, alone = (4 * n * 16 * 16 + 2 * n * n * 16 + 2 * n * 16 * 64 for n in (128, 1))
    rest = float(_model(depth=2).macs(0)) - 2 * alone  # embeddings, gate and head
    assert wide == pytest.approx(8 * 2 * block + 8 * rest)
    assert narrow < 0.8 * wide


def test_a_gate_of_fixed_share_has_decisions_but_no_threshold():
    model = _model(fine_share=0.25)
    predictor = Predictor(model, _variables(), batch_size=8, layout="budget", mesh=_mesh(1))
    predictions = predictor(_pool()[:5])
    _check(predictions, _expected(fine_share=0.25), list(range(5)))
    assert set(predictions.tokens) == {REGIONS + 3 * 4}
    with pytest.raises(UserError, match="no gate with a threshold"):
        predictor.calibrate(_pool(), 30)


class Counting(MSViT):
    """Counts how often it is traced."""

    traces = 0

    def __call__(self, *arguments, **options):
        Counting.traces += 1
        return super().__call__(*arguments, **options)

    def gate_only(self, *arguments, **options):
        Counting.traces += 1
        return super().gate_only(*arguments, **options)


def test_programs_are_bounded_and_warm_up_leaves_nothing_to_compile():
    counting = Counting(_model().backbone, gate_bias=0.0)
    options, devices = KINDS["auto"]
    predictor = Predictor(counting, _variables(), mesh=_mesh(devices), **options)
    assert 5 < len(predictor.programs) == len(set(predictor.programs)) <= options["max_programs"]
    assert predictor.compiled == ()
    Counting.traces = 0
    predictor(_pool()[:2])
    assert 0 < Counting.traces < len(predictor.programs) - 5  # only what was needed
    predictor.warm_up()
    assert set(predictor.compiled) == set(predictor.programs)
    pixels = [name for name in predictor.programs if re.match("normalize|store|take", name)]
    assert Counting.traces == len(predictor.programs) - len(pixels)  # which are not the model
    for threshold, count in zip(_thresholds(), (1, 5, 40), strict=True):
        predictor.threshold = threshold
        predictor(_pool()[:count])
        predictor((_pool()[:count] / np.float32(255) - np.float32(0.5)) * 4)
    predictor.calibrate(_pool(), 40)
    assert Counting.traces == len(predictor.programs) - len(pixels)


def test_devices_do_not_wait_for_each_other():
    predictor = _predictor("auto").warm_up()
    # What a bucket holds comes from several batches, so its images do move between devices.
    for name in [n for n in predictor.programs if not n.startswith("store")]:
        text = predictor._executables._compiled[name].as_text()
        assert "num_partitions=2" in text
        assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text), name


def test_threads_share_a_predictor():
    options, devices = KINDS["budget"]
    predictor = Predictor(_model(), _variables(), mesh=_mesh(devices), **options)
    predictor.threshold = _thresholds()[1]
    rng = np.random.default_rng(0)
    parts = [rng.permutation(POOL)[:count].tolist() for count in (1, 7, 13, 20, 2, 40)]
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as threads:
        answers = list(threads.map(lambda part: predictor(_pool()[part]), parts))
    for part, predictions in zip(parts, answers, strict=True):
        _check(predictions, _expected(predictor.threshold), part)
    assert len(predictor.compiled) <= len(predictor.programs)


@pytest.mark.parametrize("tokens", [16, 25, 40, 63.9, 64])
def test_calibration_meets_the_budget(tokens):
    predictor = _predictor("auto")
    found = predictor.calibrate(_pool(), tokens)
    assert predictor.threshold == found.threshold
    assert found.images == POOL
    # As exact as whole regions of one image are, on probabilities that all differ.
    assert tokens - 3 / POOL < found.tokens <= tokens
    assert predictor(_pool()).tokens.mean() == pytest.approx(found.tokens)


def test_a_budget_out_of_reach_leaves_the_threshold():
    predictor = _predictor("auto")
    predictor.threshold = 0.3
    with pytest.raises(UserError, match=r"16 tokens .* 64 if it is fine"):
        predictor.calibrate(_pool(), 65)
    assert predictor.threshold == 0.3


def test_fitted_buckets_answer_alike_with_fewer_macs():
    predictor = Predictor(_model(), _variables(), batch_size=4, layout="budget", mesh=_mesh(1))
    predictor.calibrate(_pool(), 30)
    even, programs, before = predictor.buckets, predictor.programs, predictor(_pool())
    assert predictor.calibrate(_pool(), 30, fit_buckets=True).threshold == predictor.threshold
    assert len(predictor.programs) <= len(programs)
    assert set(predictor.compiled) < set(programs), "programs of other capacities are forgotten"
    after = predictor(_pool())
    assert set(predictor.compiled) <= set(predictor.programs)
    np.testing.assert_array_equal(after.tokens, before.tokens)
    np.testing.assert_allclose(after.logits, before.logits, rtol=1e-4, atol=1e-5)

    def padded(buckets):
        held = [min(size for size in buckets if size >= tokens) for tokens in after.tokens]
        return _model().macs(np.asarray(held)).sum()

    assert padded(predictor.buckets) < padded(even)


def test_layouts_without_buckets_have_none_to_fit():
    predictor = _predictor("rows")
    assert predictor.buckets == ()
    with pytest.raises(UserError, match="the others have none"):
        predictor.calibrate(_pool(), 30, fit_buckets=True)


def test_predictions_read_well():
    names = ("a", "b", "c", "d", "e")
    options, devices = KINDS["slots"]
    predictor = Predictor(_model(), _variables(), class_names=names, mesh=_mesh(devices), **options)
    predictions = predictor(_pool()[:4])
    expected = _expected(_model().threshold)
    np.testing.assert_allclose(predictions.probabilities, jax.nn.softmax(expected.logits[:4]), 1e-3)
    np.testing.assert_array_equal(predictions.labels, expected.logits[:4].argmax(1))
    assert predictions.names == [names[label] for label in predictions.labels]
    assert predictions.coarse.shape == predictions.coarse_probability.shape == (4, 4, 4)


BAD = [
    ({"layout": "rings"}, "layout='rings' is not one of auto, slots"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"buckets": (40, 65)}, "bucket of 65 tokens is not possible.*16 to 64 patch tokens"),
    ({"buckets": (15,)}, "bucket of 15 tokens"),
    ({"row_width": 64}, "row_width=64 is too small.*up to 65 tokens"),
    ({"layout": "budget", "max_programs": 8, "buckets": (20, 30)}, "too small by 1 .* 3 buckets"),
    ({"max_programs": 7, "buckets": (20,)}, "too small by 2 .* 2 buckets"),
    ({"class_names": ["a", "b"]}, "2 class names.*5 classes"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_end_in_a_message(options, message):
    with pytest.raises(UserError, match=message):
        Predictor(_model(), _variables(), mesh=_mesh(1), **options)
