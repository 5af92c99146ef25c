import types

import pytest

from msvit_jax.aot import compiling

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
