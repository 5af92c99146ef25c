import json
import time

import numpy as np
import pytest

from msvit_jax import evaluate, event_files, run_log, visualize
from msvit_jax.errors import UserError


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (185, "3m05s"), (7805, "2h10m"), (float("inf"), "?")],
)
def test_durations(seconds, text):
    assert run_log.duration(seconds) == text


def test_a_line_shows_what_there_is_and_nothing_else():
    figures = {"top1": 12.345, "total_loss": 2.5, "unknown": 3, "seconds_left": 61}
    assert run_log.line("train", 10, 0.5, figures) == (
        "train  step     10  epoch   0.50  loss 2.5000  top1 12.35%  left 1m01s"
    )


def test_a_bar_alone_shows_few_lines_where_nobody_watches_and_records_all(tmp_path, capsys):
    logger = run_log.Logger(tmp_path, steps=100, start=0, active=True, terminal="bar")
    for step in range(1, 101):
        logger.report("train", step, 0.1, {"top1": 12.0, "gate_loss": 1.0})
    logger.report("eval", 100, 1.0, {"top1": 50.0})
    logger.close()
    said = capsys.readouterr().out.splitlines()
    assert [text.split()[2] for text in said] == ["25", "50", "75", "100", "100"]
    assert "top1 12.00%" in said[0]
    assert "gate" not in said[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 101
    with pytest.raises(UserError, match="is not one of lines, bar"):
        run_log.Logger(tmp_path, steps=1, start=0, active=True, terminal="none")


def test_other_processes_write_nothing(tmp_path, capsys):
    logger = run_log.Logger(tmp_path / "run", steps=3, start=0, active=False)
    logger.say("x")
    logger.advance()
    logger.report("train", 1, 0.1, {"top1": 1.0})
    logger.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_records_are_json_that_any_reader_takes(tmp_path):
    figures = {"miou": float("nan"), "iou": {"b": 1.5, "a": None}, "rates": [0.5, float("inf")]}
    logger = run_log.Logger(tmp_path, steps=1, start=0, active=True)
    logger.report("eval", 1, 0.5, figures)
    logger.close()

    def refuse(name):
        raise AssertionError(name)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=refuse)
    assert {name: read[name] for name in figures} == {
        "miou": None, "iou": {"b": 1.5, "a": None}, "rates": [0.5, None]}  # fmt: skip
    assert list(read["iou"]) == ["b", "a"]


def test_merge_maps_are_drawn_with_and_without_a_gate(tmp_path, monkeypatch):
    images = np.zeros((2, 16, 16, 3), np.uint8)
    merged = np.zeros((2, 3, 4, 4), np.int32)
    merged[:, 2, 0, :2] = (0, 1)
    coarse = np.ones((2, 4), np.float32)
    logger = run_log.Logger(tmp_path, steps=3, start=0, active=True)
    drawn = {}
    keep = lambda name, picture, step, **_: drawn.update({name: picture})  # noqa: E731
    monkeypatch.setattr(logger._board, "add_image", keep)
    gated = evaluate.Samples(images, coarse, coarse, merged)
    for samples, grid in ((evaluate.Samples(images, merge_maps=merged), None), (gated, (2, 2))):
        drawn.clear()
        result = evaluate.Evaluation({"top1": 1.0}, samples=samples)
        logger.evaluation(1, 0.1, result, grid)
        while not all(job.done() for job in logger._jobs):
            time.sleep(0.01)
        regions = None if grid is None else coarse[0].reshape(grid)
        wanted = visualize.merge_map(images[0], merged[0, -1], coarse=regions)
        np.testing.assert_array_equal(drawn["merged/0"], wanted)
        assert ("tokens/1" in drawn) == (grid is not None)
    logger.close()


def test_what_goes_wrong_in_the_background_is_raised(tmp_path):
    logger = run_log.Logger(tmp_path, steps=3, start=0, active=True)
    logger.report("train", 1, 0.1, {"bad": object()})
    with pytest.raises(TypeError):
        logger.close()


def _board(folder):
    """Steps of the scalars on a board, by the reader that TensorBoard files have here."""
    events = [e for f in sorted(folder.iterdir()) for e, _ in event_files._records(f.read_bytes())]
    return [e.step for e in events if e.summary.value]


@pytest.mark.fault(9)
def test_a_resumed_run_has_the_logs_of_an_uninterrupted_one(tmp_path):
    for start, steps in ((0, (1, 2, 3, 4, 5)), (3, (4, 5, 6))):
        logger = run_log.Logger(tmp_path, steps=6, start=start, active=True)
        for step in steps:
            logger.report("train", step, 0.1, {"top1": float(step)})
        logger.sync()
        logger.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert _board(tmp_path / "tensorboard") == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@pytest.mark.fault(9)
def test_torn_and_damaged_ends_of_logs_are_cut_off(tmp_path):
    logger = run_log.Logger(tmp_path, steps=6, start=0, active=True)
    for step in (1, 2):
        logger.report("train", step, 0.1, {"top1": float(step)})
    logger.close()
    lines, (events,) = tmp_path / "metrics.jsonl", (tmp_path / "tensorboard").iterdir()
    lines.write_bytes(lines.read_bytes() + b'{"kind": "train", "step": 2, "to')
    events.write_bytes(events.read_bytes()[:-5])
    run_log.Logger(tmp_path, steps=6, start=2, active=True).close()
    assert [json.loads(line)["step"] for line in lines.read_text().splitlines()] == [1, 2]
    assert _board(tmp_path / "tensorboard") == [1, 1, 2]


def test_what_is_synced_is_on_the_disk(tmp_path):
    logger = run_log.Logger(tmp_path, steps=9, start=0, active=True)
    for step in range(1, 9):
        logger.report("train", step, 0.1, {"top1": 1.0})
    logger.sync()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8
    assert _board(tmp_path / "tensorboard") == sorted([*range(1, 9)] * 2)
    logger.close()
