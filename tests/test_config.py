import json
import pathlib

import pytest

import msvit_jax
from msvit_jax import config as configs
from msvit_jax import config_aliases
from msvit_jax.errors import UserError
from msvit_jax.models import registry
from tests import tiny_run

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.py"))
DIGITS = str(ROOT / "configs" / "digits_vit.py")


def _file(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(
        "from msvit_jax.config import base\n"
        "def get_config():\n    config = base()\n" + f"    {body}\n    return config\n"
    )
    return str(path)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_builds_its_model_and_says_how_to_run_it(path):
    config = configs.load(str(path))
    model = configs.build_model(configs.resolve(config, 10))
    assert model.num_classes == 10
    assert model.image_size == config.data.image_size
    text = path.read_text()
    assert f"python train.py --config={path.relative_to(ROOT)}" in text
    assert "Cost:" in text
    assert "Expect:" in text


def test_the_promised_configs_are_there():
    names = {str(p.relative_to(ROOT / "configs"))[:-3] for p in FILES}
    imagenet = ("deit_tiny", "deit_small", "vit_small")
    assert names >= {
        *("digits_vit", "digits_msvit", "digits_vit_lowres", "cifar10_vit", "cifar10_msvit"),
        *(f"imagenet/{n}" for n in imagenet),
        *(f"imagenet/msvit_{n}" for n in imagenet),
    }


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("batch_size=1e3", "batch_size", 1000),
        ("data.flip=true", "data.flip", True),
        ("data.name=cifar10", "data.name", "cifar10"),
        ("init_from=12", "init_from", "12"),
        ("data.crop_scale=(0.1, 1.0)", "data.crop_scale", (0.1, 1.0)),
        ("data.crop_scale=none", "data.crop_scale", None),
        ("optimizer.freeze=gate", "optimizer.freeze", ("gate",)),
        ("optimizer.freeze=gate,backbone/head", "optimizer.freeze", ("gate", "backbone/head")),
        ("optimizer.gate_learning_rate=0.5", "optimizer.gate_learning_rate", 0.5),
        ("model.drop_path=0.1", "model.drop_path", 0.1),
        ("steps=7", "steps", 7),
    ],
)
def test_overrides_are_read_as_the_type_of_their_key(text, key, value):
    flat = configs.flatten(configs.load(DIGITS, [text]))
    assert flat[key] == value
    assert type(flat[key]) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "'optimizer.learning_rate'"),
        ("optimiser.learning_rate=1", "'optimizer.learning_rate'"),
        ("data.mixupp=1", "'data.mixup'"),
        ("model.dropt_path=1", "'model.drop_path'"),
        ("model.name=vit_tini_patch16_224", "'vit_tiny_patch16_224'"),
        ("batch_size=many", "int expected"),
        ("batch_size=1.5", "int expected"),
        ("data.flip=2", "bool expected"),
        ("data.flip=none", "bool expected"),
        ("optimizer.learning_rate=fast", "float expected"),
        ("optimizer=1", "section"),
        ("batch_size", "batch_size=<value>"),
    ],
)
def test_bad_overrides_name_the_remedy(override, message):
    with pytest.raises(UserError, match=message):
        configs.load(DIGITS, [override])


def test_unknown_key_in_a_file_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"'optimizer\.clip_nrm'.*'optimizer\.clip_norm'"):
        configs.load(_file(tmp_path, "config.optimizer.clip_nrm = 1.0"))


def test_wrong_type_in_a_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="not a valid config"):
        configs.load(_file(tmp_path, "config.batch_size = 'many'"))


def test_missing_file_names_the_nearest():
    with pytest.raises(UserError, match=r"digits_vit\.py"):
        configs.load(DIGITS.replace("digits_vit", "digit_vit"))


@pytest.mark.parametrize("name", ["configs/imagenet/deit_tiny.py", "imagenet/deit_tiny"])
def test_a_packaged_config_is_taken_where_there_is_no_file(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    packaged = ROOT / "configs" / "imagenet" / "deit_tiny.py"
    assert configs.load(name).to_dict() == configs.load(str(packaged)).to_dict()
    assert capsys.readouterr().err == f"No file {name!r}; using the packaged {packaged}.\n"


def test_a_local_config_comes_before_a_packaged_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    local = pathlib.Path(_file(tmp_path, "config.batch_size = 17"))
    local.rename(tmp_path / "configs" / "digits_vit.py")
    assert configs.load("configs/digits_vit.py").batch_size == 17
    assert configs.load("digits_vit").batch_size != 17
    assert capsys.readouterr().err.startswith("No file 'digits_vit'; using the packaged ")


@pytest.mark.parametrize(
    "name", ["digit_vit", "configs/digit_vit.py", "../digits_vit", "/digits_vit", "configs/"]
)
def test_other_names_are_no_packaged_configs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"No config file"):
        configs.load(name)


def test_a_packaged_config_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Did you mean 'digits_vit'\?"):
        configs.load("digit_vit")


