"""The model is found whatever it was wrapped in, by one rule for every kind of file."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from msvit_jax import Predictor, create_model, weights
from msvit_jax.errors import UserError
from msvit_jax.tree import flat_names
from msvit_jax.weights import adapt, loading, wrappers
from tests.weights.saved import namespace, torch_save

OPTIONS = {"width": 16, "depth": 2, "heads": 2, "num_classes": 3, "image_size": 16, "patch_size": 4}


@functools.cache
def model(**changes):
    return create_model("vit_tiny_patch16_224", **{**OPTIONS, **changes})


def flat(seed=0):
    rng = np.random.default_rng(seed)
    shapes = flat_names(adapt.model_shapes(model()))
    return {name: rng.standard_normal(s.shape, np.float32) for name, s in shapes.items()}


def state(form="timm", seed=0):
    return weights.to_theirs(form, flat(seed), model())


def prefixed(arrays, prefix):
    return {prefix + name: x for name, x in arrays.items()}


def write(path, arrays):
    """Arrays with prefixes, in each kind of file."""
    if path.suffix == ".safetensors":
        save_file(arrays, path)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch_save(path, arrays)
    return path


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, dict(found), expected)


@pytest.mark.field(51, 53)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth", ".ckpt"])
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "state_dict.model._orig_mod.",
        "backbone.",
        "teacher.backbone.",
        "student.module.backbone.",
        "model_state_dict.",
        "net.",
        "visual.trunk.",
    ],
)
def test_prefixes_in_every_kind_of_file(tmp_path, suffix, prefix):
    path = write(tmp_path / f"w{suffix}", prefixed(state(), prefix))
    equal(weights.read(path, model()), flat())


@pytest.mark.parametrize("form", ["timm", "huggingface", "big_vision"])
@pytest.mark.parametrize("prefix", ["module.", "model.", "params/", "opt/target/"])
def test_prefixes_in_every_format(form, prefix):
    found = loading.convert(prefixed(state(form), prefix), model())
    assert (found.format, found.unused, found.notes) == (form, (), ())
    equal(found.flat, flat())


@pytest.mark.parametrize("prefix", ["params/", "model/", "module/", "ema_params/"])
def test_our_own_names(prefix):
    equal(loading.convert(prefixed(flat(), prefix), model()).flat, flat())
    mixed = create_model("msvit_tiny_patch16_224", **OPTIONS)
    shapes = flat_names(adapt.model_shapes(mixed))
    ours = {name: np.ones(s.shape, np.float32) for name, s in shapes.items()}
    equal(loading.convert(prefixed(ours, prefix), mixed).flat, ours)


@pytest.mark.field(49, 56)
@pytest.mark.parametrize(
    "key",
    [
        *("state_dict", "model", "model_state_dict", "net", "model_ema", "state_dict_ema"),
        *("teacher", "student"),
    ],
)
def test_keys_of_nested_mappings(tmp_path, key):
    content = {key: state(), "epoch": 7, "args": namespace(lr=0.1), "optimizer": {"state": {}}}
    equal(weights.read(torch_save(tmp_path / "w.pth", content), model()), flat())


@pytest.mark.field(54)
def test_a_trainers_whole_checkpoint(tmp_path):
    content = {
        "epoch": 7,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(state(), "model."),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_path": "last.ckpt"}},
        "optimizer_states": [{"state": {0: {"exp_avg": np.ones(2)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-3},
    }
    for name in ("w.ckpt", "w.pth"):
        equal(weights.read(torch_save(tmp_path / name, content), model()), flat())


@pytest.mark.field(50, 55)
@pytest.mark.parametrize(
    ("wins", "loses"),
    [
        ("state_dict_ema", "state_dict"),
        ("model_ema", "model"),
        ("state_dict_ema", "model_ema"),  # timm's order
        ("model_ema", "state_dict"),
        ("teacher.backbone", "student.backbone"),
        ("state_dict", "model"),
    ],
)
def test_of_two_models_the_average_wins_and_it_is_said(tmp_path, wins, loses):
    for order in ((wins, loses), (loses, wins)):
        arrays = {}
        for key in order:
            arrays |= prefixed(state(seed=0 if key == wins else 1), f"{key}.")
        found = weights.load(write(tmp_path / "w.safetensors", arrays), model())
        equal(found.flat, flat(0))
        average = "the average " if wins.split(".")[0] in wrappers.AVERAGES else ""
        assert found.notes == (f"{average}{wins!r} was taken, not {loses!r}",)
        assert found.unused == (f"{loses.split('.')[0]} ({len(state())} arrays)",)


@pytest.mark.parametrize("keys", [("first", "second"), ("", "teacher"), ("model", "critic")])
def test_models_that_no_rule_chooses_between_are_refused(keys):
    arrays = {}
    for key in keys:
        arrays |= prefixed(state(), f"{key}." if key else "")
    with pytest.raises(UserError, match=r"several models: below .*Save the one you mean"):
        loading.convert(arrays, model())


def test_a_name_with_and_without_its_wrapper_is_refused():
    with pytest.raises(UserError, match=r"module\.\S+ is there twice"):
        loading.convert(state() | prefixed(state(), "module."), model())


def test_a_head_beside_its_backbone_is_taken():
    arrays = {f"{'' if n.startswith('head.') else 'backbone.'}{n}": x for n, x in state().items()}
    equal(loading.convert(arrays, model()).flat, flat())
    dino = prefixed(state(), "student.backbone.") | {"student.head.mlp.0.weight": np.ones((3, 3))}
    found = loading.convert(dino, model())
    assert found.unused == ("student.head.mlp.0.weight",)
    equal(found.flat, flat())


def test_what_lies_beside_a_model_is_told_in_groups():
    arrays = prefixed(state(), "model.") | {f"optimizer.{i}": np.ones(2) for i in range(5)}
    assert loading.convert(arrays, model()).unused == ("optimizer (5 arrays)",)
    moments = prefixed(state("big_vision"), "params/") | prefixed(state("big_vision", 1), "opt/mu/")
    equal(loading.convert(moments, model()).flat, flat())


def test_counters_and_indices_are_no_parameters():
    extras = {
        "logit_scale": np.float32(2.0),
        "norm.num_batches_tracked": np.array(4),
        "relative_position_index": np.arange(16).reshape(4, 4),
    }
    found = loading.convert(state() | extras, model())
    assert sorted(found.unused) == sorted(extras)
    equal(found.flat, flat())
    quantized = state() | {"head.weight": np.ones((3, 16), np.int8)}
    with pytest.raises(UserError, match=r"head\.weight is of int8.*before it was quantized"):
        loading.convert(quantized, model())


def test_what_cannot_be_read_lists_what_the_file_holds(tmp_path):
    content = {"optimizer": {"state": {i: {"exp_avg": np.ones(2)} for i in range(3)}}, "epoch": 3}
    path = torch_save(tmp_path / "w.pth", content)
    with pytest.raises(UserError, match=r"w\.pth.*: optimizer \(3 arrays\), epoch$"):
        weights.read(path, model())
    save_file({"layer1.0.weight": np.ones(2), "fc.weight": np.ones(2)}, tmp_path / "r.safetensors")
    with pytest.raises(UserError, match=r"formats.*: fc\.weight, layer1\.0\.weight$"):
        weights.read(tmp_path / "r.safetensors", model())


@pytest.mark.fault(4)
@pytest.mark.field(25)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.bias", "head.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, name, value):
    broken = state()
    broken[name] = broken[name].copy()
    broken[name].flat[1] = value
    path = write(tmp_path / "w.safetensors", broken)
    wanted = rf"w\.safetensors.*{name} holds 1 values of \d+ that are"
    for read in (weights.read, weights.load_model):
        with pytest.raises(UserError, match=wanted):
            read(path, model())
    beyond = state() | {name: state()[name].astype(np.float64) * 1e39}
    with pytest.raises(UserError, match="beyond float32"):
        loading.convert(beyond, model())


def test_a_head_of_zeros_is_told():
    zeros = {n: np.zeros_like(x) if n.startswith("head") else x for n, x in state().items()}
    assert loading.convert(zeros, model()).notes == (
        "head/kernel is all zeros: every class gets the same answer",
    )


@pytest.mark.field(72)
def test_files_that_are_missing_are_said_to_be():
    path, missing = "/nowhere/typo.safetensors", r"no weights file or workdir '/nowhere/typo\.safet"
    with pytest.raises(UserError, match=missing):
        weights.read(path, model())
    with pytest.raises(UserError, match=missing):
        Predictor.load(path, model=model())
