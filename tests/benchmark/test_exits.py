"""The benchmark of early exits measures what it says."""

import numpy as np
import pytest

from msvit_jax.benchmark import exits
from msvit_jax.errors import UserError
from msvit_jax.models import registry

TINY = {
    **{"image_size": 16, "width": 16, "depth": 1, "heads": 2, "num_classes": 4},
    **{"grid_sizes": (2, 4), "feature_width": 4, "feature_hidden": 8},
}
OPTIONS = {"batch": 8, "images": 24, "rounds": 2, "overrides": TINY}


@pytest.mark.slow
def test_records_add_up():
    last, dense, *early = exits.measure("dvt_deit_small", shares=(0.75, 0.25), **OPTIONS)
    cascade = registry.create_model("dvt_deit_small", **TINY)
    plain = {
        key: value for key, value in TINY.items() if key in registry.dense_options("dvt_deit_small")
    }
    backbone = registry.create_model("deit_small_patch16_224", **plain, patch_size=4)
    cost = cascade.exit_macs() / 1e9
    assert last["gmacs"] == pytest.approx(cost[1])
    assert dense["gmacs"] == pytest.approx(float(backbone.macs(16)) / 1e9)
    assert [record["against"] for record in early] == ["last exit", "dense"]
    for record, other in zip(early, (last, dense), strict=True):
        assert record["gmacs"] == pytest.approx(np.dot([0.75, 0.25], cost), rel=0.05)
        assert record["mac_ratio"] == pytest.approx(other["gmacs"] / record["gmacs"])
        assert record["realized"] == record["speedup"] / record["mac_ratio"]


def test_what_is_not_possible_is_told():
    with pytest.raises(UserError, match="give 2 shares that sum to 1"):
        exits.measure("dvt_deit_small", shares=(0.5, 0.6), **OPTIONS)
    with pytest.raises(UserError, match="not a cascade"):
        exits.measure("deit_small_patch16_224", shares=(1.0,), **OPTIONS)
