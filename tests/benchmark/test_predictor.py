"""The benchmark of the Predictor measures what it says."""

import pytest

from msvit_jax.benchmark import predictor
from msvit_jax.errors import UserError

TINY = {"image_size": 32, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "num_classes": 4}


@pytest.mark.slow
def test_records_add_up():
    dense, gated, alone, all_fine = predictor.measure(
        "msvit_deit_small_patch16_224", tokens=32, batch=8, images=20, rounds=2, overrides=TINY
    )
    for record in (dense, gated):
        assert record["share"] > 0
        assert record["images_per_second"] > 0
    assert alone["over_dense"] == 1
    assert all_fine["over_dense"] > 0
    assert [x["batch"] for x in (dense, gated, alone, all_fine)] == [8, 8, 1, 1]


def test_a_model_without_a_threshold_is_told():
    with pytest.raises(UserError, match="has no gate with a threshold"):
        predictor.measure(
            "deit_small_patch16_224", tokens=32, batch=8, images=1, rounds=1, overrides=TINY
        )
