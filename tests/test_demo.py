"""The demo from end to end, with models and data so small that it takes seconds."""

import pytest

from msvit_jax import demo, evaluate
from msvit_jax.errors import UserError
from msvit_jax.train import loop


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    return {
        "data.data_dir": str(tmp_path_factory.mktemp("data")),
        "data.name": "scattered_digits/tiny",
        "batch_size": 32,
        "steps": 2,
        "optimizer.warmup_epochs": 0.1,
        "model.width": 16,
        "model.depth": 1,
        "model.heads": 2,
    }


@pytest.fixture(scope="module")
def demonstrated(overrides, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    return workdir, demo.run(workdir, overrides)


@pytest.mark.slow
def test_the_table_holds_what_evaluation_finds(demonstrated):
    workdir, rows = demonstrated
    assert [row["model"] for row in rows] == ["ViT", "MSViT"]
    for row, name in zip(rows, ("vit", "msvit"), strict=True):
        figures = evaluate.evaluate_run(workdir / name)
        assert row["top-1 %"] == pytest.approx(figures["top1"])
        assert row["tokens / image"] == pytest.approx(figures["tokens_mean"])
        assert row["GMACs / image"] == pytest.approx(figures["gmacs_mean"])
        assert row["images / s"] > 0
    assert rows[0]["tokens / image"] == 64


@pytest.mark.slow
def test_a_second_run_trains_no_more_and_says_where_the_pictures_are(
    demonstrated, overrides, capsys
):
    workdir, rows = demonstrated
    again = demo.run(workdir, overrides)
    said = capsys.readouterr().out
    assert said.count("resumed at step 2") == 2
    for old, new in zip(rows, again, strict=True):
        assert old | {"images / s": 0} == new | {"images / s": 0}
    sheet = workdir / "pictures" / "contact_sheet.png"
    assert f"{sheet}\n" in said
    assert len(list(sheet.parent.iterdir())) == demo.PICTURES + 1


def row(tokens, top1, speed):
    return dict(zip(demo.COLUMNS, ("", top1, tokens, tokens / 4, speed), strict=True))


@pytest.mark.parametrize(
    ("msvit", "missed"),
    [
        (row(32.0, 75.0, 150.0), []),
        (row(62.0, 75.0, 150.0), ["tokens"]),
        (row(32.0, 41.0, 150.0), ["top-1"]),
        (row(61.0, 41.0, 78.0), ["tokens", "top-1", "images a second"]),
        (row(32.0, float("nan"), 150.0), ["top-1"]),
    ],
)
def test_the_last_lines_say_whether_it_did_what_it_is_for(msvit, missed):
    said = demo.verdict(row(64.0, 70.0, 100.0), msvit)
    assert ("did NOT do what it is for" in said) == bool(missed)
    assert ("did what it is for" in said) != bool(missed)
    expected = said.partition("expected were")[2].partition("\n")[0]
    for word in ("tokens", "top-1", "images a second"):
        assert (word in expected) == (word in missed)


def test_a_stopped_demo_says_how_to_go_on(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda config, workdir: {"step": 1, "top1": 10.0})
    with pytest.raises(UserError, match="the same command goes on"):
        demo.run(tmp_path, overrides)
