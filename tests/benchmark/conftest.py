import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    """What is compiled here is looked at, not timed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
