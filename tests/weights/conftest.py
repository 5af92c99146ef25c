import functools

import pytest

from msvit_jax.weights import adapt

_shapes = functools.cache(adapt.model_shapes)


@pytest.fixture(autouse=True)
def _models_traced_once(monkeypatch):
    """Every reading asks for the shapes of a model; these tests read the same few many times."""
    monkeypatch.setattr(adapt, "model_shapes", _shapes)
