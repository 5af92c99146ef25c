"""The reducer that docs/extending.md writes, as a newcomer would use it."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msvit_jax
from msvit_jax import config as configs
from msvit_jax import reducers
from tests import jitted, tiny_run
from tests.train.test_step import Setup

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"
TINY = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "num_classes": 3}
OURS = {"reducer": "predictor", "keep": 0.6, "hidden": 8}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The page's class in the table."""
    scope = {"__name__": "extending"}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], scope)
    monkeypatch.setitem(reducers.REDUCERS, "predictor", scope["Predictor"])
    monkeypatch.setattr(reducers, "NAMES", ("none", *reducers.REDUCERS))


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(0), (4, 32, 32, 3))


def test_a_model_has_its_parameters_and_counts_its_arithmetic(images):
    model = msvit_jax.create_model("vit_tiny_patch16_224", **TINY, **OURS)
    params = jitted.init(model, images, seed=1)["params"]
    kernels = {f"blocks_{i}": params[f"blocks_{i}"].get("reducer") for i in range(2)}
    assert {n: k and k["fc1"]["kernel"].shape for n, k in kernels.items()} == {
        "blocks_0": (16, 8), "blocks_1": (16, 8)}  # fmt: skip
    without = msvit_jax.create_model("vit_tiny_patch16_224", **TINY, reducer="random", keep=0.6)
    network = (16 + 1) * 8 * (17 + 11)  # in both layers, on 17 and then 11 tokens
    assert model.macs(16) - without.macs(16) == network


def test_it_answers_alike_in_every_layout(images):
    model = msvit_jax.create_model("msvit_tiny_patch16_224", **TINY, **OURS, reduce_layers=(1,))
    variables = jitted.init(model, images, seed=1)
    coarse = jnp.asarray([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], jnp.float32)
    answers = []
    for layout in (
        {},
        {"layout": "budget", "token_capacity": (12, 16)},
        {"layout": "rows", "rows": 2, "row_width": 40},
    ):
        apply = jax.jit(model.clone(**layout).apply)
        answers.append(apply(variables, images, coarse=coarse).logits)
    for found in answers[1:]:
        np.testing.assert_allclose(found, answers[0], atol=1e-5)


def test_it_learns_in_a_run():
    config = tiny_run.config(model__reducer="predictor", model__keep=0.6)
    configs.set_key(config, "model.hidden", "16")
    setup = Setup(config)
    before = jax.device_get(setup.state.params["model"]["blocks_0"]["reducer"])
    after = jax.device_get(setup.run(2)[0].params["model"]["blocks_0"]["reducer"])
    assert before["fc1"]["kernel"].shape[1] == 16
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-5, before, after)
    assert all(jax.tree.leaves(moved["fc1"]))
