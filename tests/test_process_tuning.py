"""Settings of the machine, seen from a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from msvit_jax import process_tuning
from msvit_jax.errors import UserError

FAULTS = """
import ctypes, json, resource

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]

def faults(size=2**28):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        memory = libc.malloc(size)
        ctypes.memset(memory, 1, size)
        libc.free(memory)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

"""
PROGRAM = (
    FAULTS
    + """
import jax
from msvit_jax import process_tuning

told = {"usual": faults(), "kept": process_tuning.keep_freed_memory()}
faults()
told["reusing"] = faults()
told["devices"] = process_tuning.make_devices_of_cores()
ones = jax.numpy.ones((told["devices"], 2))
mesh = jax.make_mesh((told["devices"],), ("data",))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
told["sum"] = float(jax.jit(jax.numpy.sum, in_shardings=rows)(ones))
told["seen"] = jax.device_count()
print(json.dumps(told))
"""
)


@pytest.fixture(scope="module")
def told():
    environment = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "-c", PROGRAM]
    return json.loads(subprocess.check_output(command, text=True, env=environment))


def test_freed_memory_is_not_fetched_from_the_kernel_again(told):
    if not told["kept"]:
        pytest.skip("this C library is not glibc")
    assert told["reusing"] < 100
    assert told["usual"] > 400  # four times 256 MiB, even where pages are 2 MiB large


def test_programs_can_be_started_so(told):
    if not told["kept"]:
        pytest.skip("this C library is not glibc")
    environment = {**os.environ, **process_tuning.keep_freed_memory_environment()}
    command = [sys.executable, "-c", FAULTS + "faults(); print(faults())"]
    assert int(subprocess.check_output(command, text=True, env=environment)) < 100


def test_beside_an_accelerator_memory_is_left_alone():
    asked = "process_tuning.keep_freed_memory(), process_tuning.keep_freed_memory_environment()"
    code = f"from msvit_jax import process_tuning; print({asked})"
    environment = {**os.environ, "JAX_PLATFORMS": "cuda,cpu"}
    told = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert told.split() == ["False", "{}"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot")
def test_a_process_keeps_to_its_cores():
    there = os.sched_getaffinity(0)
    try:
        process_tuning.use_cores(1)
        assert len(os.sched_getaffinity(0)) == 1
        with pytest.raises(UserError, match="Cannot use 2 cores; give a number from 1 to 1"):
            process_tuning.use_cores(2)
    finally:
        os.sched_setaffinity(0, there)


def test_cores_are_devices_and_work_together(told):
    assert told["seen"] == told["devices"]
    assert 64 % told["devices"] == 0
    assert told["sum"] == 2 * told["devices"]
