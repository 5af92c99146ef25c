"""What people of this trade report of training, evaluation and export, tried on whole runs."""

import csv
import json
import pathlib
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from msvit_jax import (
    Predictor,
    checkpoint,
    create_model,
    data,
    evaluate,
    export,
    paths,
    visualize,
    weights,
)
from msvit_jax import config as configs
from msvit_jax.data import prepare, sources
from msvit_jax.errors import UserError
from msvit_jax.train import loop, owner
from msvit_jax.visualize import examples
from tests import jitted, tiny_run
from tests.bucket import bucket
from tests.export import made
from tests.test_checkpoint import _state

ROOT = pathlib.Path(__file__).parents[1]
DVT = {"image_size": 16, "width": 16, "depth": 1, "heads": 2, "num_classes": 3}
COLORS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    loop.train(tiny_run.msvit(steps=2, eval_every_epochs=4.0), workdir)
    return workdir


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Data sets beside the tiny one: five classes, other names, the same names renumbered."""
    root = tmp_path_factory.mktemp("sets")
    for name, classes in (
        ("five", ["a", "b", "c", "d", "e"]),
        ("named", ["cyan", "magenta", "yellow"]),
    ):
        for split in ("train", "validation"):
            for index, label in enumerate(classes * 4):
                folder = root / name / split / label
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (0, 9 * index, 0)).save(folder / f"{index}.png")
        prepare.prepare([str(root / name)], name=name, data_dir=str(root))
    # The tiny set with its labels' names in another order.
    source = sources.open_dataset("tiny", tiny_run.data_dir())
    folder = root / "turned" / "1.0.0"
    folder.mkdir(parents=True)
    for file in pathlib.Path(source.data_dir).iterdir():
        text = file.read_bytes()
        if file.name == "label.labels.txt":
            text = b"green\nred\nblue\n"
        elif file.suffix == ".json":
            text = text.replace(b"tiny", b"turned")
        (folder / file.name.replace("tiny", "turned")).write_bytes(text)
    return str(root)


def _on(sets, name, **more):
    return [
        f"data.name={name}",
        f"data.data_dir={sets}",
        *(f"data.{k}={v}" for k, v in more.items()),
    ]


# Rows 74, 75: classes.


@pytest.mark.field(74)
def test_training_with_another_number_of_classes_than_the_datas(tmp_path, sets):
    config = tiny_run.config(data__name="five", data__data_dir=sets, model__num_classes=3)
    with pytest.raises(UserError, match="model has 3 classes but the data set has 5"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.field(75)
def test_evaluating_on_classes_that_are_not_the_runs(run, sets, tmp_path):
    with pytest.raises(UserError, match="3 classes but the data set has 5"):
        evaluate.evaluate_run(run, overrides=_on(sets, "five"))
    with pytest.raises(UserError, match=r"other names.*'blue', 'green', 'red' against 'cyan'"):
        evaluate.evaluate_run(run, overrides=_on(sets, "named"))
    figures = evaluate.evaluate_run(run, overrides=_on(sets, "named", match_classes="by_number"))
    assert figures["examples"] == 12


def test_classes_in_another_order_are_brought_together(run, sets):
    with pytest.raises(UserError, match="another order"):
        evaluate.evaluate_run(run, overrides=_on(sets, "turned"))
    loaded = checkpoint.load_run(run)
    config = loaded.config.data.copy_and_resolve_references()
    config.name, config.data_dir = "turned", sets
    (batch,) = data.eval_batches(config, batch_size=tiny_run.VALIDATION)
    names = data.class_names(config)
    assert names == ("green", "red", "blue")
    answers = Predictor(loaded.model, loaded.variables, class_names=loaded.class_names)(
        batch["image"]
    )
    right = np.mean(
        [names[label] == said for label, said in zip(batch["label"], answers.names, strict=True)]
    )
    figures = evaluate.evaluate_run(run, overrides=_on(sets, "turned", match_classes="by_name"))
    assert figures["top1"] == pytest.approx(100 * right)


def test_weights_files_are_compared_by_what_they_say_of_their_classes(run, sets, tmp_path):
    file = tmp_path / "w.safetensors"
    export.write(export.ExportBundle.load(run), "safetensors", file)
    assert weights.class_names(str(file)) == weights.class_names(str(run)) == tuple(COLORS)
    config = tmp_path / "config.py"
    config.write_text("from tests import tiny_run\n\nget_config = tiny_run.msvit\n")
    with pytest.raises(UserError, match="other names"):
        evaluate.evaluate_weights(str(file), str(config), overrides=_on(sets, "named"))
    on = [*_on(sets, "five"), "model.num_classes=3"]
    with pytest.raises(UserError, match="3 classes but the data set has 5"):
        evaluate.evaluate_weights(str(file), str(config), overrides=on)


def test_resuming_and_teachers_and_pictures_compare_names(run, sets, tmp_path):
    named = {"data__name": "named", "data__data_dir": sets}
    with pytest.raises(UserError, match=r"teacher.*other names"):
        loop.train(
            tiny_run.msvit(loss__distillation__teacher=str(run), steps=1, **named), tmp_path / "a"
        )
    again = tiny_run.msvit(eval_every_epochs=4.0, steps=3)
    again.data.data_dir = sets  # the same name, other data: what may change lies there
    (pathlib.Path(sets) / "tiny").symlink_to(pathlib.Path(sets) / "named")
    with pytest.raises(UserError, match="run has classes of other names"):
        loop.train(again, run)
    loaded = checkpoint.load_run(run)
    loaded.config.data.data_dir = sets
    with pytest.raises(UserError, match="run has classes of other names"):
        examples.draw_run(loaded, tmp_path / "pictures")


def test_a_head_for_classes_of_other_names_is_not_started_from(run, sets, tmp_path, capsys):
    config = tiny_run.msvit(
        data__name="named", data__data_dir=sets, init_from=str(run), steps=1, log_images=0
    )
    loop.train(config, tmp_path / "fresh")
    said = capsys.readouterr().out
    assert "the head starts fresh" in said
    assert "backbone/head/kernel (not in the source)" in said


def test_calibrating_exits_on_other_classes_is_refused(sets, run):
    model = create_model(
        "dvt_deit_small", **DVT, grid_sizes=(2, 4), feature_width=4, feature_hidden=8
    )
    config = checkpoint.read_config(run).data
    config.name, config.data_dir = "five", sets
    from msvit_jax import sharding
    from msvit_jax.exits import budget_curve

    with pytest.raises(UserError, match="3 classes but the data set has 5"):
        budget_curve.curve_of_run(
            model, {}, run, split=None, batch_size=8, mesh=sharding.make_mesh(), data_config=config
        )


def test_a_label_beyond_the_classes_stops_a_run_and_names_the_example():
    builder = sources.open_dataset("tiny", tiny_run.data_dir())
    examples_ = sources.open_split(builder, "train")
    for label, hint in ((3, "classes are 0 to 2"), (-1, "to be guessed")):
        record = {**examples_.source[0], "label": label}
        broken = sources.Examples(examples_.name, [record], examples_.num_classes)
        with pytest.raises(UserError, match=rf"file_name '.*png'.*its label is {label}.*{hint}"):
            broken[0]


# Rows 77, 78, 80: paths.


@pytest.mark.field(77)
def test_a_home_is_a_home_everywhere(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    loop.train(tiny_run.msvit(steps=2, eval_every_epochs=4.0), "~/run")  # what `run` compiled
    assert (tmp_path / "run" / "config.json").is_file()
    evaluate.evaluate_run("~/run")
    export.write(export.ExportBundle.load("~/run"), "safetensors", "~/w.safetensors")
    assert (tmp_path / "w.safetensors").is_file()
    assert Predictor.load("~/w.safetensors").class_names == tuple(COLORS)
    assert checkpoint.load_run("~/run").class_names == tuple(COLORS)
    visualize.save(np.zeros((2, 2, 3), np.uint8), "~/p.png")
    assert not (tmp_path / "~").exists()


@pytest.mark.field(78)
def test_a_run_at_an_address_without_a_back_end_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(paths.BACK_ENDS, "gs", "package_that_is_not_there")
    for call in (
        lambda: loop.train(tiny_run.config(), "gs://bucket/run"),
        lambda: evaluate.evaluate_run("gs://bucket/run"),
        lambda: export.write(made.source("deit_tiny_patch16_224"), "orbax", "gs://bucket/w"),
        lambda: data.class_names(tiny_run.config(data__data_dir="gs://bucket/data").data),
        lambda: weights.load("gs://bucket/w.npz", None),
        lambda: configs.load("gs://bucket/c.py"),
    ):
        with pytest.raises(UserError, match=r"gs:// needs .*pip install"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_workdirs_at_addresses_that_checkpoints_cannot_be_at(monkeypatch):
    monkeypatch.setitem(paths.BACK_ENDS, "s3", "json")
    with pytest.raises(UserError, match="local folders and at gs://"):
        loop.train(tiny_run.config(), "s3://bucket/run")


@pytest.mark.field(78)
def test_a_whole_run_at_an_address(run, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "_SETTLE", 0.0)
    monkeypatch.setenv(paths.CACHE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with bucket(tmp_path / "store"):
        source = pathlib.Path(sources.open_dataset("tiny", tiny_run.data_dir()).data_dir)
        paths.upload(source, paths.parse("gs://b/data/tiny") / source.name)
        config = tmp_path / "config.py"
        config.write_text("from tests import tiny_run\nget_config = tiny_run.msvit\n")
        paths.upload(config, paths.parse("gs://b/config.py"))
        overrides = {"data.data_dir": "gs://b/data", "eval_every_epochs": 4.0}
        first, whole = (
            configs.load("gs://b/config.py", {**overrides, "steps": steps}) for steps in (1, 2)
        )
        loop.train(first, "gs://b/run")
        figures = loop.train(whole, "gs://b/run")  # resumed
        names = {p.name for p in (tmp_path / "store" / "b" / "run").iterdir()}
        assert names == {"config.json", "metrics.jsonl", "tensorboard", "checkpoints"}
        lines = paths.parse("gs://b/run/metrics.jsonl").read_text().splitlines()
        kinds = [(record["kind"], record["step"]) for record in map(json.loads, lines)]
        assert kinds == [("train", 1), ("eval", 1), ("train", 2), ("eval", 2)]
        found = evaluate.evaluate_run("gs://b/run", thresholds=[0.5])
        assert (found["step"], found["top1"]) == (2, figures["top1"])
        rows = list(csv.DictReader(paths.parse("gs://b/run/sweep.csv").read_text().splitlines()))
        assert [float(row["top1"]) for row in rows] == [found["top1"]]
        export.write(export.ExportBundle.load("gs://b/run"), "safetensors", "gs://b/w.safetensors")
        ours = Predictor.load("gs://b/w.safetensors")(made.images(2))
        assert ours.class_names == tuple(COLORS)
        local = Predictor.load(run)(made.images(2))  # the same config, seed and steps
        np.testing.assert_allclose(ours.logits, local.logits, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "gs:").exists()


@pytest.mark.field(80)
def test_a_workdir_that_is_a_file(tmp_path):
    file = tmp_path / "run"
    file.write_text("kept")
    with pytest.raises(UserError, match="is a file; a folder is needed there"):
        loop.train(tiny_run.config(), file)
    assert file.read_text() == "kept"


# Row 81: owners.


@pytest.mark.fault(8)
@pytest.mark.field(81)
def test_a_second_training_in_a_workdir_is_refused_and_changes_nothing(run):
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with owner.hold(run), pytest.raises(UserError, match="in use by process"):
        loop.train(tiny_run.msvit(optimizer__learning_rate=1e-4), run)
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_a_run_that_fails_leaves_its_workdir_free(tmp_path):
    config = tiny_run.config(init_from="/nowhere.npz")
    for _ in range(2):
        with pytest.raises(UserError, match="There is no weights file or workdir"):
            loop.train(config, tmp_path)
    assert not (tmp_path / owner.FILE).exists()


# Rows 86 to 89 are in test_config_rules; here as commands.


def test_commands_refuse_values_in_one_line(tmp_path):
    config = str(ROOT / "configs" / "digits_vit.py")
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    value = "--config.optimizer.learning_rate=nan"
    done = subprocess.run([*command, value], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: optimizer.learning_rate=nan is not a valid value: a finite number of more than 0 "
        "expected."
    )
    assert not (tmp_path / "run").exists()


def test_batches_that_cannot_be_cut_name_sizes_that_can():
    from msvit_jax import sharding

    mesh = sharding.make_mesh()
    for size in (0, -8, 3):
        with pytest.raises(
            UserError, match=rf"cannot be divided among {mesh.size} devices; use {mesh.size}\."
        ):
            sharding.check_batch(size, mesh)


# Row 96: no images.


@pytest.mark.field(96)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"pool": "mean"}),
        ("deit_tiny_patch16_224", {"reducer": "tome", "remove": 2, "reduce_layers": (1,)}),
        ("mergence_deit_tiny_patch16_224", {"scales": (2, 4), "reduce_layers": (1,)}),
        ("msvit_tiny_patch16_224", {}),
        ("msvit_tiny_patch16_224", {"layout": "budget", "token_capacity": (4, 8), "row_groups": 2}),
        ("msvit_tiny_patch16_224", {"layout": "rows", "rows": 4, "row_width": 32, "row_groups": 2}),
        ("dvt_deit_small", {}),
    ],
)
def test_no_images_have_no_answers(name, options):
    sizes = made.CASCADE if name.startswith("dvt") else made.SIZES
    model = create_model(name, **{**sizes, **options})
    images = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    some = jax.eval_shape(model.apply, shapes, images)
    none = jax.eval_shape(model.apply, shapes, jax.ShapeDtypeStruct((0, 16, 16, 3), jnp.float32))
    wanted = jax.tree.map(lambda x: ((0, *x.shape[1:]), x.dtype), some)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), none) == wanted


def test_no_images_run_with_decisions_and_under_training():
    source = made.source("msvit_tiny_patch16_224")
    model, images = source.model, jnp.zeros((0, 16, 16, 3))
    variables = jitted.init(model, jnp.zeros((1, 16, 16, 3)))
    output = jax.jit(
        lambda v, x: model.apply(
            v, x, train=True, coarse=jnp.zeros((0, 4)), rngs={"gate": jax.random.key(1)}
        )
    )(variables, images)
    assert output.logits.shape == (0, 3)
    assert output.gate.coarse.shape == (0, 4)


# OSErrors of a run.


@pytest.fixture
def small_files():
    """Files may not grow beyond 200 kB: what a full disk is to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.fault(11)
