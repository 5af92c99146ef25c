import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msvit_jax import config as configs
from msvit_jax import config_rules
from msvit_jax.config_rules import RULES, Number
from msvit_jax.errors import UserError
from msvit_jax.models.registry import list_models, model_types
from tests import tiny_run
from tests.test_config import DIGITS


def test_every_key_has_a_rule_that_its_default_fits():
    flat = configs.flatten(configs.base())
    assert flat.keys() == RULES.keys()
    configs.check(configs.base())


def test_every_rule_of_a_model_is_an_attribute_of_one():
    attributes = set().union(*(model_types(name) for name in list_models()))
    assert set(config_rules.MODEL_RULES) <= attributes


@pytest.mark.field(86, 87, 88, 89)
@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("optimizer.learning_rate=nan", "finite number of more than 0"),
        ("optimizer.learning_rate=-1e-3", "finite number of more than 0"),
        ("optimizer.learning_rate=0", "finite number of more than 0"),
        ("optimizer.learning_rate=inf", "finite number of more than 0"),
        ("optimizer.learning_rate=None", "finite number of more than 0"),
        ("epochs=None", "finite number of more than 0"),
        ("epochs=0", "finite number of more than 0"),
        ("epochs=-1", "finite number of more than 0"),
        ("log_every_steps=0", "at least 1"),
        ("batch_size=0", "at least 1"),
        ("batch_size=-8", "at least 1"),
        ("batch_size=None", "at least 1 expected"),
        ("eval_batch_size=0", "at least 1, or None"),
        ("steps=0", "at least 1, or None"),
        ("seed=-1", "at least 0 and at most 4.29497e"),
        ("ema_decay=1", "less than 1"),
        ("optimizer.freeze=None", "separated by commas"),
        ("optimizer.gate_learning_rate=nan", "or None"),
        ("model.layer_scale=nan", "finite number, or None"),
        ("mesh.data=0", "at least 1, or -1"),
        ("dtype=float31", "'bfloat16'"),
        ("data.name=", "not empty"),
        ("data.flip=None", "bool expected"),
        ("data.crop_scale=0.5", "2 numbers in rising order"),
        ("data.crop_scale=(1.0, 0.1)", "in rising order"),
        ("data.crop_scale=(0.1, 2.0)", "at most 1, or None"),
        ("data.match_classes=names", "'by_name'"),
        ("loss.gate.kind=gbass", "'gbas'"),
        ("loss.distillation.temperature=0", "more than 0"),
        ("model.depth=0", "at least 1"),
        ("model.depth=2.5", "int expected"),
        ("model.width=None", "at least 1 expected"),
        ("model.register_tokens=None", "int expected"),
        ("model.width=wide", "int expected"),
        ("model.drop_path=1.0", "less than 1"),
        ("model.remat=1", "bool expected"),
        ("model.std=(0, 1, 1)", "3 numbers, each a finite number of more than 0"),
        ("model.mean=None", "tuple expected"),
        ("model.keep=None", "float or tuple expected"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_what_does(override, wanted):
    with pytest.raises(UserError, match=wanted) as error:
        configs.load(DIGITS, [override])
    assert override.split("=")[0] in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        *("steps=None", "eval_batch_size=None", "optimizer.gate_learning_rate=None"),
        *("data.crop_scale=None", "data.crop_scale=(0.08, 1.0)", "model.layer_scale=None"),
        *("optimizer.clip_norm=0", "mesh.fsdp=-1", "model.reduce_layers=(1, 2)", "model.keep=0.5"),
        *("model.dtype=bfloat16", "model.drop_path=0", "log_images=0"),
    ],
)
def test_values_that_mean_something_are_taken(override):
    configs.build_model(configs.load(DIGITS, [override]))


def test_configs_made_in_python_are_looked_at_too():
    config = tiny_run.config()
    config.optimizer.learning_rate = math.nan
    with pytest.raises(UserError, match=r"optimizer\.learning_rate=nan"):
        configs.resolve(config, 3)


def test_a_value_that_is_refused_is_not_kept():
    config = tiny_run.config()
    with pytest.raises(UserError, match="batch_size"):
        configs.set_key(config, "batch_size", "0")
    assert config.batch_size == 16


def test_another_number_of_classes_than_the_data_sets_is_refused():
    assert configs.resolve(tiny_run.config(model__num_classes=3), 3).model.num_classes == 3
    with pytest.raises(UserError, match=r"3 classes but the data set has 5.*model\.num_classes"):
        configs.resolve(tiny_run.config(model__num_classes=3), 5)


@given(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=2)),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.booleans(),
)
def test_what_fits_a_number_lies_in_its_range(value, least, most, strict):
    rule = Number(least, most, above=strict, below=strict)
    if rule.fits(value):
        assert type(value) in (int, float)
        assert least <= value <= most
        assert not strict or least < value < most
    elif type(value) in (int, float):
        assert not least < value < most
