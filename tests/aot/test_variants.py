import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvit_jax import config as configs
from msvit_jax.aot import compiling, variants
from msvit_jax.aot.variants import Sizes
from msvit_jax.errors import UserError
from msvit_jax.tokens import packing


def _config(name="msvit_tiny_patch16_224", **model):
    config = configs.base()
    config.model = {"name": name, **model}
    config.data.image_size = 224
    return configs.resolve(config, 10)


def _variant(name, config=None, images=64, chips=4, sizes=None):
    sizes = sizes or Sizes(tokens=128, spread=30.0, row_width=512)
    return variants.variant(config or _config(), name, batch_size=images, chips=chips, sizes=sizes)


@pytest.mark.parametrize("name", [n for n in variants.KNOWN if n not in ("reduced", "cascade")])
def test_every_variant_builds_and_runs_its_layout(name):
    made = _variant(name)
    model = configs.build_model(made.config)
    # Layouts whose task loss says nothing to the gate are compiled with a frozen one.
    assert ("gate" in made.config.optimizer.freeze) == (name in ("budget", "rows", "ladder"))
    if name == "dense":
        assert made.config.model.name == "vit_tiny_patch16_224"
        return
    assert model.layout == {"ladder": "budget", "alternatives": "trimmed"}.get(name, name)
    assert model.row_groups == (1 if name == "slots" else 4)
    images = jax.ShapeDtypeStruct((64, 224, 224, 3), jnp.float32)
    keys = {"params": jax.random.key(0)}
    shapes = jax.eval_shape(lambda x: model.init_with_output(keys, x)[0], images)
    assert shapes.logits.shape == (64, 10)


def test_dense_loses_what_only_mixed_scale_has_and_keeps_the_rest():
    config = _config(layout="budget", token_capacity=100, gate_bias=1.0, width=96, drop_path=0.1)
    model = _variant("dense", config).config.model.to_dict()
    kept = {"num_classes": 10, "image_size": 224, "width": 96, "drop_path": 0.1}
    assert model == {"name": "vit_tiny_patch16_224", **kept}


def test_a_configs_own_layout_is_compiled_as_it_is():
    config = _config(layout="budget", token_capacity=(80, 100), row_groups=2)
    assert variants.default_names(config) == ["dense", "budget"]
    own = _variant("budget", config)
    assert own.config.model.to_dict() == config.model.to_dict()
    other = _variant("trimmed", config).config.model
    assert (other.token_capacity, other.row_groups, other.layout) == (128, 4, "trimmed")
    assert variants.default_names(_config("deit_tiny_patch16_224")) == ["dense"]


def test_counts_have_the_mean_and_spread_asked_for():
    model = configs.build_model(_config())
    counts = variants.draw_counts(model, 512, Sizes(128, 25.0))
    assert counts.mean() == pytest.approx(128, abs=1)
    assert counts.std() == pytest.approx(25, abs=1)
    assert set((counts - 49) % 3) == {0}
    assert (np.diff(counts) >= 0).all()
    assert set(variants.draw_counts(model, 8, Sizes(500, 0.0))) == {196}


def test_rows_and_ladders_hold_the_batch_and_no_more_than_needed():
    model = configs.build_model(_config())
    sizes = Sizes(128, 30.0, 512)
    counts = variants.draw_counts(model, 16, sizes)
    rows = _variant("rows", sizes=sizes).config.model.rows // 4
    lengths = jnp.asarray(counts + 1)[None]
    packed = jax.jit(packing.rows, static_argnums=(1, 2))
    assert packed(lengths, rows, 512).within_capacity.all()
    assert not packed(lengths, rows - 1, 512).within_capacity.all()
    assert _variant("rows", sizes=Sizes(128, 30.0)).config.model.row_width == 256
    ladder = _variant("ladder", sizes=sizes).config.model.token_capacity
    widths = tuple(b + 1 for b in ladder)
    assert jax.jit(packing.assign_buckets, static_argnums=1)(lengths, widths).within_capacity.all()
    assert max(ladder) == counts.max()


def test_unknown_layout():
    with pytest.raises(UserError, match=r"Unknown layout 'row'\. Did you mean 'rows'"):
        _variant("row")


def test_a_dense_model_has_no_layouts():
    with pytest.raises(UserError, match=r"deit_tiny_patch16_224 has no gate .*--layouts=dense"):
        _variant("rows", _config("deit_tiny_patch16_224"))


def test_a_model_that_merges_is_compiled_beside_its_plain_model():
    config = _config("mergence_tiny_patch16_224", keep=0.6, scales=(8,), width=96)
    assert variants.default_names(config) == ["dense", "reduced"]
    dense = configs.build_model(_variant("dense", config).config)
    reduced = configs.build_model(_variant("reduced", config).config)
    assert not dense.reductions
    assert dense.width == reduced.backbone.width == 96
    assert [spec.make().keep for spec in reduced.reductions.values()] == [0.6] * 3


def test_a_dense_model_has_no_reduced_variant():
    with pytest.raises(UserError, match="no layout 'reduced'"):
        _variant("reduced", _config("vit_tiny_patch16_224"))


CASCADE = {"grid_sizes": (2, 4), "width": 16, "depth": 2, "heads": 2}


def test_a_cascade_is_compiled_beside_a_plain_model_of_its_last_stages_tokens():
    config = _config("dvt_deit_small", **CASCADE)
    assert variants.default_names(config) == ["dense", "cascade"]
    assert (made := _variant("cascade", config)).config is config
    assert made.tokens == "4 and 16"
    dense = configs.build_model(_variant("dense", config).config)
    assert (dense.grid_size, dense.width, dense.is_cascade) == (4, 16, False)
    with pytest.raises(UserError, match=r"no layout 'slots'.*--layouts=dense,cascade"):
        _variant("slots", config)


@pytest.mark.parametrize("what", compiling.WHAT)
def test_both_programs_of_a_cascade_are_lowered(what):
    config = _config("dvt_deit_small", **CASCADE)
    config.batch_size = 4
    made = _variant("cascade", config)
    chips = types.SimpleNamespace(devices=jax.devices()[:1])
    first, *_ = compiling.lower(made, what, chips).out_info
    if what == compiling.PREDICT:
        assert first.shape == (4, 10)  # the last exit's logits
    else:
        assert set(first.params["model"]) == {"stage_0", "stage_1", "reuse_1"}
