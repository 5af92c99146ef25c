"""The benchmark measures what it says, and what it reports adds up."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msvit_jax
from msvit_jax import benchmark, flops
from msvit_jax.benchmark import forced, sides, turns
from msvit_jax.errors import UserError
from tests import jitted

MODEL, DENSE = "msvit_deit_tiny_patch16_224", "deit_tiny_patch16_224"
TINY = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "num_classes": 3}
KEYS = {
    *("what", "model", "layout", "batch", "dtype", "images_per_second", "gmacs", "speedup"),
    *("mac_ratio", "realized", "images_per_second_quartiles", "images_per_second_range"),
    *("speedup_quartiles", "speedup_range", "tokens_mean", "tokens_std", "padding_efficiency"),
    *(
        "sizes",
        "memory_bytes",
        "compile_seconds",
        "overflow",
        "programs",
        "images_per_round",
        "rounds",
    ),
}


def _options(**changes):
    given = {
        "model": MODEL,
        "batches": (4,),
        "layouts": ("slots", "budget", "rows"),
        "tokens": 9.0,
        "spread": 3.0,
        "rounds": 2,
        "overrides": tuple(f"{key}={value}" for key, value in TINY.items()),
    }
    return benchmark.Options(**{**given, **changes})


@functools.cache
def _report(train):
    if train:
        return benchmark.run(_options(train=True, layouts=("trimmed", "rows")))
    return benchmark.run(_options(batches=(1, 4)))


def _models():
    return (msvit_jax.create_model(name, **TINY) for name in (DENSE, MODEL))


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_records_add_up(train):
    report = json.loads(json.dumps(_report(train)))
    assert set(report) >= {"machine", "devices", "versions", "commit"}
    assert report["versions"]["jax"] == jax.__version__
    dense, mixed = _models()
    for record in report["records"]:
        assert set(record) >= KEYS
        images = record["images_per_round"]
        counts = forced.token_counts(images, 4, tokens=9.0, spread=3.0)
        macs = flops.macs_per_image(mixed, counts).mean()
        full = float(dense.macs(16))
        if record["layout"] == "dense":
            macs, counts = full, np.full(1, 16)
            assert record["model"] == DENSE
        assert record["gmacs"] == pytest.approx(macs / 1e9)
        assert record["mac_ratio"] == pytest.approx(full / macs)
        assert record["realized"] == record["speedup"] / record["mac_ratio"]
        assert record["tokens_mean"] == pytest.approx(counts.mean())
        assert record["tokens_std"] == pytest.approx(counts.std())
        for name in ("images_per_second", "speedup"):
            least, most = record[f"{name}_range"]
            low, high = record[f"{name}_quartiles"]
            assert 0 < least <= low <= record[name] <= high <= most
        assert record["memory_bytes"] > 1000
        assert record["compile_seconds"] > 0


def test_one_record_for_each_batch_and_layout():
    assert [(r["batch"], r["layout"]) for r in _report(False)["records"]] == [
        (batch, layout) for batch in (1, 4) for layout in ("dense", "slots", "budget", "rows")
    ]


def test_sizes_hold_what_is_active():
    single, batch = (r for r in _report(False)["records"] if r["layout"] == "budget")
    assert single["images_per_round"] == 16
    assert single["sizes"] == [
        {"token_capacity": (8,)},
        {"token_capacity": (16,)},
    ]  # a program for each 8 tokens
    counts = np.sort(forced.token_counts(4, 4, tokens=9.0, spread=3.0))
    assert batch["sizes"] == [{"token_capacity": tuple(int(8 * np.ceil(c / 8)) for c in counts)}]
    assert batch["padding_efficiency"] == counts.sum() / sum(batch["sizes"][0]["token_capacity"])
    rows = _report(False)["records"][-1]
    (size,) = rows["sizes"]
    assert rows["padding_efficiency"] == (counts.sum() + 4) / (size["rows"] * size["row_width"])


def test_the_gate_is_run():
    """Its multiply-accumulates are in the program although its decisions are not used."""
    work = sides.draw(_options(), 2)
    wide = work.model.clone(gate_hidden=512)
    images, coarse = jnp.zeros((2, 16, 16, 3)), jnp.asarray(work.coarse[0])
    variables = jax.eval_shape(wide.init, jax.random.key(0), images)
    counted = flops.xla_macs(sides.forward(wide), variables, images, coarse)
    gate_alone = 2 * (wide.macs(0) - wide.backbone.macs(0))
    assert counted > gate_alone > 2 * work.model.macs(16)


def test_logits_are_those_of_the_dense_model_where_all_is_fine():
    options = _options(tokens=16.0, spread=0.0)
    work = sides.draw(options, 2)
    variables = jitted.init(work.model, jnp.zeros((2, 16, 16, 3)))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    dense = {"params": variables["params"]["backbone"]}
    expected = jax.jit(sides.forward(work.model.backbone))(dense, images)["logits"]
    found = jax.jit(sides.forward(work.model))(variables, images, jnp.asarray(work.coarse[0]))[
        "logits"
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_sides_take_turns():
    order = []

    def call(name, seconds):
        return lambda: order.append(name) or seconds

    first = [call("a0", 1.0), call("a1", 2.0)]
    second = [call("b0", 10.0), call("b1", 20.0)]
    times = turns.time_interleaved([first, second], rounds=2, warmup=1)
    np.testing.assert_array_equal(times, [[3, 30], [3, 30]])
    assert order[:8] == ["a0", "b0", "a1", "b1", "b0", "a0", "b1", "a1"]
    assert len(order) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layouts": ("slot",)}, "Unknown layout 'slot' of forward.*Did you mean 'slots'"),
        ({"layouts": ("trimmed",)}, "Unknown layout 'trimmed' of forward"),
        ({"model": DENSE}, rf"'{DENSE}' is dense: nothing to compare. Give a model with a gate"),
        ({"model": "dvt_deit_small"}, "msvit_jax.benchmark.exits --model=dvt_deit_small"),
        ({"model": "msvit_tiny"}, "There is no model 'msvit_tiny'"),
        ({"dtype": "float64"}, "dtype='float64' is not one of"),
        ({"batches": (0,)}, "batch and rounds must be 1 or more"),
        ({"tokens": 17.0}, "tokens=17 is not possible"),
        ({"overrides": ("depht=3",)}, "no option 'depht'"),
        ({"layouts": ("budget",), "token_capacity": (17,)}, "token_capacity=17 is not possible"),
        (
            {"layouts": ("budget",), "token_capacity": (8, 9, 16)},
            "4 cannot be cut into 3 equal parts",
        ),
        (
            {"layouts": ("budget",), "token_capacity": (4,)},
            r"\d of 4 images do not fit .*token_capacity=\(4,\)",
        ),
        ({"layouts": ("rows",), "row_width": 16}, "row_width=16 is too small.* need 17 tokens"),
        ({"layouts": ("rows",), "row_width": 17, "rows": 1}, "3 of 4 images do not fit"),
        ({"layouts": ("rows",), "rows": 1}, "--rows goes with --row_width"),
        pytest.param(
            {"train": True, "layouts": ("trimmed",), "token_capacity": (4,)},
            r"\d+% of the images do not fit",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(UserError, match=message):
        benchmark.run(_options(**changes))


def _command(*arguments):
    command = [sys.executable, "-m", "msvit_jax.benchmark", f"--model={MODEL}", "--rounds=1"]
    command += [f"--set={key}={value}" for key, value in TINY.items()]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_last_line_is_json():
    done = _command(
        "--tokens=9", "--spread=3", "--batch=2", "--layouts=budget", "--token_capacity=16"
    )
    assert done.returncode == 0, done.stderr
    table, last = done.stdout.rsplit("\n", 2)[:2]
    records = json.loads(last)["records"]
    assert [record["layout"] for record in records] == ["dense", "budget"]
    assert records[1]["sizes"] == [{"token_capacity": [16]}]
    assert len(table.splitlines()) == 3


@pytest.mark.slow
def test_error_without_a_traceback():
    done = _command("--batch=few")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --batch=few: give whole numbers."


@pytest.mark.slow
def test_a_model_that_merges_is_compared_with_its_plain_model():
    options = _options(model="mergence_deit_tiny_patch16_224", layouts=("reduced",))
    options = dataclasses.replace(options, overrides=(*options.overrides, "scales=(2,4)"))
    dense, reduced = benchmark.run(options)["records"]
    assert (dense["model"], reduced["model"]) == (DENSE, "mergence_deit_tiny_patch16_224")
    model = msvit_jax.create_model(reduced["model"], **TINY, scales=(2, 4))
    assert reduced["gmacs"] == pytest.approx(float(model.macs(16)) / 1e9)
    assert dense["gmacs"] == pytest.approx(float(next(_models()).macs(16)) / 1e9)


def test_the_dense_side_never_merges():
    options = _options(overrides=(*_options().overrides, "reducer=topk", "keep=0.5"))
    assert sides.build(options).backbone.reductions
    assert not sides.build(options, dense=True).reductions


SEGMENTER = {**TINY, "image_size": 32, "decode": "mixed"}


def segmenter_options(model, more=(), **changes):
    overrides = (*(f"{key}={value}" for key, value in SEGMENTER.items()), *more)
    return _options(model=model, overrides=overrides, tokens=30.0, spread=8.0, **changes)


def test_a_segmenter_is_measured_beside_its_dense_model():
    report = benchmark.run(segmenter_options("msvit_seg_vit_tiny_mask", layouts=("budget",)))
    dense, mixed = report["records"]
    assert [dense["model"], mixed["model"]] == ["seg_vit_tiny_mask", "msvit_seg_vit_tiny_mask"]
    models = [
        msvit_jax.create_model(name, **SEGMENTER) for name in (dense["model"], mixed["model"])
    ]
    counts = forced.token_counts(4, 16, tokens=30.0, spread=8.0)
    assert dense["gmacs"] == pytest.approx(float(models[0].macs(64)) / 1e9)
    assert mixed["gmacs"] == pytest.approx(float(models[1].macs(counts).mean()) / 1e9)
    assert mixed["mac_ratio"] > 1


def test_a_segmenter_and_its_dense_model_have_the_same_weights():
    options = segmenter_options("msvit_seg_vit_tiny_mask", layouts=("slots",))
    work = sides.draw(options, 4)
    plain = sides.build(options)
    images = jnp.zeros((4, 32, 32, 3))
    variables = jitted.init(plain, images)
    dense = {"params": sides._dense_params(variables["params"])}
    fine = np.zeros((4, 16), np.float32)
    whole = jax.jit(sides.forward(work.dense))(dense, images)["logits"]
    gated = jax.jit(sides.forward(work.model))(variables, images, fine)["logits"]
    assert whole.shape == (4, 8, 8, 3)
    np.testing.assert_allclose(gated, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_segmenters_training_steps_are_measured():
    report = benchmark.run(
        segmenter_options("msvit_seg_vit_tiny_linear", train=True, layouts=("trimmed",))
    )
    assert [record["what"] for record in report["records"]] == ["train", "train"]


def test_a_segmenter_that_merges_is_measured():
    merging = ("reducer=algm", "keep=0.6", "depth=2")
    options = segmenter_options("seg_vit_tiny_mask", merging, layouts=("reduced",))
    dense, merged = benchmark.run(options)["records"]
    assert dense["gmacs"] > merged["gmacs"]


def test_a_segmenter_without_a_dense_name_is_refused():
    with pytest.raises(UserError, match="no dense model to be compared with; give a name"):
        _options(model="segmenter", overrides=("encoder=msvit",), layouts=("slots",))
