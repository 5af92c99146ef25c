import json
import math

import numpy as np
import pytest

import msvit_jax
from msvit_jax.errors import UserError
from msvit_jax.train.keep_rate_schedule import KeepRateSchedule, with_rates
from msvit_jax.train.loop import train
from tests import tiny_run

TINY = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 4, "heads": 2, "num_classes": 3}


def _schedule(model="mergence_tiny_patch16_224", hold=10.0, epochs=100.0, num_rates=5, **overrides):
    made = msvit_jax.create_model(model, **TINY, **overrides)
    options = {"hold_epochs": hold, "epochs": epochs, "num_rates": num_rates}
    return KeepRateSchedule.from_config(options, made, steps_per_epoch=2.0)


def test_rates_fall_from_one_to_the_models_along_evits_cosine():
    schedule = _schedule(keep=(0.9, 0.6, 0.5), scales=(4,))
    rates = np.array([schedule.at(step) for step in range(300)])
    assert (rates[:20] == 1).all()
    np.testing.assert_allclose(rates[220:], [[0.9, 0.6, 0.5]] * 80)
    assert (np.diff(rates, axis=0) <= 0).all()
    assert len(np.unique(rates[:, 0])) == 6  # five rates after the first
    # Never below EViT's continuous schedule, and at most one step of it above.
    epoch = (np.arange(20, 220) - 20) / 2
    smooth = lambda e: 0.5 + 0.5 * (1 + np.cos(math.pi * e / 100)) / 2  # noqa: E731
    assert (rates[20:220, 2] >= smooth(epoch) - 1e-6).all()
    assert (rates[20:220, 2] <= smooth(np.maximum(epoch - 20, 0)) + 1e-6).all()


def test_other_rates_are_the_same_model_for_the_same_parameters():
    for name in ("mergence_tiny_patch16_224", "vit_tiny_patch16_224", "msvit_tiny_patch16_224"):
        model = msvit_jax.create_model(name, **TINY, reducer="mergence")
        changed = with_rates(model, (1.0, 0.5, 0.25))
        assert changed.backbone.keep == (1.0, 0.5, 0.25)
        assert type(changed) is type(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vit_tiny_patch16_224"}, "this one does not"),
        ({"reducer": "tome", "remove": 1, "scales": (4,)}, "this one does not"),
        ({"hold": -1.0}, "not negative"),
        ({"num_rates": 0}, "at least one rate"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        _schedule(**arguments)


def test_no_schedule_without_epochs():
    assert _schedule(hold=0.0, epochs=0.0) is None


def test_a_run_from_scratch_falls_resumes_and_reports_its_layers(tmp_path, capsys):
    options = {
        "model__scales": (4,),
        "model__reducer": "topk",  # the least to compile: the schedule is the same for all
        "model__keep": 0.5,
        "keep_rate__hold_epochs": 1.0,
        "keep_rate__epochs": 2.0,
        "keep_rate__num_rates": 2,
    }
    config = lambda **more: tiny_run.config("mergence_tiny_patch16_224", **options, **more)  # noqa: E731
    whole = train(config(), tmp_path / "whole")
    said = capsys.readouterr().out
    assert "keeps (0.75, 0.75) of the tokens" in said
    assert "keeps (0.5, 0.5) of the tokens" in said
    assert whole["layer_tokens_mean"] == [8.0, 4.0]  # of 16, by both of two layers
    train(config(steps=7), tmp_path / "parts")
    resumed = train(config(), tmp_path / "parts")
    assert resumed == whole
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert any("layer_tokens_mean" in json.loads(line) for line in lines)
