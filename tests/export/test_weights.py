"""Weights in every format: names, metadata, what is left out, and outputs that are whole or not."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file

from msvit_jax import weights
from msvit_jax.errors import UserError
from msvit_jax.export import FORMATS, Options, formats, write
from msvit_jax.export.writing import check
from msvit_jax.weights import ours
from tests.export import made

GATED = "msvit_tiny_patch16_224"


def _metadata(path):
    with safe_open(path, "numpy") as file:
        return dict(file.metadata())


def _same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_our_file_tells_how_to_build_its_model(tmp_path):
    source = made.source(GATED, gate_bias=0.5, dtype="bfloat16")
    assert write(source, "safetensors", tmp_path / "model.safetensors") == ""
    _same(load_file(tmp_path / "model.safetensors"), source.params)
    about = json.loads(_metadata(tmp_path / "model.safetensors")["msvit_jax"])
    assert about["model"] == {
        **{"name": GATED, "gate_bias": 0.5, "dtype": "bfloat16"},
        **made.SIZES,
    }
    assert about["mean"] == about["std"] == [0.5, 0.5, 0.5]
    assert about["class_names"] == list(made.NAMES)
    assert ours.build_model(weights.describe(tmp_path / "model.safetensors")) == source.model


def test_orbax_alone_reads_the_parameters(tmp_path):
    source = made.source("dvt_deit_small")
    write(source, "orbax", tmp_path / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "params")
        about = checkpointer.metadata(tmp_path / "params").custom_metadata
    assert set(tree) == {"params"}
    _same(flatten_dict(tree["params"], sep="/"), source.params)
    assert about["model"]["name"] == "dvt_deit_small"


@pytest.mark.parametrize("form", ["timm", "big_vision"])
@pytest.mark.parametrize("scan", [False, True])
def test_a_plain_model_comes_back_from_every_format(form, scan, tmp_path):
    source = made.source("vit_tiny_patch16_224", depth=2, scan_layers=scan)
    path = tmp_path / f"vit{FORMATS[form].suffix}"
    assert write(source, form, path) == ""
    _same(weights.read(path, source.model), source.params)


def test_a_cascade_by_its_official_names(tmp_path):
    source = made.source("dvt_deit_small", grid_sizes=(1, 2, 4))
    write(source, "dvt", tmp_path / "dvt.safetensors")
    held = load_file(tmp_path / "dvt.safetensors")
    assert held["less_less_token.cls_token"].shape == (1, 1, 16)
    _same(weights.read(tmp_path / "dvt.safetensors", source.model), source.params)


@pytest.mark.parametrize(
    ("name", "options", "left_out"),
    [
        (GATED, {"scale_embedding": True}, "gate_mlp (9 arrays), scale_embed (1 arrays)"),
        (
            *("mergence_tiny_patch16_224", {"scales": (2, 4), "reduce_layers": (1,)}),
            "scale_2 (4 arrays), reducer='mergence', which has no parameters",
        ),
    ],
)
def test_the_trunk_goes_to_timm_and_the_rest_is_named(name, options, left_out, tmp_path):
    source = made.source(name, **options)
    assert write(source, "timm", tmp_path / "trunk.safetensors") == left_out
    held = load_file(tmp_path / "trunk.safetensors")
    qkv = source.params["backbone/blocks_0/attn/qkv/kernel"]
    np.testing.assert_array_equal(held["blocks.0.attn.qkv.weight"], qkv.T)
    assert not [key for key in held if "gate" in key or "scale" in key]
    metadata = _metadata(tmp_path / "trunk.safetensors")
    assert metadata["format"] == "pt"
    assert json.loads(metadata["msvit_jax"])["model"]["name"] == name
    arguments = json.loads(metadata["timm"])
    assert {k: arguments[k] for k in ("img_size", "patch_size", "embed_dim", "depth")} == {
        **{"img_size": made.SIDE, "patch_size": 4, "embed_dim": 16, "depth": 1}
    }


KINDS = [
    ("vit_tiny_patch16_224", {}, "vit", "ViTForImageClassification"),
    (GATED, {"gelu": "tanh"}, "vit", "ViTForImageClassification"),
    ("deit_tiny_distilled_patch16_224", {}, "deit", "DeiTForImageClassificationWithTeacher"),
    ("vit_small_patch14_dinov2", {}, "dinov2", "Dinov2ForImageClassification"),
    (
        *("vit_small_patch14_reg4_dinov2", {}),
        *("dinov2_with_registers", "Dinov2WithRegistersForImageClassification"),
    ),
]


@pytest.mark.parametrize(("name", "options", "kind", "architecture"), KINDS)
def test_a_directory_for_from_pretrained(name, options, kind, architecture, tmp_path):
    source = made.source(name, **options)
    write(source, "huggingface", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (kind, [architecture])
    assert config["hidden_size"] == 16
    assert config["hidden_act"] == ("gelu_pytorch_tanh" if options else "gelu")
    assert config["id2label"] == {"0": "ant", "1": "bee", "2": "cat"}
    assert config["label2id"] == {"ant": 0, "bee": 1, "cat": 2}
    pixels = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert pixels["crop_size"] == {"height": 16, "width": 16}
    assert pixels["image_mean"] == list(source.model.mean)
    held = load_file(tmp_path / "model" / "model.safetensors")
    assert held[f"{kind}.embeddings.cls_token"].shape == (1, 1, 16)
    assert (f"{kind}.embeddings.mask_token" in held) == ("dinov2" in kind)
    if not options:
        _same(weights.read(tmp_path / "model", source.model), source.params)


BAD = [
    ("tim", "out.safetensors", Options(), "no format 'tim'. Did you mean 'timm'?"),
    ("timm", "out.npz", Options(), "--format=timm makes a .safetensors file"),
    ("big_vision", "out", Options(), "--format=big_vision makes a .npz file"),
    ("orbax", "out", Options(layout="slots"), "layout: only functions have such options"),
    ("orbax", "there", Options(), "exists and is left as it is"),
    ("compiled", "there", Options(), "exists and is left as it is"),
]


@pytest.mark.parametrize(("form", "out", "options", "message"), BAD)
def test_what_is_wrong_is_told_before_anything_is_read(form, out, options, message, tmp_path):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UserError) as caught:
        check(form, tmp_path / out, options)
    assert message in str(caught.value)
    with pytest.raises(UserError):
        write(made.source("vit_tiny_patch16_224"), form, tmp_path / out, options)
    assert (tmp_path / "there").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.field(99)
def test_formats_that_are_not_there_are_told_with_those_that_are(tmp_path):
    for name in ("savedmodel", "tflite"):
        with pytest.raises(UserError, match=rf"no format '{name}'.* formats are .*compiled, onnx"):
            check(name, tmp_path / "out")


MISFITS = [
    ("t2t_vit_12", {}, "timm", "no T2T-ViT"),
    ("dvt_deit_small", {}, "huggingface", "this model is a cascade"),
    ("vit_tiny_patch16_224", {}, "dvt", "this model is not a cascade"),
    ("vit_tiny_patch16_224", {"pool": "mean"}, "huggingface", "not with pool='mean'"),
    ("deit_tiny_distilled_patch16_224", {}, "big_vision", "distilled"),
]


@pytest.mark.parametrize(("name", "options", "form", "message"), MISFITS)
def test_a_model_without_names_in_a_format_is_refused(name, options, form, message, tmp_path):
    out = tmp_path / f"out{FORMATS[form].suffix}"
    with pytest.raises(UserError, match=message):
        write(made.source(name, **options), form, out)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(formats, "_write_json", broken)
    source = made.source("vit_tiny_patch16_224")
    with pytest.raises(OSError, match="no space"):
        write(source, "huggingface", tmp_path / "new" / "model")
    assert not list((tmp_path / "new").iterdir())


def test_what_somebody_else_made_meanwhile_stays(tmp_path, monkeypatch):
    out = tmp_path / "model"
    monkeypatch.setattr(formats, "_write_json", lambda *_: out.write_text("theirs"))
    with pytest.raises(UserError, match="by another process"):
        write(made.source("vit_tiny_patch16_224"), "huggingface", out)
    assert out.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
