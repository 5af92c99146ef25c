"""Settings of the machine that a program runs on."""

import ctypes
import importlib.util
import math
import os

import jax

from msvit_jax.errors import UserError

# Parameters of glibc's mallopt (malloc.h) and their values.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_KEEP = {
    _MMAP_MAX: 0,  # large arrays come from the heap, not from pages of their own
    _ARENA_MAX: 1,  # one heap for all threads: the others cannot grow past 64 MiB
    _TRIM_THRESHOLD: 2**31 - 1,  # the heap's free end is kept
    _TOP_PAD: 2**28,  # the heap grows in steps of 256 MiB
}


def keep_freed_memory() -> bool:
    """Makes this process reuse the memory it frees instead of handing it back to the kernel.

    XLA allocates its large temporary arrays again in every call on CPU. glibc maps fresh pages for
    each and the kernel fills them with zeros, which is a third of the CPU time of a training step
    of the small models here. Call it before threads start; the process keeps its peak memory.

    Where JAX has an accelerator, nothing is changed: its arrays are elsewhere, and its compiler's
    many threads would all wait for one heap.

    Returns:
      Whether it took effect; false where the C library is not glibc, and with an accelerator.
    """
    if _has_accelerator():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # other systems and C libraries
        return False
    taken = [mallopt(parameter, value) for parameter, value in _KEEP.items()]
    return all(taken)


def keep_freed_memory_environment() -> dict[str, str]:
    """Returns environment variables with the effect of `keep_freed_memory` on a new program."""
    if _has_accelerator():
        return {}
    names = {
        _MMAP_MAX: "MALLOC_MMAP_MAX_",
        _ARENA_MAX: "MALLOC_ARENA_MAX",
        _TRIM_THRESHOLD: "MALLOC_TRIM_THRESHOLD_",
        _TOP_PAD: "MALLOC_TOP_PAD_",
    }
    return {name: str(_KEEP[parameter]) for parameter, name in names.items()}


def _has_accelerator() -> bool:
    """Tells whether JAX will use something other than the CPU; starts no back end."""
    if platforms := jax.config.jax_platforms:
        return platforms.split(",")[0] != "cpu"
    return any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))


def use_cores(count: int) -> None:
    """Confines this process, and those that it starts, to a number of its cores.

    Call it before threads start. Does nothing on systems that cannot.

    Raises:
      UserError: There are not that many.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cores):
        raise UserError(f"Cannot use {count} cores; give a number from 1 to {len(cores)}.")
    os.sched_setaffinity(0, cores[:count])


def make_devices_of_cores() -> int:
    """Makes JAX on CPU see a device per core, each of which takes its share of a batch.

    A small model leaves cores idle when all of them work on one array operation at a time. Call it
    before JAX is used.

    Returns:
      Number of devices: a power of two up to 8, so that it divides batches.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = 2 ** min(int(math.log2(cores or 1)), 3)
    jax.config.update("jax_num_cpu_devices", devices)
    # On a busy machine one device may wait long for another; by default XLA gives up after 40 s.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=1800"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {patience}".strip()
    return devices
