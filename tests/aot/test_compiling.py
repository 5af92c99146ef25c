import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msvit_jax.aot import compiling
from msvit_jax.aot.topology import CHIPS, Topology

GIB = 2**30


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (450.00G) exceeds available HBM (15.75G). HLO",
            (450 * GIB, 15.75 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.5T of 31.24G hbm.",
            (1536 * GIB, 31.24 * GIB),
        ),
        ("INTERNAL: Mosaic failed to compile", None),
    ],
)
def test_messages_of_a_program_that_is_too_large(message, sizes):
    assert compiling.too_large(message) == sizes


@given(st.integers(1, 64), st.integers(1, 5000), st.integers(0, 3000))
def test_the_largest_batch_fits_and_an_eighth_more_does_not(unit, start, most):
    tried = []

    def fits(size):
        tried.append(size)
        assert size % unit == 0
        return size <= most

    found = compiling.largest_batch(fits, unit, start)
    assert found <= most
    if most < unit:
        assert found == 0
    else:
        assert found in tried
        assert most < found + max(unit, found / 8) + 1
    assert len(tried) <= 30


def test_limits_by_hand():
    found = {
        "gmacs": 197.0,
        "gbytes_accessed": 0.819,
        "collectives": {
            "all-reduce": {"count": 2, "bytes": 100_000_000},
            "reduce-scatter": {"count": 1, "bytes": 25_000_000},
            "all-gather": {"count": 1, "bytes": 100_000_000},
        },
        "kernels": {"flops": 197_000_000_000, "moved_bytes": 81_900_000},
    }
    limits = compiling.limits(found, Topology("v5e:2x2", CHIPS["v5e"], [None] * 4))
    # 394 GFLOP at 197 TFLOP/s; a ring of four sends 150, 75 and 75 MB at 200 GB/s
    assert (limits["products"], limits["memory"]) == (2.0, 1.0)
    assert (limits["links"], limits["links_share"]) == (1.5, 0.4286)
    assert limits["kernels"] == 1.0  # 197 GFLOP; 81.9 MB at 819 GB/s take a tenth of that
    found["kernels"]["moved_bytes"] *= 20
    limits = compiling.limits(found, Topology("v5e:2x2", CHIPS["v5e"], [None] * 4))
    assert limits["kernels"] == 2.0


def test_memory_counts_donated_arguments_once():
    stats = types.SimpleNamespace(
        argument_size_in_bytes=100,
        temp_size_in_bytes=20,
        output_size_in_bytes=90,
        alias_size_in_bytes=85,
        generated_code_size_in_bytes=3,
    )
    memory = compiling.Memory.from_stats(stats)
    assert (memory.outputs, memory.total) == (5, 128)
