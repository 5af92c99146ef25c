"""Strict settings for every test: sloppy dtypes, silent rank promotion and warnings fail."""

import gc
import os
import pathlib

# In the environment and before JAX starts: commands that the tests start take the same.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Several devices on one machine, so that sharding is tested for real.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Tests compile much and compute little, often the same program twice. Compiled programs are kept
# for all processes, in a directory that a fresh clone starts without.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,xla_cpu_optimize_for_size"
    " --xla_cpu_parallel_codegen_split_count=1",  # a quarter less time to compile
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jaxtyping
import pytest

# The shapes in these modules' signatures are checked in every call that a test makes.
jaxtyping.install_import_hook(
    [
        "msvit_jax.data.mix",
        "msvit_jax.losses",
        "msvit_jax.models.attention",
        "msvit_jax.pixels",
        "msvit_jax.tokens.grid",
    ],
    "beartype.beartype",
)

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow; a deadline would time the compiler.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.load_profile("default")

_MAPS = pathlib.Path("/proc/self/maps")  # Linux alone has it
_MOST_MAPS = 20_000  # of 65,530 that Linux gives a process; one file of tests adds as many


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Drops compiled programs before there are too many: each takes some 200 memory maps.

    Where no more can be had, the compiler ends the process with a segmentation fault.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()
