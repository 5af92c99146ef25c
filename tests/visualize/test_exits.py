"""Easy and hard examples: every image is under the exit that it left at."""

import numpy as np
import pytest

from msvit_jax import checkpoint
from msvit_jax import config as configs
from msvit_jax.exits import exit_thresholds
from msvit_jax.exits.budget_curve import FITTED_FILE
from msvit_jax.inference import Predictions
from msvit_jax.visualize import enlarge, exits
from msvit_jax.visualize.examples import Example
from msvit_jax.weights.adapt import model_shapes
from tests import tiny_run
from tests.models.test_vit import rough


def test_strips_hold_the_images_of_an_exit_the_surest_first():
    images = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)
    logits = np.zeros((6, 2), np.float32)
    logits[:, 1] = [1, 3, 2, 5, 4, 6]
    predictions = Predictions(
        logits,
        np.zeros(6, np.int32),
        exit_index=np.asarray([0, 0, 0, 1, 0, 0]),
        class_names=("a", "b"),
    )
    shown = [
        Example(image, "x", label) for image, label in zip(images, [1, 1, 0, 1, 1, 1], strict=True)
    ]
    first, second = exits.strips(shown, predictions, np.asarray([4, 16]), 3)
    for picture, index in zip(first.pictures, (5, 1, 0), strict=True):
        np.testing.assert_array_equal(picture, enlarge(images[index]))
    assert first.caption == "exit 1, 4 tokens: 5 of 6 images, 80% of them right"
    np.testing.assert_array_equal(second.pictures[0], enlarge(images[3]))
    assert (second.pictures[1] == 255).all()
    assert second.caption == "exit 2, 16 tokens: 1 of 6 images, 100% of them right"


@pytest.mark.parametrize("fitted", [False, True])
def test_a_run_is_drawn_with_fitted_thresholds_or_those_of_its_examples(fitted, tmp_path):
    config = tiny_run.dvt()
    model = configs.build_model(configs.resolve(config, len(tiny_run.CLASSES)))
    run = checkpoint.Run(config, model, {"params": rough(model_shapes(model))})
    budget = None
    if fitted:
        budget = float(model.exit_macs()[-1]) / 1e9
        row = f'[{{"budget": {budget}, "thresholds": [{exit_thresholds.NEVER}, 0.0]}}]'
        (tmp_path / FITTED_FILE).write_text(row)
    drawn = exits.draw_run(run, tmp_path / "out", workdir=tmp_path, gmacs_budget=budget, count=3)
    assert drawn.sheet.stat().st_size > 1000
    if fitted:
        assert drawn.strips[0].caption.startswith("exit 1, 4 tokens: 0 of 21")
    else:
        assert "0 of 21" not in drawn.strips[0].caption
