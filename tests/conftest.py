"""Strict settings for every test: sloppy dtypes, silent rank promotion and warnings fail."""

import os
import pathlib

# Compiled programs are kept for all tests, their processes and workers, in a directory that a
# fresh clone starts without.
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"

# In the environment and before JAX starts: what the tests start as commands takes it, too.
for _name, _value in {
    # Several devices on one machine, so that sharding is tested for real.
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_PLATFORMS": "cpu",
    # Tests compile much and compute little, often the same program twice.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(_CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow; a deadline would time the compiler.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.load_profile("default")
