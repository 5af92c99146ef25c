"""Every model in every format that can express it, and weights that do not fit."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from msvit_jax import Predictor, create_model, list_models, weights
from msvit_jax.errors import UserError
from msvit_jax.models.registry import CASCADES
from msvit_jax.tokens import grid
from msvit_jax.tree import flat_names
from msvit_jax.weights import adapt, loading

SMALL = {"width": 16, "depth": 2, "heads": 2, "num_classes": 3}
TINY = {**SMALL, "image_size": 16, "patch_size": 4}


def different_models():
    """One of each kind: of one width, the registry's sizes are the same."""
    names = sorted(set(list_models()) - set(CASCADES))
    made = {name: create_model(name, **SMALL) for name in names}
    return {(type(m), getattr(m, "backbone", m)): (name, m) for name, m in made.items()}.values()


def shapes_of(trunk):
    return flat_names(adapt.model_shapes(trunk))


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(s.shape, np.float32) for name, s in shapes.items()}


def cannot(name, form):
    """Why a format has no such model."""
    if form == "dvt":
        return "not a cascade"
    if "t2t" in name:
        return "no T2T-ViT"
    if "distilled" in name and form == "big_vision":
        return "no model with distilled=True"
    if "dinov2" in name and form == "big_vision":
        return "no model with (register_tokens|layer_scale)="
    return None


@pytest.mark.parametrize("form", [form for form in weights.FORMATS if form != "segmenter"])
def test_every_model_comes_back_exactly_or_is_refused(form):
    for name, model in different_models():
        reason = cannot(name, form)
        if reason:
            with pytest.raises(UserError, match=reason):
                weights.to_theirs(form, {}, model)
            continue
        trunk = getattr(model, "backbone", model)
        whole = model.encoder if model.task == "segmentation" else model
        prefix = "" if trunk is whole else "backbone/"
        flat = {prefix + key: x for key, x in random_like(shapes_of(trunk)).items()}
        theirs = weights.to_theirs(form, flat, model)
        found = loading.convert(theirs, model)
        assert (found.format, found.unused) == (form, ())
        assert found.flat.keys() == flat.keys()
        for key, x in flat.items():
            np.testing.assert_array_equal(found.flat[key], x, err_msg=f"{name} {key}")


def test_tables_have_every_parameter_at_full_width():
    for name in ("deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"):
        model = create_model(name, depth=1)
        wanted = {key: x.shape for key, x in shapes_of(model).items()}
        for form in ("timm", "huggingface"):
            table = weights.FORMATS[form].table(model)
            assert sorted(entry.ours for entry in table) == sorted(wanted)
            for entry in table:
                like = entry.to_theirs(np.broadcast_to(np.False_, wanted[entry.ours]))
                assert entry.to_ours(*like).shape == wanted[entry.ours]


@pytest.mark.parametrize("name", sorted(CASCADES))
@pytest.mark.parametrize("form", ["timm", "huggingface", "big_vision"])
def test_cascades_have_only_their_own_format(name, form):
    with pytest.raises(UserError, match="this model is a cascade"):
        weights.to_theirs(form, {}, create_model(name))


def test_what_a_format_cannot_express_is_told():
    odd = create_model("deit_tiny_patch16_224", **SMALL, fixed_grid_size=10)
    with pytest.raises(UserError, match="fixed_grid_size=10 puts zeros"):
        weights.to_theirs("timm", {}, odd)
    mean = create_model("deit_tiny_patch16_224", **SMALL, pool="mean")
    with pytest.raises(UserError, match="pool='mean'"):
        weights.to_theirs("huggingface", {}, mean)
    with pytest.raises(UserError, match="class_token=False"):
        weights.to_theirs("big_vision", {}, mean)
    with pytest.raises(UserError, match="Did you mean 'timm'"):
        weights.to_theirs("tim", {}, mean)


def timm_state(model):
    return weights.to_theirs("timm", random_like(shapes_of(model)), model)


@functools.cache
def tiny(**changes):
    return create_model("vit_tiny_patch16_224", **{**TINY, **changes})


def test_weights_of_no_known_format_are_told_with_those_tried():
    with pytest.raises(
        UserError, match=r"ours, timm, huggingface, big_vision, dvt, segmenter: layer1\.0"
    ):
        loading.convert({"layer1.0.conv1.weight": np.zeros(3)}, tiny())


def test_weights_of_another_model_are_told_with_all_misfits():
    deeper, distilled = tiny(depth=3), tiny(distilled=True)
    with pytest.raises(
        UserError, match=r"\(12 misfits\)(.|\n)*blocks\.2\.mlp\.fc2\.bias: unexpect"
    ):
        loading.convert(timm_state(deeper), tiny())
    with pytest.raises(UserError, match=r"12 misfits(.|\n)*blocks\.2\.norm1\.weight: missing"):
        loading.convert(timm_state(tiny()), deeper)
    with pytest.raises(UserError, match=r"3 misfits(.|\n)*dist_token: unexpected"):
        loading.convert(timm_state(distilled), tiny())
    wider = loading.convert(timm_state(tiny()), tiny()).flat
    wide = timm_state(tiny(width=32))
    with pytest.raises(
        UserError, match=r"blocks\.0\.norm1\.weight: \(32,\) in the source, \(16,\)"
    ):
        loading.convert(wide, tiny())
    assert wider.keys() == shapes_of(tiny()).keys()


