import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from msvit_jax import config as configs
from msvit_jax import create_model
from msvit_jax import weights as files
from msvit_jax.errors import UserError
from msvit_jax.train import loop
from msvit_jax.tree import flat_names
from msvit_jax.weights import adapt
from tests import tiny_run
from tests.jitted import apply

SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "num_classes": 3}


def _model(name="vit_tiny_patch16_224", **changes):
    options = {**SIZES, **changes}
    if "grid_sizes" in options:  # instead of a patch size
        del options["patch_size"]
    return create_model(name, **options)


def _weights(model, seed=1):
    rng = np.random.default_rng(seed)
    shapes = flat_names(adapt.model_shapes(model))
    return {n: rng.normal(size=s.shape).astype(np.float32) for n, s in shapes.items()}


def _fit(weights, model):
    return adapt.adapt_weights(weights, adapt.model_shapes(model))


def test_same_model_takes_everything():
    weights = _weights(_model())
    taken, report = _fit(weights, _model())
    assert taken.keys() == weights.keys() == set(report.matched)
    assert report.resized + report.fresh + report.unused == []


def _positions(size, source, source_grid):
    """Positions [rows, columns, 16] of a model that starts from others, and the report."""
    model = _model(image_size=size)
    taken, report = adapt.adapt_weights(
        {**_weights(model), "pos_embed": source},
        adapt.model_shapes(model),
        source_grid=source_grid,
        patch_grid=model.patch_grid,
    )
    np.testing.assert_array_equal(taken["pos_embed"][0], source[0])
    return taken["pos_embed"][1:].reshape(*model.patch_grid, 16), report


def test_positions_of_a_square_become_those_of_a_rectangle():
    """Rows and columns are told apart: what falls along rows alone stays even along columns."""
    rng = np.random.default_rng(0)
    down = np.repeat(rng.normal(size=(4, 1, 16)), 4, axis=1).astype(np.float32)
    for cells, axis in ((down, 1), (down.swapaxes(0, 1), 0)):
        source = np.concatenate([np.ones((1, 16), np.float32), cells.reshape(16, 16)])
        for grid in (None, (4, 4)):  # a square is what is not known
            found, report = _positions((16, 24), source, grid)
            assert found.shape == (4, 6, 16)
            np.testing.assert_allclose(found.std(axis=axis), 0, atol=1e-5)
            assert found.std(axis=1 - axis).min() > 0.1
            assert report.resized == ["pos_embed (17, 16) -> (25, 16)"]


@pytest.mark.parametrize("size", [(24, 24), (36, 16)])
def test_as_many_positions_of_another_shape_are_resized(size):
    source = np.random.default_rng(0).normal(size=(37, 16)).astype(np.float32)
    across, _ = _positions(size, source, (4, 9))
    turned = source[1:].reshape(4, 9, 16).swapaxes(0, 1).reshape(36, 16)
    down, report = _positions(size[::-1], np.concatenate([source[:1], turned]), (9, 4))
    np.testing.assert_allclose(across, down.swapaxes(0, 1), rtol=1e-4, atol=1e-5)
    assert report.resized == ["pos_embed (37, 16) -> (37, 16)"]
    same, report = _positions((16, 36), source, (4, 9))
    np.testing.assert_array_equal(same, source[1:].reshape(4, 9, 16))
    assert report.resized == []


def test_a_file_of_another_project_holds_a_square_grid(tmp_path):
    """36 positions are 6 x 6 there, also for a model of 4 x 9 patches."""
    square, wide = _model(image_size=24), _model(image_size=(16, 36))
    flat = _weights(square)
    save_file(files.to_theirs("timm", flat, square), tmp_path / "x.safetensors")
    params, report = files.load_params(tmp_path / "x.safetensors", wide)
    assert report.resized == ["pos_embed (37, 16) -> (37, 16)"]
    expected, _ = _positions((16, 36), flat["pos_embed"], (6, 6))
    np.testing.assert_allclose(params["pos_embed"][1:].reshape(4, 9, 16), expected, rtol=1e-6)


def test_dense_model_goes_below_the_backbone():
    weights = _weights(_model())
    mixed = _model("msvit_tiny_patch16_224", scale_embedding=True, coarse_residual=True)
    taken, report = _fit(weights, mixed)
    assert set(taken) == {f"backbone/{name}" for name in weights}
    np.testing.assert_array_equal(taken["backbone/head/kernel"], weights["head/kernel"])
    assert {name.split("/")[0] for name in report.fresh} == {
        "gate_mlp",
        "scale_embed (not in the source)",
        "residual",
    }


def test_every_stage_of_a_cascade_starts_from_a_dense_model():
    dense = _model()
    weights = _weights(dense)
    cascade = _model("dvt_deit_small", grid_sizes=(2, 4), feature_reuse=False, relation_reuse=False)
    taken, report = _fit(weights, cascade)
    assert report.fresh == report.widened == report.unused == []
    assert [line.split()[0] for line in report.resized] == [
        "stage_0/patch_embed/proj/kernel",
        "stage_0/pos_embed",
    ]
    params, _ = adapt.params_for(cascade, taken)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    exits = cascade.apply({"params": params}, images).exit_logits
    whole, _ = adapt.params_for(dense, weights)
    expected = dense.apply({"params": whole}, images).logits
    np.testing.assert_array_equal(exits[:, 1], expected)


