"""Digests of arrays and JSON records: a checkpoint whose values changed on the disk is noticed.

An array's digest is a sum over its elements, of their bits times a number that depends on the
position alone, modulo 2^64. So shards add up to the whole array's digest, however it is spread over
devices and processes, and a run may be resumed on others. The numbers are odd, so any change of one
element changes the digest; other changes go unnoticed with a probability of about 2^-64.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from msvit_jax.tree import path_name

EMPTY = "empty"  # in place of a dict's digest that has no entries
_CHECK = "check"  # key of a record's own digest
_MASK = 2**64 - 1


def of_tree(tree: Any) -> dict[str, str]:
    """Computes the digests of a tree's arrays; all processes call it together.

    Args:
      tree: Tree of JAX or NumPy arrays; JAX arrays may be spread over several processes.

    Returns:
      Digests as hexadecimal texts by the arrays' paths, and `EMPTY` by those of empty dicts. The
      paths are those of the same tree made of dicts and lists alone, as it is read back without its
      classes.
    """
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_empty)
    leaves = [(path, leaf) for path, leaf in nodes if not _is_empty(leaf)]
    sums = np.asarray([_local_sum(leaf) for _, leaf in leaves], np.uint64)
    if jax.process_count() > 1 and any(isinstance(leaf, jax.Array) for _, leaf in leaves):
        parts = multihost_utils.process_allgather(sums.view(np.uint32))  # JAX has no 64-bit types
        sums = np.asarray(parts).view(np.uint64).sum(axis=0, dtype=np.uint64)
    found = {path_name(path): f"{int(s):016x}" for (path, _), s in zip(leaves, sums, strict=True)}
    return found | {path_name(path): EMPTY for path, node in nodes if _is_empty(node)}


def _is_empty(node: Any) -> bool:
    return isinstance(node, Mapping) and not node


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON record with its own digest in it."""
    plain = json.loads(json.dumps(record))
    return {**plain, _CHECK: _checksum(plain)}


def unseal(record: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Takes the digest out of a record that `seal` made.

    Returns:
      Record, and whether it had a digest.

    Raises:
      ValueError: The record is not the one that was sealed.
    """
    if not isinstance(record, Mapping):
        raise ValueError("its description is none")
    plain = {key: value for key, value in record.items() if key != _CHECK}
    if _CHECK in record and record[_CHECK] != _checksum(plain):
        raise ValueError("its description changed after it was saved")
    return plain, _CHECK in record


def _checksum(record: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _local_sum(array: Any) -> int:
    """Sums up the parts of an array that this process answers for."""
    if not isinstance(array, jax.Array):
        return _sum(np.asarray(array), ())
    total = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:  # each part counts once, on whichever process
            starts = tuple(part.start or 0 for part in shard.index)
            total += _sum(np.asarray(shard.data), starts)
    return total & _MASK


def _sum(values: np.ndarray, starts: tuple[int, ...]) -> int:
    """Sums up bits times position numbers; `starts` is where the values lie in the whole array."""
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").reshape(values.shape)
    for axis in reversed(range(values.ndim)):
        start = starts[axis] if starts else 0
        # Not `@`, which first makes a copy of the array in 64 bits.
        bits = np.einsum("...i,i->...", bits, _numbers(axis, start, values.shape[axis]))
    return int(bits) * int(_numbers(99, 0, 1)[0]) & _MASK


def _numbers(axis: int, start: int, size: int) -> np.ndarray:
    """Returns fixed odd numbers for the positions of an axis (splitmix64's finalizer)."""
    with np.errstate(over="ignore"):
        x = np.arange(start, start + size, dtype=np.uint64) + np.uint64((axis + 1) << 40)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))) | np.uint64(1)
