"""What a source says beside its arrays is followed, refused, or told."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from msvit_jax import Predictor, create_model, weights
from msvit_jax.errors import UserError
from msvit_jax.models import registry
from msvit_jax.tree import flat_names
from msvit_jax.weights import adapt
from tests.weights.saved import namespace, torch_save

OPTIONS = {"width": 16, "depth": 2, "heads": 2, "num_classes": 3, "image_size": 16, "patch_size": 4}
CONFIG = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
    "qkv_bias": True,
}
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 20},
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "resample": 3,
}


@functools.cache
def model(**changes):
    return create_model("deit_tiny_patch16_224", **{**OPTIONS, **changes})


def flat(made):
    rng = np.random.default_rng(0)
    shapes = flat_names(adapt.model_shapes(made))
    return {name: rng.standard_normal(s.shape, np.float32) for name, s in shapes.items()}


def saved(folder, form="huggingface", config=(), processor=None, made=None):
    """A directory as transformers or timm write it."""
    made = made or model()
    save_file(weights.to_theirs(form, flat(made), made), folder / "model.safetensors")
    if form == "huggingface":
        config = {**CONFIG, **dict(config)}
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        text = json.dumps({**PROCESSOR, **processor})
        (folder / "preprocessor_config.json").write_text(text)
    return folder


DIFFERENT = [
    ({"num_attention_heads": 4}, "heads", 4),
    ({"layer_norm_eps": 1e-2}, "norm_epsilon", 1e-2),
    ({"hidden_act": "gelu_new"}, "gelu", "tanh"),
]


@pytest.mark.field(65, 67)
@pytest.mark.parametrize(("config", "key", "value"), DIFFERENT)
def test_what_arrays_do_not_show_is_followed_or_refused(tmp_path, config, key, value):
    folder = saved(tmp_path, config=config)
    assert getattr(weights.load_model(folder).model, key) == value
    other = model(**{key: value})
    assert weights.load(folder, other).flat.keys() == flat(other).keys()
    refusal = rf"config\.json( \(\w+\))? says {key}={value!r}.*Make the model with {key}={value!r}"
    for read in (weights.load, weights.load_params, weights.read):
        with pytest.raises(UserError, match=refusal):
            read(folder, model())


def test_a_module_at_its_default_follows_and_another_is_refused(tmp_path):
    folder = saved(tmp_path, config={"layer_norm_eps": 1e-2})
    loaded = weights.load_model(folder, model())
    assert loaded.model.norm_epsilon == 1e-2
    assert "norm_epsilon=0.01 as config.json (layer_norm_eps) says" in str(loaded.report)
    with pytest.raises(UserError, match=r"the model has 0\.001"):
        weights.load_model(folder, model(norm_epsilon=1e-3))
    mixed = create_model("msvit_deit_tiny_patch16_224", **OPTIONS, gate="random")
    assert weights.load_model(folder, mixed).model.backbone.norm_epsilon == 1e-2


def test_a_name_follows_and_takes_the_classes_of_the_head(tmp_path, monkeypatch):
    made = model(image_size=32)
    small = {name: value for name, value in OPTIONS.items() if name != "num_classes"}
    monkeypatch.setitem(registry.BACKBONES, "deit_tiny_patch16_224", {**small, "image_size": 32})
    config = {
        "architecture": "deit_tiny_patch16_224.fb_in1k",
        "num_classes": 3,
        "pretrained_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "input_size": [3, 32, 32],
            "crop_pct": 0.9,
            "label_names": ["a", "b", "c"],
        },
        "model_args": {"act_layer": "gelu_tanh"},
    }
    folder = saved(tmp_path, form="timm", config=config, made=made)
    for given in (None, "deit_tiny_patch16_224"):
        loaded = weights.load_model(folder, given)
        assert (loaded.model.num_classes, loaded.model.gelu) == (3, "tanh")
        assert (loaded.model.mean, loaded.model.std) == ((0.5,) * 3, (0.25,) * 3)
        assert (loaded.class_names, loaded.crop) == (("a", "b", "c"), 0.9)


@pytest.mark.field(68)
def test_a_directory_of_transformers_describes_its_model(tmp_path):
    names = {"id2label": {"2": "c", "1": "b", "0": "a"}}
    folder = saved(tmp_path, config={**names, "layer_norm_eps": 1e-12}, processor={})
    for source in (folder, folder / "model.safetensors"):
        predictor = Predictor.load(source, batch_size=8)
        assert predictor.class_names == ("a", "b", "c")
        assert predictor.crop == 0.8
        made = predictor.model
        assert (made.mean, made.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert (made.norm_epsilon, made.heads, made.image_size) == (1e-12, 2, 16)
        assert sorted(predictor.report.matched) == sorted(flat(model()))
    with pytest.raises(UserError, match=r"preprocessor_config\.json says std"):
        Predictor.load(folder, model=model(norm_epsilon=1e-12, std=(0.7, 0.7, 0.7)))
    # Training may normalize otherwise; it is told.
    notes = weights.load(folder, model(norm_epsilon=1e-12)).notes
    assert notes[0].startswith("mean of the pixels is (0.1, 0.2, 0.3) in preprocessor_config.json")


def test_names_of_other_classes_and_invented_ones_are_left_out(tmp_path):
    folder = saved(tmp_path, config={"id2label": {"0": "a", "1": "b"}})
    loaded = weights.load_model(folder)
    assert loaded.class_names == ()
    assert "2 class names were left out: 3 classes" in str(loaded.report)
    folder = saved(tmp_path, config={"id2label": {str(i): f"LABEL_{i}" for i in range(3)}})
    assert weights.load_model(folder).class_names == ()


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({"rescale_factor": 1 / 127.5}, (0.05, 0.1, 0.15), (0.2, 0.25, 0.3)),
        (
            {"do_rescale": False, "image_mean": [127.5] * 3},
            (0.5, 0.5, 0.5),
            (0.4 / 255, 0.5 / 255, 0.6 / 255),
        ),
        ({"do_normalize": False}, (0.0,) * 3, (1.0,) * 3),
        ({"image_mean": 0.5, "image_std": 0.5}, (0.5,) * 3, (0.5,) * 3),
    ],
)
def test_pixels_are_normalized_as_the_processor_does(tmp_path, changes, mean, std):
    made = weights.load_model(saved(tmp_path, processor=changes)).model
    given = {**PROCESSOR, **changes}
    pixel = np.array([10.0, 100.0, 250.0])
    theirs = pixel * (given["rescale_factor"] if given["do_rescale"] else 1)
    if given["do_normalize"]:
        theirs = (theirs - given["image_mean"]) / given["image_std"]
    np.testing.assert_allclose((pixel / 255 - made.mean) / made.std, theirs, rtol=1e-9)
    np.testing.assert_allclose(made.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(made.std, std, rtol=1e-12)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"image_size": [8, 32]}, r"image_size is 8 x 32; images and patches are square"),
        ({"patch_size": [4, 8]}, r"patch_size is 4 x 8"),
        ({"hidden_act": "relu"}, "activation 'relu' is not known"),
        ({"num_channels": 1}, "1 channels, not 3"),
        ({"use_swiglu_ffn": True}, "SwiGLU"),
        ({"model_type": "beit"}, "its model is 'beit'; known are vit"),
    ],
)
def test_what_no_model_here_can_follow_is_refused(tmp_path, config, match):
    folder = saved(tmp_path, config=config)
    for given in (None, model(), "deit_tiny_patch16_224"):
        with pytest.raises(UserError, match=rf"cannot be followed: config\.json: .*{match}"):
            weights.load_model(folder, given)
    with pytest.raises(UserError, match=match):
        weights.read(folder, model())


@pytest.mark.field(64)
def test_settings_beside_the_tensors_are_followed(tmp_path):
    state = weights.to_theirs("timm", flat(model()), model())
    for size in ([3, 8, 32], [8, 32]):  # a grid of 2 x 8 has as many patches as one of 4 x 4
        path = torch_save(tmp_path / "w.pth", {"model": state, "args": namespace(input_size=size)})
        with pytest.raises(UserError, match=r"the args beside the tensors: input_size is 8 x 32"):
            weights.read(path, model())
    args = namespace(model="deit_small_patch16_224", mean=[0.5] * 3, std=None, lr=1e-3)
    path = torch_save(tmp_path / "w.pth", {"model": state, "args": args})
    with pytest.raises(UserError, match="the args beside the tensors says heads=6"):
        weights.read(path, model())
    unknown = namespace(arch="resnet50")
    path = torch_save(tmp_path / "w.pth", {"state_dict": state, "hyper_parameters": unknown})
    assert any("names the model 'resnet50'" in note for note in weights.load(path, model()).notes)


def test_the_metadata_of_a_file_is_followed(tmp_path):
    path = tmp_path / "w.safetensors"
    about = {"model": {"name": "deit_tiny_patch16_224", **OPTIONS, "gelu": "tanh"}}
    weights.save(path, flat(model()), about)
    with pytest.raises(UserError, match="its metadata says gelu='tanh', the model has 'exact'"):
        weights.read(path, model())
    state = weights.to_theirs("timm", flat(model()), model())
    arguments = {"num_heads": 4, "img_size": 16, "patch_size": 4, "act_layer": "gelu_tanh"}
    save_file(state, path, {"timm": json.dumps(arguments)})
    made = weights.load_model(path).model
    assert (made.heads, made.gelu, made.image_size, made.width) == (4, "tanh", 16, 16)
    for said, match in (
        ({"fc_norm": True}, "norm behind the pooling"),
        ({"img_size": [8, 32]}, "8 x"),
    ):
        save_file(state, path, {"timm": json.dumps({**arguments, **said})})
        with pytest.raises(UserError, match=match):
            weights.load_model(path)


def test_patches_that_are_not_square_are_refused():
    state = weights.to_theirs("timm", flat(model()), model())
    state["patch_embed.proj.weight"] = np.ones((16, 3, 4, 8), np.float32)
    source = weights.loading.convert(state, model())
    with pytest.raises(UserError, match=r"patch_embed/proj/kernel: \(4, 8, 3, 16\) in the source"):
        source.params_for(model())


@pytest.mark.field(26)
def test_a_predictor_warns_of_a_head_of_zeros(tmp_path):
    zeros = {name: x * (0 if name.startswith("head/") else 1) for name, x in flat(model()).items()}
    weights.save(tmp_path / "w.safetensors", zeros, {})
    with pytest.warns(UserWarning, match="head/kernel is all zeros"):
        predictor = Predictor.load(tmp_path / "w.safetensors", model=model(), batch_size=8)
    assert "all zeros" in str(predictor.report)


def test_a_damaged_description_is_named(tmp_path):
    folder = saved(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json' holds damaged JSON"):
        weights.load_model(folder)
    saved(tmp_path, config={"id2label": {"zero": "a"}})
    with pytest.raises(UserError, match="id2label has 'zero' for a label"):
        weights.load_model(folder)


def test_a_config_that_belongs_to_another_file_is_not_asked(tmp_path):
    saved(tmp_path, config={"num_attention_heads": 4})
    other = tmp_path / "other.safetensors"
    (tmp_path / "model.safetensors").rename(other)
    assert weights.read(other, model()).keys() == flat(model()).keys()


NONSENSE = [
    ({}, {"image_mean": [0.1] * 4}, r"image_mean=\[0\.1, .*3 numbers"),
    ({}, {"image_std": [0, 0.5, 0.5]}, "std=.*more than 0"),
    ({}, {"image_std": "none"}, "image_std='none'"),
    ({}, {"rescale_factor": 0}, "rescale_factor=0: a finite number of more than 0"),
    ({}, {"rescale_factor": "large"}, "rescale_factor='large'"),
    ({"hidden_act": ["gelu"]}, {}, r"activation \['gelu'\] is not known"),
    ({"num_attention_heads": 0}, {}, r"num_attention_heads\): heads=0.*at least 1"),
    ({"num_attention_heads": -2}, {}, r"num_attention_heads\): heads=-2"),
    ({"num_attention_heads": "2"}, {}, r"num_attention_heads\): heads=2 is not a valid value: int"),
    ({"layer_norm_eps": -1}, {}, r"layer_norm_eps\): norm_epsilon=-1.*more than 0"),
    ({"layer_norm_eps": float("nan")}, {}, r"layer_norm_eps\): norm_epsilon=nan"),
    ({"layer_norm_eps": "1e-5"}, {}, r"layer_norm_eps\): norm_epsilon=1e-5 is not"),
    ({"id2label": {"1": "a", "2": "b", "3": "c"}}, {}, "id2label has the labels 1, 2, 3"),
    ({"id2label": "abc"}, {}, "id2label is not a list of names"),
]


@pytest.mark.parametrize(("config", "processor", "match"), NONSENSE)
def test_descriptions_that_make_no_sense_are_refused_by_key(tmp_path, config, processor, match):
    folder = saved(tmp_path, config=config, processor=processor)
    for given in (None, model(), "deit_tiny_patch16_224"):
        with pytest.raises(UserError, match=rf"cannot be followed: .*config\.json.*{match}"):
            weights.load_model(folder, given)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"num_hidden_layers": 5}, r"num_hidden_layers\) says depth=5, the arrays have 2"),
        ({"hidden_size": 32}, r"hidden_size\) says width=32, the arrays have 16"),
        ({"patch_size": 8}, "patch_size=8, the arrays have 4"),
    ],
)
def test_descriptions_and_arrays_that_contradict_each_other_are_refused(tmp_path, config, match):
    folder = saved(tmp_path, config=config)
    for given in (None, model()):
        with pytest.raises(UserError, match=f"does not hold what it says: .*{match}"):
            weights.load_model(folder, given)


def timm_config(**changes):
    arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16}
    return {"architecture": "vit_tiny_patch16_224", "model_args": {**arguments, **changes}}


def test_classes_and_channels_of_timm_are_compared(tmp_path):
    folder = saved(tmp_path, form="timm", config={**timm_config(), "num_classes": 5})
    with pytest.raises(UserError, match="num_classes=5, the arrays have 3"):
        weights.load_model(folder)
    pixels = {"pretrained_cfg": {"input_size": [1, 16, 16]}}
    folder = saved(tmp_path, form="timm", config={**timm_config(), **pixels})
    with pytest.raises(UserError, match="images of 1 channels"):
        weights.load_model(folder)


def test_the_pooling_is_followed_or_refused_and_told_in_training(tmp_path):
    folder = saved(tmp_path, form="timm", config=timm_config(global_pool="avg"))
    assert weights.load_model(folder).model.pool == "mean"
    assert weights.load_model(folder, model()).model.pool == "mean"  # left open
    assert any("pool is mean" in note for note in weights.load(folder, model()).notes)
    folder = saved(tmp_path, form="timm", config=timm_config(global_pool="token"))
    with pytest.raises(UserError, match="says pool='token', the model has 'mean'"):
        weights.load_model(folder, model(pool="mean"))


@pytest.mark.parametrize(
    "beside",
    [
        {"args": {"num_heads": 4, "act_layer": "gelu_tanh", "img_size": 16}},
        {"hyper_parameters": {"num_heads": 4, "act_layer": "gelu_tanh"}},
        {"args": {"model": "vit_tiny_patch16_224", "model_kwargs": {"num_heads": 4}}},
    ],
)
def test_arguments_of_the_model_beside_the_tensors_are_followed(tmp_path, beside):
    ((key, given),) = beside.items()
    state = weights.to_theirs("timm", flat(model()), model())
    content = {"state_dict": state, key: namespace(**given) if key == "args" else given}
    path = torch_save(tmp_path / "w.pth", content)
    with pytest.raises(UserError, match=r"beside the tensors \(num_heads\) says heads=4"):
        weights.read(path, model())
    right = model(heads=4, gelu="exact" if "model" in given else "tanh")
    assert weights.read(path, right).keys() == flat(model()).keys()


def test_several_models_in_a_list_are_listed(tmp_path):
    state = weights.to_theirs("timm", flat(model()), model())
    path = torch_save(tmp_path / "w.pth", [state, {name: 2 * x for name, x in state.items()}])
    with pytest.raises(UserError, match="several models"):
        weights.read(path, model())


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "flax_model.msgpack").write_bytes(b"x")
    wanted = "neither a run's, .* nor one with .*It holds config.json, flax_model.msgpack"
    for given in (None, model()):
        with pytest.raises(UserError, match=wanted):
            Predictor.load(tmp_path, model=given)
    folder = tmp_path / "d.pth"
    folder.mkdir()
    with pytest.raises(UserError, match="It holds nothing"):
        weights.load_model(folder, model())