def test_layers_that_see_reused_features_ignore_them_at_first():
    cascade = _model("dvt_deit_small", grid_sizes=(2, 4), feature_width=8, feature_hidden=8)
    weights = _weights(_model())
    taken, report = _fit(weights, cascade)
    assert {name.split()[0] for name in report.widened} == {
        f"stage_1/blocks_{layer}/{name}"
        for layer in range(2)
        for name in ("norm2/scale", "norm2/bias", "mlp/fc1/kernel")
    }
    assert {name.split("/")[0] for name in report.fresh} == {"reuse_1"}
    kernel = taken["stage_1/blocks_0/mlp/fc1/kernel"]
    np.testing.assert_array_equal(kernel[:16], weights["blocks_0/mlp/fc1/kernel"])
    assert not kernel[16:].any()
    np.testing.assert_array_equal(taken["stage_1/blocks_0/norm2/scale"][16:], np.ones(8))


@pytest.mark.parametrize("patch_size", [4, 8])
def test_a_separate_coarse_embedding_starts_as_the_shared_one(patch_size):
    source, given = (
        _weights(_model()),
        {"image_size": 32, "patch_size": patch_size, "gate": "random"},
    )
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    coarse = np.random.default_rng(1).integers(0, 2, (2, (32 // patch_size // 2) ** 2))
    logits = {}
    for embedding in ("shared", "separate"):
        model = _model("msvit_deit_tiny_patch16_224", **given, coarse_embedding=embedding)
        params, _ = adapt.params_for(model, source)
        logits[embedding] = apply(
            model, {"params": params}, images, coarse=jnp.asarray(coarse, jnp.float32)
        ).logits
    np.testing.assert_allclose(logits["separate"], logits["shared"], rtol=1e-4, atol=1e-5)


def test_other_scales_start_fresh_where_the_source_is_dense():
    weights = _weights(_model())
    merging = _model("mergence_tiny_patch16_224", scales=(2, 4, 8))
    taken, report = _fit(weights, merging)
    assert set(taken) == {f"backbone/{name}" for name in weights}
    fresh = {"/".join(name.split("/")[:2]) for name in report.fresh}
    assert fresh == {"scale_2/embed", "scale_2/proj", "scale_8/embed", "scale_8/proj"}
    assert "fresh: scale_2/embed/proj/bias (not in the source)" in str(report)


@pytest.mark.parametrize("name", ["msvit_tiny_patch16_224", "msvit_seg_vit_tiny_mask"])
def test_a_gate_and_a_decoder_beside_a_dense_models_names_keep_theirs(name):
    mixed = _weights(_model(name))
    plain = {n.removeprefix("backbone/"): value for n, value in mixed.items()}
    taken, report = _fit(plain, _model(name))
    assert report.fresh == report.unused == []
    assert taken.keys() == mixed.keys()
    for part, value in mixed.items():
        np.testing.assert_array_equal(taken[part], value)


def test_backbone_of_a_mixed_scale_model_becomes_a_dense_one():
    weights = _weights(_model("msvit_tiny_patch16_224"))
    taken, report = _fit(weights, _model())
    np.testing.assert_array_equal(taken["norm/scale"], weights["backbone/norm/scale"])
    assert {name.split("/")[0] for name in report.unused} == {"gate_mlp"}


def test_positions_are_resized_and_the_class_token_kept():
    weights = _weights(_model())
    weights["pos_embed"][1:] = 7.0
    taken, report = _fit(weights, _model(image_size=24))
    assert report.resized == ["pos_embed (17, 16) -> (37, 16)"]
    np.testing.assert_array_equal(taken["pos_embed"][0], weights["pos_embed"][0])
    np.testing.assert_allclose(taken["pos_embed"][1:], 7.0, rtol=1e-5)


def test_a_head_for_other_classes_starts_fresh():
    taken, report = _fit(_weights(_model()), _model(num_classes=5))
    assert "head/kernel" not in taken
    assert report.fresh == [
        f"head/{n} (3 classes in the source, 5 here)" for n in ("bias", "kernel")
    ]
    assert "fresh: head/bias (3 classes" in str(report)


def test_all_misfits_are_listed_at_once():
    weights = _weights(_model())
    weights["norm/scale"] = np.zeros(5, np.float32)
    weights["blocks_0/attn/qkv/kernal"] = weights.pop("blocks_0/attn/qkv/kernel")
    with pytest.raises(UserError) as error:
        _fit(weights, _model())
    message = str(error.value)
    assert "norm/scale: (5,) in the source, (16,) here" in message
    assert (
        "blocks_0/attn/qkv/kernel: not in the source. Did you mean 'blocks_0/attn/qkv/ker"
        in message
    )
    assert "Unused in the source: blocks_0/attn/qkv/kernal" in message


@pytest.mark.parametrize("joint", ["/", "."])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_files(tmp_path, suffix, joint):
    weights = _weights(_model())
    named = {name.replace("/", joint): value for name, value in weights.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **named)
    else:
        save_file(named, path)
    jax.tree.map(np.testing.assert_array_equal, files.read(path, _model()), weights)


@pytest.mark.parametrize("name", ["weights.npz", "weights.safetensors", "weights.txt"])
def test_files_that_are_no_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x10\x00\x00\x00 nonsense")
    with pytest.raises(UserError, match="cannot be read as weights"):
        files.read(tmp_path / name, _model())


def test_object_arrays_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "w.npz", head=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="cannot be read as weights"):
        files.read(tmp_path / "w.npz", _model())


def test_a_mixed_scale_run_starts_from_a_dense_runs_weights(tmp_path, capsys):
    """Written by timm's names."""
    dense = configs.build_model(configs.resolve(tiny_run.config(), 3))
    weights, file = _weights(dense), tmp_path / "dense.safetensors"
    save_file(files.to_theirs("timm", weights, dense), file)
    config = tiny_run.msvit(init_from=str(file), steps=1, optimizer__freeze="backbone/")
    loop.train(config, tmp_path / "run")
    started = files.read(tmp_path / "run", None)
    for name, value in weights.items():
        np.testing.assert_array_equal(started[f"backbone/{name}"], value)
    assert f"{len(weights)} parameters matched; fresh: gate_mlp/fc1/bias" in capsys.readouterr().out


def test_a_merging_run_starts_from_and_is_taught_by_a_dense_run(tmp_path, capsys):
    loop.train(tiny_run.config(steps=1), tmp_path / "dense")
    config = tiny_run.config(
        "mergence_tiny_patch16_224",
        init_from=str(tmp_path / "dense"),
        loss__distillation__teacher=str(tmp_path / "dense"),
        loss__distillation__weight=1.0,
        model__scales=(2, 4),
        model__keep=0.5,
        keep_rate__hold_epochs=1 / 3,  # the first step, with all tokens
        log_every_steps=1,
        steps=2,
    )
    figures = loop.train(config, tmp_path / "merging")
    assert figures["examples"] == tiny_run.VALIDATION
    assert "fresh: scale_2/embed/proj/bias (not in the source)" in capsys.readouterr().out
    lines = (tmp_path / "merging" / "metrics.jsonl").read_text().splitlines()
    losses = [r["total_loss"] for r in map(json.loads, lines) if r["kind"] == "train"]
    # With all tokens and scales that are still zero the student is its teacher.
    assert abs(losses[0]) < 1e-6
    assert losses[1] > 1e-5


def test_a_config_follows_what_its_weights_say_of_the_model(tmp_path):
    dense = configs.build_model(configs.resolve(tiny_run.config(), 3))
    file = tmp_path / "dense.safetensors"
    said = {"timm": json.dumps({"num_heads": 2, "act_layer": "gelu_tanh"})}
    save_file(files.to_theirs("timm", _weights(dense), dense), file, said)
    run = tmp_path / "run"
    for make in (tiny_run.config, tiny_run.msvit):
        config = configs.resolve(make(init_from=str(file)), 3)
        following, followed = loop._following(config, run)
        assert followed == {"gelu": "tanh"}
        model = configs.build_model(following)
        assert getattr(model, "backbone", model).gelu == "tanh"
        files.load(file, model)
    explicit = configs.resolve(tiny_run.config(init_from=str(file), model__gelu="exact"), 3)
    assert loop._following(explicit, run) == (explicit, {})
    with pytest.raises(
        UserError, match=r"says gelu='tanh', the model has 'exact'.*--config\.model"
    ):
        files.load(file, configs.build_model(explicit))
    # A run that goes on needs the file no more.
    (run / "checkpoints" / "1").mkdir(parents=True)
    (run / "config.json").write_text(configs.to_json(following))
    file.unlink()
    assert loop._following(config, run) == (following, {"gelu": "tanh"})


def test_a_run_is_compared_with_the_model_it_is_for(tmp_path, monkeypatch):
    config = configs.resolve(tiny_run.config(model__heads=4), 3)
    (tmp_path / "config.json").write_text(configs.to_json(config))
    flat = _weights(configs.build_model(config))
    monkeypatch.setattr("msvit_jax.checkpoint.load_params", lambda workdir: flat)
    assert files.load(tmp_path, configs.build_model(config)).flat.keys() == flat.keys()
    with pytest.raises(UserError, match="the run's config says heads=4, the model has 2"):
        files.load(tmp_path, configs.build_model(configs.resolve(tiny_run.config(), 3)))
    flat["norm/bias"][3] = np.nan
    with pytest.raises(UserError, match="norm/bias holds 1 values of 16 that are NaN"):
        files.load(tmp_path, configs.build_model(config))
