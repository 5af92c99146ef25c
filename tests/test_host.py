"""Whether memory that was freed is used again, counted in the kernel's page faults."""

import subprocess
import sys

import pytest

from msvit_jax import host

PROGRAM = """
import ctypes, resource, runpy, sys

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use(libc, size=2**28):
    memory = libc.malloc(size)
    ctypes.memset(memory, 1, size)
    libc.free(memory)

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
took_effect = sys.argv[1] == "keep" and runpy.run_path(sys.argv[2])["keep_freed_memory"]()
use(libc)
before = faults()
for _ in range(4):
    use(libc)
print(took_effect, faults() - before)
"""


def _faults(mode):
    # The file alone: the package would bring JAX.
    command = [sys.executable, "-c", PROGRAM, mode, host.__file__]
    took_effect, count = subprocess.check_output(command, text=True).split()
    return took_effect == "True", int(count)


def test_freed_memory_is_not_fetched_from_the_kernel_again():
    took_effect, count = _faults("keep")
    if not took_effect:
        pytest.skip("this C library is not glibc")
    assert count < 100
    assert _faults("leave")[1] > 400  # four times 256 MiB, even where pages are 2 MiB large
