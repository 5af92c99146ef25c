"""Attention among images that lie end to end, in one call of cuDNN's kernel.

Rows of several images and length buckets are such sequences of many lengths. cuDNN is told where
each begins and how many tokens it has, so that it neither computes nor masks scores between images,
and all length buckets take one call. JAX offers this in its own module of cuDNN's kernels, not in
`jax.nn`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msvit_jax.tokens.packing import NOBODY, changes
from msvit_jax.typed import Float, Int, Shaped

_NONE = -1  # start and length of a sequence that there is not
_CUDNN = 90600  # the first version that takes packed sequences, 9.6
_HOPPER = 9.0  # the first compute capability that does


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


@dataclasses.dataclass(frozen=True)
class Sequences:
    """How images lie end to end.

    Attributes:
      buckets: Pairs (rows, length), one for each length bucket of a group, with one image in each
        row; or one pair, (1, length), of rows that hold several images.
      most: Largest number of runs of equal segments in a row, if that holds several images; else 0.
    """

    buckets: tuple[tuple[int, int], ...]
    most: int = 0

    @property
    def row_length(self) -> int:
        """Length of the rows that cuDNN is given.

        Its time grows with that length whatever the sequences have, so length buckets are cut into
        the shortest rows that divide their whole and are no shorter than the longest sequence; of
        an even length, if there is one.
        """
        total = sum(rows * length for rows, length in self.buckets)
        longest = max(length for _, length in self.buckets)
        found = [total // n for n in range(total // longest, 0, -1) if total % n == 0]
        return next((length for length in found if length % 2 == 0), found[0])

    def find(self, segments: Int[Array, "B N"]) -> tuple[Array, Array]:
        """Finds the sequences of segments.

        Args:
          segments: [B, N] int32, index of the image of each position, or `NOBODY`.

        Returns:
          Where each sequence starts in its row of `row_length` positions, and its length: [R, M]
          int32 each, for R rows with up to M sequences; -1 where there is none. A sequence may end
          in the next row: rows lie end to end.
        """
        starts, lengths = self._in_rows(segments) if self.most else self._in_buckets(segments)
        there = lengths > 0  # cuDNN would take one without tokens for a whole row
        return jnp.where(there, starts, _NONE), jnp.where(there, lengths, _NONE)

    def _in_rows(self, segments: Array) -> tuple[Array, Array]:
        segments = segments.reshape(-1, self.row_length)
        run = jnp.cumsum(changes(segments), axis=1)[:, None]
        mine = run == jnp.arange(self.most)[None, :, None]
        mine &= (segments != NOBODY)[:, None]
        return jnp.argmax(mine, axis=2).astype(jnp.int32), mine.sum(axis=2, dtype=jnp.int32)

    def _in_buckets(self, segments: Array) -> tuple[Array, Array]:
        room = np.repeat([n for _, n in self.buckets], [rows for rows, _ in self.buckets])
        ends = np.cumsum(room)
        begin, width = ends - room, self.row_length
        parts, row = segments.shape[1] // width, begin // width
        slot = np.arange(len(row)) - np.searchsorted(row, row)  # of each sequence within its row
        table = np.full((parts, slot.max() + 1), len(row))
        table[row, slot] = np.arange(len(row))
        # Images fill the first positions of their sequences.
        filled = jnp.cumsum(segments != NOBODY, axis=1, dtype=jnp.int32)
        filled = jnp.pad(filled, ((0, 0), (1, 0)))
        lengths = jnp.pad(filled[:, ends] - filled[:, begin], ((0, 0), (0, 1)))[:, table]
        starts = jnp.asarray(np.append(begin % width, 0)[table], jnp.int32)
        flat = (-1, table.shape[1])
        return jnp.broadcast_to(starts, lengths.shape).reshape(flat), lengths.reshape(flat)


def attend(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B N H d"],
    value: Float[Array, "B N H d"],
    segments: Int[Array, "B N"],
    sequences: Sequences,
) -> Float[Array, "B N H d"]:
    """Computes softmax attention within each image; zeros in empty positions.

    Args:
      query: [B, N, H, d] queries.
      key: [B, N, H, d] keys.
      value: [B, N, H, d] values.
      segments: [B, N] int32, index of the image of each position, or `NOBODY`.
      sequences: How the images lie.
    """
    return _attend(sequences, query, key, value, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sequences: Sequences, query: Array, key: Array, value: Array, segments: Array) -> Array:
    return _packed(sequences, query, key, value, segments)


def _packed(sequences: Sequences, query: Array, key: Array, value: Array, segments: Array) -> Array:
    starts, lengths = sequences.find(segments)
    q, k, v = (x.reshape(-1, sequences.row_length, *x.shape[2:]) for x in (query, key, value))
    mixed = _call(q, k, v, starts, lengths).reshape(query.shape)
    return emptied(mixed, segments)  # which cuDNN does not write


def _forward(
    sequences: Sequences, query: Array, key: Array, value: Array, segments: Array
) -> tuple[Array, Any]:
    # cuDNN does not write the gradients of empty positions either, so theirs are cut off. A forward
    # pass does without, which would be a tenth of a block's time.
    def attend(*given: Array) -> Array:
        query, key, value = (emptied(x, segments) for x in given)
        return _packed(sequences, query, key, value, segments)

    return jax.vjp(attend, query, key, value)


def _backward(_: Sequences, passed_back: Any, cotangent: Array) -> tuple[Any, ...]:
    return (*passed_back(cotangent), None)


_attend.defvjp(_forward, _backward)


def emptied(x: Shaped[Array, "B N ..."], segments: Int[Array, "B N"]) -> Shaped[Array, "B N ..."]:
    """Puts zeros into empty positions: [B, N, ...] -> [B, N, ...]."""
    empty = segments == NOBODY
    return jnp.where(empty.reshape(*empty.shape, *[1] * (x.ndim - 2)), 0, x)


def _call(query: Array, key: Array, value: Array, starts: Array, lengths: Array) -> Array:
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