def test_heads_of_another_shape_in_heads_are_told():
    """big_vision's files say how many heads there are."""
    state = weights.to_theirs("big_vision", random_like(shapes_of(tiny())), tiny())
    with pytest.raises(UserError, match=r"query/kernel: \(16, 2, 8\) in the source, \(16, 4, 4\)"):
        loading.convert(state, tiny(heads=4))


def test_cascades_of_another_variant_are_told():
    model = create_model("dvt_deit_small", **SMALL)
    flat = random_like(shapes_of(model))
    state = weights.to_theirs("dvt", flat, model)
    found = loading.convert(state, model)
    assert found.format == "dvt"
    jax.tree.map(np.testing.assert_array_equal, found.flat, flat)
    other = create_model("dvt_deit_small", **{**SMALL, "depth": 3})
    with pytest.raises(UserError, match=r"less_token\.blocks\.2\.norm1\.weight: missing"):
        loading.convert(state, other)
    with pytest.raises(UserError, match="this model is not a cascade"):
        loading.convert(state, tiny())


@pytest.mark.parametrize("form", ["timm", "huggingface", "big_vision"])
def test_a_plain_transformer_is_for_every_stage_of_a_cascade(form):
    # Patches of the first stage do not divide the image: it puts zeros around.
    model = create_model("dvt_deit_small", **SMALL, grid_sizes=(5, 8, 14))
    assert any(model.stage_model(0).padding)
    dense = create_model("deit_small_patch16_224", **SMALL)
    flat = random_like(shapes_of(dense))
    found = loading.convert(weights.to_theirs(form, flat, dense), model)
    assert (found.format, found.unused) == (form, ())
    taken, _ = found.adapt_to(adapt.model_shapes(model))
    for stage in range(3):
        for name in ("blocks_1/attn/proj/kernel", "norm/scale", "head/kernel", "cls_token"):
            np.testing.assert_array_equal(taken[f"stage_{stage}/{name}"], flat[name])


def test_a_cascade_over_t2t_has_no_plain_format():
    model = create_model("dvt_t2t_vit_12", **SMALL)
    state = timm_state(tiny())
    with pytest.raises(UserError, match="no T2T-ViT"):
        loading.convert(state, model)


