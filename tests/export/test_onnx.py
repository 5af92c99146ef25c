"""ONNX graphs, run by onnxruntime, against the models."""

import functools
import importlib.util
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from msvit_jax.errors import UserError
from msvit_jax.export import Options, onnx_graphs, write
from msvit_jax.pixels import normalize
from tests.export import made

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
GATED = "msvit_tiny_patch16_224"
REDUCING = {"reduce_layers": (1,), "keep": 0.6}
# Model, its options, how it is exported.
KINDS = {
    "distilled, scanned": (
        "deit_tiny_distilled_patch16_224",
        {"scan_layers": True, "depth": 2},
        {},
    ),
    "mean": ("vit_tiny_patch16_224", {"pool": "mean", "class_token": False}, {}),
    "mergence": ("mergence_tiny_patch16_224", {"scales": (2, 4), **REDUCING}, {}),
    "tome": ("vit_tiny_patch16_224", {"reducer": "tome", **REDUCING}, {}),
    "algm": ("vit_tiny_patch16_224", {"reducer": "algm", "keep": 0.6}, {}),
    "evit": ("vit_tiny_patch16_224", {"reducer": "evit", **REDUCING}, {}),
    "share": (GATED, {"fine_share": 0.5}, {"pixels": "float32"}),
    "segmenter": (
        "msvit_seg_vit_tiny_mask",
        {"decode": "mixed"},
        {"layout": "budget", "token_capacity": 12},
    ),
    "budget": (
        GATED,
        {"reducer": "mergence", **REDUCING},
        {"layout": "budget", "token_capacity": 7},
    ),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function of a model's name, options and export options: the directory, exported once."""
    for name in (*onnx_graphs.PACKAGES, "onnxruntime"):
        pytest.importorskip(name)
    root = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def export(kind):
        name, options, given = KINDS[kind]
        write(made.source(name, **options), "onnx", root / kind, Options(**given))
        return root / kind

    return export


def _about(directory):
    return json.loads((directory / "about.json").read_text())


def _run(directory, name, *inputs):
    import onnxruntime

    path = directory / f"{name}.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = [each.name for each in session.get_inputs()]
    names = [each.name for each in session.get_outputs()]
    answers = session.run(None, dict(zip(wanted, map(np.asarray, inputs), strict=True)))
    return dict(zip(names, answers, strict=True))


def _expected(kind, images):
    name, options, _ = KINDS[kind]
    source = made.source(name, **options)
    model = source.model
    variables = {"params": unflatten_dict(source.params, sep="/")}
    apply = jax.jit(lambda v, x: model.apply(v, normalize(x, model.mean, model.std), train=False))
    return apply(variables, images)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.field(99) if k == "mean" else ()) for k in KINDS],
)
def test_a_graph_answers_batches_of_any_size_as_the_model(kind, exported):
    about = _about(exported(kind))
    graph = about["functions"][-1]  # where every image fits
    images = made.images().astype(about["pixels"])
    rest = [np.float32(0.5)] if "threshold" in graph["inputs"] else []
    answers = _run(exported(kind), graph["name"], images, *rest)
    expected = _expected(kind, images)
    np.testing.assert_allclose(answers["logits"], expected.logits, **CLOSE)
    assert list(answers) == list(graph["outputs"])
    if "merge_maps" in answers:
        side = 2 * (made.SIDE // 8)
        np.testing.assert_array_equal(answers["merge_maps"], expected.merge_maps((side, side)))
    if "tokens" in answers:
        np.testing.assert_array_equal(answers["tokens"], expected.tokens)
    alone = _run(exported(kind), graph["name"], images[3:4], *rest)
    np.testing.assert_allclose(alone["logits"], expected.logits[3:4], **CLOSE)


def test_what_does_not_fit_the_budget_is_told(exported):
    expected = _expected("budget", made.images())
    answers = _run(exported("budget"), "budget", made.images(), np.float32(0.5))
    fits = np.asarray(expected.tokens) <= 7
    assert 0 < fits.sum() < made.COUNT
    np.testing.assert_array_equal(answers["within_capacity"], fits)
    assert np.isnan(answers["logits"][~fits]).all()
    np.testing.assert_allclose(answers["logits"][fits], expected.logits[fits], **CLOSE)


def test_the_threshold_of_a_gate_is_an_input(exported):
    for threshold, tokens in ((-1.0, 4), (2.0, 16)):
        answers = _run(exported("budget"), "slots", made.images(), np.float32(threshold))
        np.testing.assert_array_equal(answers["tokens"], tokens)


def test_stages_of_a_cascade_hand_on_what_the_next_one_takes(exported, tmp_path):
    source = made.source("dvt_deit_small", grid_sizes=(2, 3, 4))
    write(source, "onnx", tmp_path / "out", Options(thresholds=(0.5, 0.4)))
    about = _about(tmp_path / "out")
    assert about["thresholds"] == [0.5, 0.4, 0.0]
    variables = {"params": unflatten_dict(source.params, sep="/")}
    model = source.model
    images = normalize(made.images(), model.mean, model.std)
    expected = jax.jit(functools.partial(model.apply, train=False))(variables, images).exit_logits
    handed = {}
    for stage, graph in enumerate(about["functions"]):
        wanted = [name.replace("before.", "handed.") for name in graph["inputs"]]
        assert wanted == ["images", *handed]
        handed = _run(tmp_path / "out", graph["name"], made.images(), *handed.values())
        np.testing.assert_allclose(handed.pop("logits"), expected[:, stage], **CLOSE)
    assert stage == 2
    assert not handed


def test_about(exported):
    about = _about(exported("budget"))
    assert (about["kind"], about["layout"], about["token_capacity"]) == ("mixed_scale", "budget", 7)
    assert about["class_names"] == list(made.NAMES)
    names = {entry["name"]: entry["file"] for entry in about["functions"]}
    assert names == {"budget": "budget.onnx", "slots": "slots.onnx"}
    assert about["functions"][0]["inputs"] == {
        "images": "uint8[b, 16, 16, 3]",
        "threshold": "float32[]",
    }
    assert about["functions"][0]["outputs"]["logits"] == "float32[b, 3]"
    assert max(about["checked"]["largest_difference"].values()) < 1e-5
    assert sorted(path.name for path in exported("budget").iterdir()) == [
        *("about.json", "budget.onnx", "slots.onnx")
    ]


def test_a_graph_that_answers_otherwise_is_not_written(exported, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_graphs, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"forward\.onnx: onnxruntime .* gives logits that differ"):
        write(made.source("deit_tiny_patch16_224"), "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_random_reduction_is_refused(exported, tmp_path):
    source = made.source("vit_tiny_patch16_224", reducer="random", **REDUCING)
    with pytest.raises(UserError, match="reducer='random' decides by the bits"):
        write(source, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_their_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs jax2onnx, .* pip install 'msvit-jax\[onnx\]'"):
        write(made.source("deit_tiny_patch16_224"), "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())
