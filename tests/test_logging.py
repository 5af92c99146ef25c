import pytest

from msvit_jax import logging


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (185, "3m05s"), (7805, "2h10m"), (float("inf"), "?")],
)
def test_durations(seconds, text):
    assert logging.duration(seconds) == text


def test_a_line_shows_what_there_is_and_nothing_else():
    figures = {"top1": 12.345, "total_loss": 2.5, "unknown": 3, "seconds_left": 61}
    assert logging.line("train", 10, 0.5, figures) == (
        "train  step     10  epoch   0.50  loss 2.5000  top1 12.35%  left 1m01s"
    )


def test_other_processes_write_nothing(tmp_path, capsys):
    logger = logging.Logger(tmp_path / "run", steps=3, start=0, active=False)
    logger.say("x")
    logger.advance()
    logger.report("train", 1, 0.1, {"top1": 1.0})
    logger.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_what_goes_wrong_in_the_background_is_raised(tmp_path):
    logger = logging.Logger(tmp_path, steps=3, start=0, active=True)
    logger.report("train", 1, 0.1, {"bad": object()})
    with pytest.raises(TypeError):
        logger.close()