def test_file_without_get_config_says_so(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(UserError, match="get_config"):
        configs.load(str(path))


def test_image_sizes_that_contradict_each_other():
    with pytest.raises(UserError, match=r"model\.image_size is 64 .* 48"):
        configs.build_model(configs.load(DIGITS, ["data.image_size=48"]))


def test_take_overrides_leaves_other_arguments():
    argv = ["train.py", "--config=a.py", "--config.data.flip=true", "--model.gate=random", "-v"]
    assert configs.take_overrides(argv, ("config", "model")) == [
        "data.flip=true",
        "model.gate=random",
    ]
    assert argv == ["train.py", "--config=a.py", "-v"]


def test_config_survives_json_and_differences_skip_what_changes_nothing():
    config = tiny_run.msvit()
    back = configs.from_json(configs.to_json(config))
    assert configs.flatten(back) == configs.flatten(config)
    assert configs.differences(config, back) == []
    back.log_every_steps = 77
    assert configs.differences(config, back) == []
    back.optimizer.b1 = 0.5
    del back.model["depth"]
    assert configs.differences(config, back) == [
        "model.depth: 2 here, '(not set)' in the workdir",
        "optimizer.b1: 0.9 here, 0.5 in the workdir",
    ]


def test_keys_of_before_are_read_everywhere(tmp_path):
    config = configs.load("configs/digits_msvit.py", ["trim.parts=2", "optimizer.accumulation=4"])
    assert (config.capacity.num_buckets, config.optimizer.accum_steps) == (2, 4)
    stored = json.loads(configs.to_json(config))
    stored["trim"] = {"parts": 2, "room": 0.25, "every_steps": 50, "changes": 3}
    stored["fall"] = {"hold_epochs": 1.0, "epochs": 2.0, "programs": 5}
    stored["optimizer"]["accumulation"] = stored["optimizer"].pop("accum_steps")
    del stored["capacity"], stored["keep_rate"]
    read = configs.with_defaults(configs.from_json(json.dumps(stored)))
    assert (read.capacity.every_steps, read.capacity.max_recompiles) == (50, 3)
    assert (read.capacity.max_overflow, read.keep_rate.num_rates) == (0.02, 5)
    assert read.optimizer.accum_steps == 4
    assert "trim" not in read
    stored["model"]["gate"], stored["loss"]["gate"]["start"] = "centre", "centre"
    read = configs.from_json(json.dumps(stored))
    assert (read.model.gate, read.loss.gate.start) == ("center", "center")
    old = tmp_path / "old.py"
    old.write_text(
        "from msvit_jax.config import base\n"
        "def get_config():\n"
        "    config = base()\n"
        "    config.trim.parts = 4\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match=r"config.trim is config.capacity now"):
        configs.load(str(old))


def test_values_of_before_are_read_in_files_and_overrides(tmp_path):
    old = tmp_path / "old.py"
    old.write_text(
        "from msvit_jax.config import base\n"
        "def get_config():\n"
        "    config = base()\n"
        "    config.model = {'name': 'msvit_deit_tiny_patch16_224', 'gate': 'centre'}\n"
        "    config.loss.gate.start = 'centre'\n"
        "    return config\n"
    )
    config = configs.load(str(old))
    assert (config.model.gate, config.loss.gate.start) == ("center", "center")
    config = configs.load(str(old), ["model.gate=centre", "loss.gate.start=centre"])
    assert (config.model.gate, config.loss.gate.start) == ("center", "center")


def test_names_of_before_are_names_of_keys_that_are_there():
    known = set(configs.flatten(configs.base()))
    for name in msvit_jax.list_models():
        known |= {f"model.{option}" for option in registry.model_options(name)}
    assert set(config_aliases.RENAMED.values()) <= known
    assert not set(config_aliases.RENAMED) & known
    assert set(config_aliases.RENAMED_VALUES) <= known


def test_attributes_of_before_are_read_in_files_runs_and_overrides(tmp_path):
    config = configs.load("configs/digits_dvt.py", ["model.grids=(2, 4)"])
    assert config.model.grid_sizes == (2, 4)
    stored = json.loads(configs.to_json(config))
    stored["model"]["grids"] = stored["model"].pop("grid_sizes")
    assert configs.from_json(json.dumps(stored)).model.grid_sizes == (2, 4)
    old = tmp_path / "old.py"
    old.write_text(
        "from msvit_jax.config import base\n"
        "def get_config():\n"
        "    config = base()\n"
        "    config.model = {'name': 'dvt_deit_small', 'grids': (2, 4)}\n"
        "    return config\n"
    )
    assert configs.load(str(old)).model.to_dict() == {
        "name": "dvt_deit_small",
        "grid_sizes": (2, 4),
    }
    with pytest.raises(UserError, match=r"no option 'grids'\. It is 'grid_sizes' now"):
        msvit_jax.create_model("dvt_deit_small", grids=(2, 4))
