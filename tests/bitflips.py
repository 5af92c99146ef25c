"""Damage to the files of a checkpoint, for tests."""

import pathlib

import numpy as np


def flip(directory: pathlib.Path, rng: np.random.Generator) -> str:
    """Changes one bit of one of a checkpoint's files, larger ones more often; says where."""
    files = [f for f in sorted(directory.rglob("*")) if f.is_file() and f.stat().st_size]
    sizes = np.asarray([f.stat().st_size for f in files], float)
    file = files[rng.choice(len(files), p=sizes / sizes.sum())]
    data = bytearray(file.read_bytes())
    at, bit = int(rng.integers(len(data))), int(rng.integers(8))
    data[at] ^= 1 << bit
    file.write_bytes(data)
    return f"{file.relative_to(directory)}, byte {at}, bit {bit}"
