"""Every registered model answers what the library asks a model, and nothing else is asked."""

import ast
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import msvit_jax
from msvit_jax.models.interface import ImageModel

PACKAGE = pathlib.Path(msvit_jax.__file__).parent
MEMBERS = {name for name in vars(ImageModel) if not name.startswith("_")}


@pytest.mark.parametrize("name", msvit_jax.list_models())
def test_every_registered_model_has_the_interface(name):
    model = msvit_jax.create_model(name, num_classes=7)
    assert isinstance(model, ImageModel)
    assert model.num_classes == 7
    assert model.max_tokens == model.grid_size**2 <= model.max_capacity
    assert model.has_gate == (model.region_grid is not None) == (model.gate is not None)
    assert model.num_regions == int(np.prod(model.region_grid or 0))
    assert model.is_cascade == (len(model.exit_tokens) > 1) == name.startswith("dvt")
    assert model.exit_tokens[-1] == model.max_tokens
    assert (np.diff(model.exit_macs()) > 0).all()
    np.testing.assert_array_equal(model.macs(model.exit_tokens), model.exit_macs())
    assert bool(model.reductions) == name.startswith("mergence")
    model.check_layout()
    assert model.packing_layout.kind == model.layout == "slots"


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "msvit_tiny_patch16_224", "mergence", "dvt_deit_small"]
)
def test_copies_with_another_backbone_or_layout_change_nothing_else(name):
    model = msvit_jax.create_model(name)
    half = model.with_backbone(dtype=jnp.bfloat16)
    assert (type(half), half.backbone.dtype) == (type(model), jnp.bfloat16)
    assert half.with_backbone(dtype=model.backbone.dtype) == model
    assert model.with_dense_layout() == model


def test_the_dense_layout_has_room_for_every_image():
    model = msvit_jax.create_model("msvit_tiny_patch16_224", layout="budget", token_capacity=99)
    assert model.with_dense_layout().layout == "slots"


def test_a_fixed_share_leaves_no_threshold():
    name = "msvit_tiny_patch16_224"
    assert msvit_jax.create_model(name).has_threshold
    assert not msvit_jax.create_model(name, fine_share=0.3).has_threshold
    assert not msvit_jax.create_model("vit").has_threshold


def questions(path):
    """Names that a module asks for by getattr or hasattr, and calls of inspect.signature."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else None
        if called in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):
            yield node.args[1].value
        if isinstance(node.func, ast.Attribute) and node.func.attr == "signature":
            yield "signature"


def test_nobody_asks_a_model_what_it_is_in_another_way():
    asked = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for name in questions(path)
        if name in {*MEMBERS, "fine_share", "scan_layers", "signature"}
    }
    assert asked <= {("data/sources.py", "num_classes")}  # of a data set's labels