def test_new_names_of_transformers_are_known():
    model = create_model("vit_tiny_patch16_224", **TINY)
    state = weights.to_theirs("huggingface", random_like(shapes_of(model)), model)
    new = {}
    for name, x in state.items():
        for old, by in (
            ("vit.encoder.layer.", "vit.layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            name = name.replace(old, by)
        new[name] = x
    assert {"vit.layers.1.attention.q_proj.bias", "vit.layers.0.mlp.fc2.weight"} <= new.keys()
    expected = loading.convert(state, model).flat
    jax.tree.map(np.testing.assert_array_equal, loading.convert(new, model).flat, expected)


def test_heads_that_read_something_else_are_left_out():
    dino = tiny(layer_scale=1e-5)
    state = weights.to_theirs("huggingface", random_like(shapes_of(dino)), dino)
    state["classifier.weight"] = np.ones((3, 32), np.float32)
    found = loading.convert(state, dino)
    assert found.unused == ("classifier.weight", "classifier.bias")
    assert "head/kernel" not in found.flat
    state = weights.to_theirs("big_vision", random_like(shapes_of(tiny())), tiny())
    state |= {"pre_logits/kernel": np.ones((16, 16)), "pre_logits/bias": np.ones(16)}
    found = loading.convert(state, tiny())
    assert sorted(found.unused) == [
        "head/bias",
        "head/kernel",
        "pre_logits/bias",
        "pre_logits/kernel",
    ]
    assert "head/kernel" not in found.flat


def test_old_spellings_of_dinov2_and_of_jax_checkpoints():
    dino = tiny(layer_scale=1e-5, register_tokens=2)
    state = timm_state(dino)
    expected = loading.convert(state, dino).flat
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = np.zeros((1, 16), np.float32)
    found = loading.convert(state, dino)
    assert found.unused == ("mask_token",)
    jax.tree.map(np.testing.assert_array_equal, found.flat, expected)
    state = weights.to_theirs("big_vision", random_like(shapes_of(tiny())), tiny())
    expected = loading.convert(state, tiny()).flat
    for spelled in (
        lambda n: "opt/target/" + n,
        lambda n: (
            "params/"
            + n.replace("Attention_1", "Attention_0")
            .replace("MlpBlock_3", "MlpBlock_0")
            .replace("LayerNorm_2", "LayerNorm_1")
        ),
        lambda n: n.replace("posembed_input/", ""),
    ):
        found = loading.convert({spelled(n): x for n, x in state.items()}, tiny())
        jax.tree.map(np.testing.assert_array_equal, found.flat, expected)


def test_larger_patches_see_the_same_in_larger_images():
    rng = np.random.default_rng(3)
    kernel = rng.standard_normal((4, 4, 3, 5)).astype(np.float32)
    patch = rng.standard_normal((4, 4, 3)).astype(np.float32)
    for side in (6, 8):
        larger = jax.image.resize(patch, (side, side, 3), "bilinear")
        found = np.einsum("yxc,yxcd->d", larger, grid.resize_kernel(kernel, side))
        expected = np.einsum("yxc,yxcd->d", patch, kernel)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_what_was_adapted_is_reported(tmp_path):
    weights.save(tmp_path / "w.safetensors", random_like(shapes_of(tiny())), {})
    other = tiny(patch_size=8, image_size=64)
    _, report = weights.load_params(tmp_path / "w.safetensors", other)
    assert report.resized == [
        "patch_embed/proj/kernel (4, 4, 3, 16) -> (8, 8, 3, 16)",
        "pos_embed (17, 16) -> (65, 16)",
    ]
    source = weights.load(tmp_path / "w.safetensors", tiny(num_classes=5))
    _, report = adapt.adapt_weights(source.flat, adapt.model_shapes(tiny(num_classes=5)))
    assert "head/bias (3 classes in the source, 5 here)" in report.fresh


def test_descriptions_of_before_are_read_under_current_names(tmp_path):
    model = {"name": "dvt_deit_small", **SMALL, "grids": [1, 2, 4], "image_size": 16}
    flat = {"x": np.zeros(1, np.float32)}
    weights.save(tmp_path / "w.safetensors", flat, {"model": model, "other": {"grids": 1}})
    about = weights.describe(tmp_path / "w.safetensors")
    assert about["other"] == {"grids": 1}
    assert weights.build_model(about).grid_sizes == (1, 2, 4)


def test_our_own_files_describe_their_model(tmp_path):
    file = tmp_path / "w.safetensors"
    options = {
        **TINY,
        "keep": [0.5, 1.0],
        "reducer": "tome",
        "reduce_layers": [1, 2],
        "dtype": "float32",
    }
    about = {
        "model": {"name": "vit_tiny_patch16_224", **options},
        "mean": [0.1, 0.2, 0.3],
        "std": [1, 1, 1],
        "class_names": ["a", "b", "c"],
        "other": {"kept": None},
    }
    flat = random_like(shapes_of(tiny()))
    weights.save(file, flat, about)
    assert weights.describe(file) == about
    predictor = Predictor.load(file, batch_size=2)
    assert predictor.model.mean == (0.1, 0.2, 0.3)
    assert predictor.model.keep == (0.5, 1.0)
    assert predictor.class_names == ("a", "b", "c")
    assert sorted(predictor.report.matched) == sorted(flat)
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(UserError, match="gmacs_budget= is for runs"):
        Predictor.load(file, gmacs_budget=1.0)


def test_a_predictor_of_another_projects_weights(tmp_path):
    file = tmp_path / "w.safetensors"
    flat = random_like(shapes_of(tiny()))
    save_file(timm_state(tiny()), file)
    images = np.random.default_rng(1).standard_normal((2, 16, 16, 3)).astype(np.float32)
    found = Predictor.load(file, model=tiny(), batch_size=2)(images).logits
    params = adapt.params_for(tiny(), flat)[0]
    expected = jax.jit(tiny().apply)({"params": params}, images).logits
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="does not name its model; give it with model="):
        Predictor.load(file)
    with pytest.raises(UserError, match=r"format timm.*lack(.|\n)*3 classes in the source, 5 here"):
        Predictor.load(file, model=tiny(num_classes=5))
    with pytest.raises(UserError, match="no model 'vit_tony"):
        Predictor.load(file, model="vit_tony_patch16_224")
    with pytest.raises(
        UserError, match=r"is a folder, but neither a run.s.*It holds w\.safetensors"
    ):
        Predictor.load(tmp_path, model=tiny())


def test_a_directory_of_transformers_is_read(tmp_path):
    flat = random_like(shapes_of(tiny()))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    save_file(weights.to_theirs("huggingface", flat, tiny()), tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, weights.read(tmp_path, tiny()), flat)


def test_a_directory_of_transformers_with_several_files_is_read(tmp_path):
    flat = random_like(shapes_of(tiny()))
    theirs = weights.to_theirs("huggingface", flat, tiny())
    where = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(theirs)}
    for part in set(where.values()):
        held = {name: x for name, x in theirs.items() if where[name] == part}
        save_file(held, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    jax.tree.map(np.testing.assert_array_equal, weights.read(tmp_path, tiny()), flat)
