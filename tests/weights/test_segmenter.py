"""The official Segmenter's names: every parameter in and out, and what does not fit."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file
from scipy.special import erf, softmax

from msvit_jax import create_model, weights
from msvit_jax.errors import UserError
from msvit_jax.export import ExportBundle, formats, write
from msvit_jax.tree import flat_names
from msvit_jax.weights import adapt, loading
from tests.weights.saved import torch_save

SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
MASK = {
    **{"decoder.cls_emb": (1, 5, 16), "decoder.proj_dec.weight": (16, 16)},
    **{"decoder.proj_patch": (16, 16), "decoder.proj_classes": (16, 16)},
    **{"decoder.blocks.1.attn.qkv.weight": (48, 16), "decoder.blocks.0.mlp.fc1.weight": (64, 16)},
    **{"decoder.decoder_norm.weight": (16,), "decoder.mask_norm.bias": (5,)},
}


@functools.cache
def segmenter(encoder="vit", decoder="mask", classes=5, **options):
    return create_model(
        "segmenter", encoder=encoder, decoder=decoder, num_classes=classes, **SIZES, **options
    )


@functools.cache
def flat(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = flat_names(adapt.model_shapes(model))
    return {name: rng.standard_normal(s.shape, np.float32) for name, s in shapes.items()}


def state(model):
    return weights.to_theirs("segmenter", flat(model), model)


@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"scan_layers": True}], ids=str)
@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_every_parameter_comes_back(decoder, options):
    model = segmenter(decoder=decoder, **options)
    theirs = state(model)
    assert theirs["encoder.patch_embed.proj.weight"].shape == (16, 3, 4, 4)
    assert theirs["encoder.blocks.1.attn.qkv.weight"].shape == (48, 16)
    expected = MASK if decoder == "mask" else {"decoder.head.weight": (5, 16)}
    assert {name: theirs[name].shape for name in expected} == expected
    found = loading.convert(theirs, model)
    assert (found.format, found.unused) == ("segmenter", ())
    assert found.flat.keys() == flat(model).keys()
    for name, x in flat(model).items():
        np.testing.assert_array_equal(found.flat[name], x, err_msg=name)


def official(x, named, norm_epsilon=1e-5):
    """The official mask transformer with one head, by its own names: [N, D] -> [N, classes]."""

    def dense(x, name):
        return x @ named[f"{name}.weight"].T + named[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm_epsilon)
        return x * named[f"{name}.weight"] + named[f"{name}.bias"]

    x = np.concatenate([dense(x, "decoder.proj_dec"), named["decoder.cls_emb"][0]])
    for layer in range(2):
        block = f"decoder.blocks.{layer}"
        q, k, v = np.split(dense(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"), 3, axis=-1)
        x = x + dense(softmax(q @ k.T / np.sqrt(16), axis=-1) @ v, f"{block}.attn.proj")
        hidden = dense(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + dense(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, f"{block}.mlp.fc2")
    x = norm(x, "decoder.decoder_norm")
    patches, classes = x[:-5] @ named["decoder.proj_patch"], x[-5:] @ named["decoder.proj_classes"]
    patches, classes = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (patches, classes))
    return norm(patches @ classes.T, "decoder.mask_norm")


def test_the_decoder_computes_what_the_official_one_does_with_these_names():
    model = segmenter()
    small = {name: 0.3 * x for name, x in flat(model).items()}
    named = weights.to_theirs("segmenter", small, model)
    x = np.random.default_rng(1).normal(size=(1, 16, 16)).astype(np.float32)
    inner = {n.removeprefix("decoder/"): a for n, a in small.items() if n.startswith("decoder/")}
    decoder = model._decoder(parent=None)
    run = jax.jit(lambda p, x: decoder.apply({"params": p}, x, train=False))
    found = run(unflatten_dict(inner, sep="/"), x)
    expected = official(x[0].astype(np.float64), named)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_the_official_training_is_recognized(tmp_path):
    """The model below "model", the encoder's head over ImageNet's classes, an optimizer beside."""
    model = segmenter()
    theirs = state(model)
    heads = {
        "encoder.head.weight": np.ones((1000, 16), np.float32),
        "encoder.head.bias": np.ones(1000, np.float32),
    }
    held = {f"model.{name}": x for name, x in {**theirs, **heads}.items()}
    momentum = {"optimizer.state.0.momentum_buffer": np.ones(3, np.float32)}
    file = tmp_path / "checkpoint.pth"
    torch_save(file, {**held, **momentum})
    found = weights.load(file, model)
    assert found.format == "segmenter"
    assert set(heads) < set(found.unused)
    assert any("optimizer" in name for name in found.unused)
    for name, x in flat(model).items():
        np.testing.assert_array_equal(found.flat[name], x, err_msg=name)
    named = loading.load_model(file, segmenter())
    jax.tree.map(np.testing.assert_array_equal, flat_names(named.params), flat(model))


def test_a_mixed_scale_segmenter_takes_encoder_and_decoder_and_starts_its_gate():
    plain, mixed = segmenter(), segmenter("msvit")
    taken, report = loading.convert(state(plain), mixed).adapt_to(adapt.model_shapes(mixed))
    for name, x in flat(plain).items():
        place = name if name.startswith("decoder/") else f"backbone/{name}"
        np.testing.assert_array_equal(taken[place], x, err_msg=name)
    assert {name.split("/")[0] for name in report.fresh} == {"gate_mlp"}
    there = state(mixed)
    assert there.keys() == state(plain).keys()
    kernel = flat(mixed)["backbone/blocks_0/attn/qkv/kernel"]
    np.testing.assert_array_equal(there["encoder.blocks.0.attn.qkv.weight"], kernel.T)


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_other_classes_start_fresh(decoder):
    model = segmenter(decoder=decoder, classes=3)
    there = loading.convert(state(segmenter(decoder=decoder)), model)
    taken, report = there.adapt_to(adapt.model_shapes(model))
    own = {"linear": {"head"}, "mask": {"class_embed", "mask_norm"}}[decoder]
    assert {name.split("/")[1].split(" ")[0] for name in report.fresh} == own
    assert all("5 classes in the source, 3 here" in name for name in report.fresh)
    assert "patch_embed/proj/kernel" in taken


def test_a_classifiers_file_gives_the_encoder_alone():
    classifier = create_model("vit", num_classes=4, **SIZES)
    theirs = weights.to_theirs("timm", flat(classifier), classifier)
    found = loading.convert(theirs, segmenter())
    assert found.format == "timm"
    _, report = found.adapt_to(adapt.model_shapes(segmenter()))
    assert {name.split("/")[0] for name in report.fresh} == {"decoder"}
    # And the same below "encoder.", as a part of something that is no segmenter.
    inside = {f"encoder.{name}": x for name, x in theirs.items()}
    assert loading.convert(inside, segmenter()).format == "timm"


def test_misfits_are_told():
    with pytest.raises(UserError, match=r"misfits(.|\n)*decoder\.proj_dec\.weight: missing"):
        loading.convert(state(segmenter(decoder="linear")), segmenter())
    with pytest.raises(UserError, match=r"misfits(.|\n)*decoder\.blocks\.1\.\S*: unexpected"):
        loading.convert(state(segmenter()), segmenter(decoder_depth=1))
    wide = create_model("segmenter", num_classes=5, **{**SIZES, "width": 32})
    with pytest.raises(UserError, match=r"encoder\.norm\.weight: \(16,\) in the source, \(32,\)"):
        loading.convert(state(segmenter()), wide)
    classifier = create_model("vit", num_classes=4, **SIZES)
    with pytest.raises(UserError, match="segmenter does not fit: this model has no decoder"):
        loading.convert(state(segmenter()), classifier)
    with pytest.raises(UserError, match="segmenter has no encoder with register_tokens=2"):
        weights.to_theirs("segmenter", {}, segmenter(register_tokens=2))


def bundle(encoder):
    model = segmenter(encoder)
    options = {"encoder": encoder, "decoder": "mask", "num_classes": 5, **SIZES}
    return ExportBundle("segmenter", options, flat(model))


def test_an_export_has_what_the_official_code_wants_to_find(tmp_path):
    left_out = write(bundle("msvit"), "segmenter", tmp_path / "out.safetensors")
    assert left_out.startswith("gate_mlp (")
    held = load_file(tmp_path / "out.safetensors")
    assert held["encoder.head.weight"].shape == (1000, 16)
    assert {name.split(".")[0] for name in held} == {"encoder", "decoder"}
    found = weights.load(tmp_path / "out.safetensors", segmenter())
    assert found.format == "segmenter"
    np.testing.assert_array_equal(
        found.flat["decoder/class_embed"], flat(segmenter("msvit"))["decoder/class_embed"]
    )


def test_formats_of_classifiers_say_that_the_decoder_is_left_out(tmp_path):
    told = write(bundle("vit"), "timm", tmp_path / "out.safetensors")
    assert told.startswith("decoder (")
    assert formats.trunk_names(["decoder/head/kernel", "norm/scale"], "", "timm") == ["norm/scale"]
