"""The trimmed layout in training: budgets that follow the counts; the same steps as slots."""

import contextlib
import io
import json

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from msvit_jax import checkpoint
from msvit_jax import config as configs
from msvit_jax.errors import UserError
from msvit_jax.train import capacity_schedule, loop
from msvit_jax.train.program import TrainProgram
from tests import tiny_run
from tests.train.test_loop import _records, _saved

OPTIONS = configs.base().capacity


@hypothesis.given(
    seed=st.integers(0, 2**31),
    parts=st.sampled_from([1, 2, 4]),
    mean=st.integers(60, 190),
    spread=st.integers(0, 40),
)
def test_budgets_give_nearly_every_image_of_the_next_batches_its_places(seed, parts, mean, spread):
    rng = np.random.default_rng(seed)

    def draw(n):
        return 49 + 3 * np.clip(np.round((rng.normal(mean, spread, n) - 49) / 3), 0, 49).astype(int)

    seen = draw(6400)
    capacities = capacity_schedule.bucket_capacities(
        np.bincount(seen, minlength=197), smallest=49, parts=parts, images=64
    )
    assert len(capacities) == parts
    assert list(capacities) == sorted(capacities)
    assert capacities[-1] >= min(seen.max(), 196)
    assert all(b == 196 or (b % 8 == 0 and b >= 49) for b in capacities)
    without = 0
    for _ in range(50):  # images that have no place in a best assignment, counted by hand
        left = sorted(np.repeat(capacities, 64 // parts))
        for count in sorted(draw(64), reverse=True):
            if left and left[-1] >= count:
                left.pop()
            else:
                without += 1
    assert without <= 0.02 * 50 * 64


def test_budgets_are_tight_without_spread():
    histogram = np.zeros(197)
    histogram[127] = 1000
    assert capacity_schedule.bucket_capacities(histogram, smallest=49, parts=4, images=8) == (
        128,
        128,
        128,
        128,
    )


def make(**options):
    section = OPTIONS.copy_and_resolve_references()
    section.update(options)
    return capacity_schedule.CapacitySchedule.start(section, regions=49, images=64)


def counts(at, images=1000):
    histogram = np.zeros(197)
    histogram[at] = images
    return histogram


def test_budgets_change_only_when_it_pays_or_images_go_without():
    schedule = make()
    assert schedule.capacities == (245,)
    schedule.observe(counts(120), 0)
    assert "245 -> 120/120/120/120/120/120/120/120 tokens" in schedule.look(200)
    schedule.observe(counts(115), 0)  # 1 - 120 / 120: the same budgets
    assert schedule.look(200) is None
    schedule.observe(counts(111), 0)  # saves 7 %, less than a compilation is worth
    assert schedule.look(200) is None
    schedule.observe(counts(121), 10)  # 1 % without places
    assert schedule.look(200) is None
    schedule.observe(counts(121), 30)
    assert "120/120 -> 128/128/" in schedule.look(200)
    assert schedule.look(200) is None  # nothing seen since


def test_budgets_grow_within_an_interval_but_do_not_shrink():
    schedule = make()
    assert [step for step in range(1, 101) if schedule.due(step)] == [25, 50, 75, 100]
    odd = make(every_steps=20)  # an eighth of it does not divide it
    assert [step for step in range(15, 25) if odd.due(step)] == [16, 18, 20, 22, 24]
    schedule.observe(counts(120), 0)
    assert schedule.look(25) is None
    schedule.observe(counts(120), 0)
    assert "245 -> 120/" in schedule.look(200)
    schedule.observe(counts(100), 0)
    assert schedule.look(225) is None
    schedule.observe(counts(150), 500)
    assert "120/120/120/120/120/120/120/120 -> 152/" in schedule.look(250)


def test_no_more_changes_than_promised_then_places_for_everything():
    schedule = make(max_recompiles=1)
    schedule.observe(counts(120), 0)
    assert schedule.look(200)
    schedule.observe(counts(60), 0)
    assert schedule.look(200) is None
    schedule.observe(counts(150), 900)
    assert "-> 245 tokens" in schedule.look(200)
    assert schedule.capacities == (245,)


def test_one_step_of_several_carries_alternatives_with_the_gradient_of_all():
    schedule = make(alternatives=0.25, alternatives_every=4)
    everything = capacity_schedule.StepCapacity((245,), 1.0)
    assert [schedule.at(step) for step in range(5)] == 5 * [everything]  # nothing is known yet
    schedule.observe(counts(120), 0)
    schedule.look(200)
    places = [schedule.at(step) for step in range(200, 208)]
    assert [p.gate_gradient for p in places] == [4, 0, 0, 0, 4, 0, 0, 0]
    # Of 196 cells a quarter, in whole eights.
    assert {p.capacities[0]: p.gate_gradient for p in places} == {120 + 56: 4, 120: 0}
    schedule.observe(counts(196), 500)
    schedule.look(225)
    assert schedule.at(228).capacities[0] == 245  # never beyond both scales of every region
    assert schedule.at(229).capacities[0] == 196
    always = make(alternatives_every=1)
    always.restore(schedule.to_json())
    assert {always.at(step).gate_gradient for step in range(8)} == {1}


def test_parts_are_equal_parts_of_a_device_s_images():
    section = OPTIONS.copy_and_resolve_references()
    assert capacity_schedule.CapacitySchedule.start(section, regions=4, images=12).parts == 4


def scanned(**changes):
    """A mixed-scale config whose blocks are traced and compiled as one."""
    return tiny_run.msvit(model__scan_layers=True, **changes)


def trimmed(**changes):
    options = {"model__layout": "trimmed", "capacity__every_steps": 3, "mesh__data": 8}
    return scanned(**{**options, **changes})


@pytest.fixture(scope="module")
def printed_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trimmed")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        figures = loop.train(trimmed(), workdir)
    return workdir, figures, said.getvalue()


@pytest.fixture
def whole_run(printed_run):
    return printed_run[:2]


def test_a_trimmed_run_changes_budgets_and_says_so(printed_run):
    _, figures, said = printed_run
    assert "capacities 20 -> " in said
    assert figures["examples"] == tiny_run.VALIDATION
    assert "overflow" not in figures  # evaluation answers every image


@pytest.mark.slow
def test_a_resumed_trimmed_run_equals_an_uninterrupted_one(whole_run, tmp_path):
    workdir, figures = whole_run
    loop.train(trimmed(steps=5), tmp_path)  # between two looks
    assert loop.train(trimmed(), tmp_path) == figures
    jax.tree.map(np.testing.assert_array_equal, _saved(tmp_path, 12), _saved(workdir, 12))
    kept = [checkpoint.Checkpoints(w).about(12)["capacity"] for w in (tmp_path, workdir)]
    assert kept[0] == kept[1]


def test_trimmed_steps_report_what_slots_report(whole_run, tmp_path):
    """Until the first change of budgets every image has all its places: the same run."""
    workdir, _ = whole_run
    loop.train(scanned(steps=2), tmp_path)
    ours, theirs = _records(workdir, "train")[2], _records(tmp_path, "train")[2]
    for name in ("total_loss", "grad_norm", "gate_loss", "loss"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4)
    assert ours["tokens_mean"] == theirs["tokens_mean"]


def test_images_without_places_are_left_out_of_the_loss_and_counted(tmp_path):
    config = trimmed(model__token_capacity=4, model__gate_bias=1.5, model__row_groups=1, steps=2)
    figures = loop.train(config, tmp_path)
    record = _records(tmp_path, "train")[2]
    assert 0 < record["overflow"] < 1
    assert np.isfinite(record["total_loss"])
    assert np.isfinite(record["grad_norm"])
    assert np.isfinite(figures["loss"])


def test_rows_train_with_a_frozen_gate(tmp_path):
    options = {"model__layout": "rows", "model__rows": 16, "model__row_width": 20}
    config = scanned(**options, optimizer__freeze=("gate",), steps=2)
    loop.train(config, tmp_path / "rows")
    loop.train(scanned(optimizer__freeze=("gate",), steps=2), tmp_path / "slots")
    ours, theirs = (_records(tmp_path / w, "train")[2] for w in ("rows", "slots"))
    assert "overflow" not in ours
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
    saved = json.loads(json.dumps(checkpoint.read_config(tmp_path / "rows").to_dict()))
    assert saved["model"]["layout"] == "rows"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__layout": "rows", "model__rows": 8, "model__row_width": 20}, "freeze it"),
        (
            {"model__layout": "trimmed", "model__token_capacity": (8, 12, 16)},
            "cannot be cut into 3",
        ),
        (
            {"model__layout": "trimmed", "model__token_capacity": 21},
            "token_capacity=21 is not possible",
        ),
    ],
)
def test_layouts_that_cannot_train_are_told(changes, message):
    config = configs.resolve(tiny_run.msvit(**changes), 3)
    mesh = loop.sharding.make_mesh()
    with pytest.raises(UserError, match=message):
        TrainProgram.from_config(config, mesh, lambda step: 1e-3)
