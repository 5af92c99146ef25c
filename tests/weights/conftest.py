import functools

import pytest

from msvit_jax.train import init_from

_shapes = functools.cache(init_from.model_shapes)


@pytest.fixture(autouse=True)
def _models_traced_once(monkeypatch):
    """Every reading asks for the shapes of a model; these tests read the same few many times."""
    monkeypatch.setattr(init_from, "model_shapes", _shapes)