def test_a_checkpoint_that_cannot_be_written_is_one_line_and_leaves_the_last(tmp_path, small_files):
    kept = checkpoint.Checkpoints(tmp_path)
    kept.save(_state(1), 1, {"top1": 1.0})
    kept.wait()
    noise = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    large = _state(2)
    large.params["model"]["head"]["kernel"] = jnp.asarray(noise)

    def save():
        kept.save(large, 2, {"top1": 1.0})
        kept.wait()

    with pytest.raises(UserError) as error:
        save()
    message = str(error.value)
    assert "could not be saved" in message
    assert "File too large" in message
    assert "that are whole: 1;" in message
    assert "\n" not in message
    assert checkpoint.find_step(tmp_path, "latest") == 1


def test_curves_and_pictures_try_their_place_before_the_work(run, monkeypatch):
    def unwritable(folder, name="", *, make=True):
        raise UserError("cannot be written")

    monkeypatch.setattr(paths, "check_writable", unwritable)
    monkeypatch.setattr(evaluate.Evaluator, "__call__", lambda *_: pytest.fail("worked first"))
    monkeypatch.setattr(Predictor, "__call__", lambda *_: pytest.fail("worked first"))
    with pytest.raises(UserError, match="cannot be written"):
        evaluate.evaluate_run(run, thresholds=[0.5])
    with pytest.raises(UserError, match="cannot be written"):
        examples.draw_run(checkpoint.load_run(run), "pictures")
    monkeypatch.setattr(made.ExportBundle, "about", property(lambda _: pytest.fail("worked first")))
    with pytest.raises(UserError, match="cannot be written"):
        export.write(made.source("deit_tiny_patch16_224"), "safetensors", "w.safetensors")
