import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
