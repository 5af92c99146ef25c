"""Settings of the machine that a program runs on."""

import ctypes

# Parameters of glibc's mallopt (malloc.h) and what they are set to.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_KEEP = {
    _MMAP_MAX: 0,  # large arrays come from the heap, not from pages of their own
    _ARENA_MAX: 1,  # one heap for all threads: the others cannot grow past 64 MiB
    _TRIM_THRESHOLD: 2**31 - 1,  # the heap's free end is kept
    _TOP_PAD: 2**28,  # the heap grows in steps of 256 MiB
}


def keep_freed_memory() -> bool:
    """Makes this process reuse the memory it frees instead of handing it back to the kernel.

    XLA allocates its large temporary arrays anew in every call on CPU. glibc maps fresh pages for
    each and the kernel fills them with zeros, which is a third of the CPU time of a training step
    of the small models here. Call it before threads start; the process keeps its peak memory.

    Returns:
      Whether it took effect; false where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # other systems and C libraries
        return False
    taken = [mallopt(parameter, value) for parameter, value in _KEEP.items()]
    return all(taken)
