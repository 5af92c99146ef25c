"""Attention among sequences of many lengths that lie end to end, in one call of cuDNN's kernel.

Rows of several images and length buckets are such sequences. cuDNN is told where each begins and
how many tokens it has, so that it neither computes nor masks scores between images, and all length
buckets take one call. JAX offers this in its own module of cuDNN's kernels, not in `jax.nn`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msvit_jax.tokens.packing import NOBODY
from msvit_jax.typed import Float, Int

_NONE = -1  # start and length of a sequence that there is not
_CUDNN = 90600  # the first version that takes packed sequences, as 10,000 major + 100 minor
_HOPPER = 9.0


def available() -> bool:
    """Tells whether JAX's default device and its cuDNN take packed sequences."""
    if jax.default_backend() != "gpu":
        return False
    try:
        return (
            _cudnn().check_cudnn_version() >= _CUDNN
            and float(jax.local_devices()[0].compute_capability) >= _HOPPER
        )
    except (ImportError, AttributeError, RuntimeError):  # no NVIDIA GPU, or another version of JAX
        return False


def _cudnn() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def attend(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B N H d"],
    value: Float[Array, "B N H d"],
    starts: Int[Array, "B M"],
    lengths: Int[Array, "B M"],
) -> Float[Array, "B N H d"]:
    """Computes softmax attention within each sequence; what lies in no sequence is undefined.

    Args:
      query: [B, N, H, d] queries.
      key: [B, N, H, d] keys.
      value: [B, N, H, d] values.
      starts: [B, M] int32, position in a row at which each sequence begins, at most M in a row, or
        -1. A sequence may end in the next row: rows lie end to end.
      lengths: [B, M] int32, number of tokens of each sequence, or -1.
    """
    cudnn, none = _cudnn(), ((0, 0), (0, 1))
    if starts.shape[1] == 1:  # which would not count as packed
        starts, lengths = (jnp.pad(x, none, constant_values=_NONE) for x in (starts, lengths))
    offsets = jnp.pad(starts, none, constant_values=_NONE)
    return cudnn.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=query.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.NO_MASK,
    )


def sequences_in_rows(segments: Int[Array, "B N"], most: int) -> tuple[Array, Array]:
    """Finds the sequences of rows that hold several images each.

    Args:
      segments: [B, N] int32, index of the image of each position, or `NOBODY`.
      most: Largest number M of runs of equal segments in a row.

    Returns:
      starts and lengths as `attend` takes them, both [B, M].
    """
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    run = jnp.cumsum(new, axis=1)[:, None]
    mine = (run == jnp.arange(most)[None, :, None]) & (segments != NOBODY)[:, None]
    lengths = mine.sum(axis=2, dtype=jnp.int32)
    return _without_empty(jnp.argmax(mine, axis=2).astype(jnp.int32), lengths)


def sequences_in_buckets(
    segments: Int[Array, "G T"], length_buckets: Sequence[tuple[int, int]]
) -> tuple[Array, Array, int]:
    """Finds the sequences of length buckets, each of which holds one image.

    cuDNN's time grows with the length of a row whatever its sequences have, so groups are cut into
    the shortest rows that are whole parts of a group and no shorter than the longest sequence.

    Args:
      segments: [G, T] int32, index of the image of each position, or `NOBODY`.
      length_buckets: Pairs (rows, length), one for each length bucket.

    Returns:
      starts and lengths as `attend` takes them, both [G * T / N, M], and the length N of its rows.
    """
    groups, total = segments.shape
    room = np.repeat([n for _, n in length_buckets], [rows for rows, _ in length_buckets])
    ends = np.cumsum(room)
    begin = ends - room
    parts = next(n for n in range(total // room.max(), 0, -1) if total % n == 0)
    width = total // parts
    row = begin // width
    slot = np.arange(len(row)) - np.searchsorted(row, row)  # of each sequence within its row
    table = np.full((parts, slot.max() + 1), len(row))
    table[row, slot] = np.arange(len(row))
    # Images fill the first positions of their sequences.
    filled = jnp.pad(jnp.cumsum(segments != NOBODY, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    lengths = jnp.pad(filled[:, ends] - filled[:, begin], ((0, 0), (0, 1)))[:, table]
    starts = jnp.asarray(np.append(begin % width, 0)[table], jnp.int32)
    flat = (groups * parts, table.shape[1])
    starts, lengths = _without_empty(
        jnp.broadcast_to(starts, lengths.shape).reshape(flat), lengths.reshape(flat)
    )
    return starts, lengths, width


def _without_empty(starts: Array, lengths: Array) -> tuple[Array, Array]:
    """Marks sequences without tokens as such, which cuDNN would take for whole ones."""
    return jnp.where(lengths > 0, starts, _NONE), jnp.where(lengths > 0, lengths, _NONE)
