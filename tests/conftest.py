"""Strict settings for every test: sloppy dtypes, silent rank promotion and warnings fail."""

import os
import pathlib

# Before JAX starts: several devices on one machine, so that sharding is tested for real.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile much and compute little, often the same program twice: compiled programs are kept
# for all of them, in a directory that a fresh clone starts without.
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Compilation makes the first example slow; a deadline would time the compiler.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.load_profile("default")
