"""Packs a batch's active tokens into fewer positions, on the device, with static shapes.

A batch of B images is packed in G independent *groups* of b = B / G images, as many groups as
devices it is spread over, so that no token leaves its device. A group has T *positions*. Every
image takes a run of positions, with its tokens in order; images that find none are reported. All
indices come from sorts and gathers, so nothing waits for the CPU.

There are two ways to arrange a group's positions, our reconstruction of what MSViT's adaptive
trimming and NaViT-like packing need under static shapes:

* *length buckets*: the images, sorted by length, get runs of a few fixed lengths;
* *rows*: images are assigned first-fit, longest first, to rows of one length.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

NOBODY = -1  # the owner of an empty position


@struct.dataclass
class Runs:
    """The run of positions of each image, group by group.

    Attributes:
      owner: [G, T] int32, index within its group of the image that a position belongs to, or
        `NOBODY`.
      offset: [G, T] int32, offset of a position within its image's run.
      start: [G, b] int32, first position of each image; T where it has none.
      room: [G, b] int32, number of positions in each image's run; 0 where it has none.
      within_capacity: [G, b] bool, whether each image got a run of its length.
    """

    owner: Array
    offset: Array
    start: Array
    room: Array
    within_capacity: Array


@struct.dataclass
class Packing:
    """Position of each token, and token of each position.

    Attributes:
      source: [G, T] int32, index of the token in a position among the group's b * N; b * N in empty
        positions.
      owner: [G, T] int32, index within its group of the image that a position belongs to, or
        `NOBODY`.
      position: [B, N] int32, position of each token within its group; T where it has none.
      within_capacity: [B] bool, whether all active tokens of an image have positions.
    """

    source: Array
    owner: Array
    position: Array
    within_capacity: Array

    def gather(self, tokens: Array, *, fill: float = 0.0) -> Array:
        """Packs tokens: [B, N, ...] -> [G, T, ...], with `fill` in empty positions."""
        groups = self.source.shape[0]
        flat = tokens.reshape(groups, -1, *tokens.shape[2:])
        return _take(flat, self.source, fill)

    def restore(self, packed: Array, *, count: int | None = None) -> Array:
        """Unpacks tokens: [G, T, ...] -> [B, N, ...], zeros for tokens that have no position.

        Args:
          packed: [G, T, ...] packed tokens, or anything computed from them.
          count: Number of first tokens of an image that are returned, [B, count, ...]; None for
            all.
        """
        groups = self.source.shape[0]
        images = self.position.shape[0]
        position = self.position[:, :count].reshape(groups, -1)
        return _take(packed, position, 0.0).reshape(images, -1, *packed.shape[2:])


def _take(values: Array, index: Array, fill: float) -> Array:
    """Gathers rows of values [G, M, ...] by index [G, ...]; `fill` where the index is M."""
    take = lambda v, i: v.at[i].get(mode="fill", fill_value=fill)  # noqa: E731
    return jax.vmap(take)(values, index)


def assign_buckets(lengths: Array, widths: Sequence[int]) -> Runs:
    """Assigns images to length buckets: long images get runs of the large capacities.

    As many images as possible get a run: longest first, each takes the longest run left.

    Args:
      lengths: [G, b] int32, number of positions each image needs.
      widths: Capacities of the length buckets, one for each of len(widths) equal parts of b images.

    Raises:
      ValueError: The parts are not equal.
    """
    images = lengths.shape[1]
    if not widths or images % len(widths):
        raise ValueError(
            f"{images} images cannot be cut into {len(widths)} equal parts, one for each "
            f"capacity of {tuple(widths)}; use a batch (per group) that is a multiple of that."
        )
    part = images // len(widths)
    descending = sorted(widths, reverse=True)
    run_width = np.repeat(np.asarray(descending, np.int32), part)
    run_start = np.cumsum(run_width, dtype=np.int32) - run_width
    total = int(run_width.sum())
    run_of = np.repeat(np.arange(images), run_width)
    offset = np.arange(total, dtype=np.int32) - run_start[run_of]

    def one(length: Array) -> Runs:
        order = jnp.argsort(-length, stable=True)
        has_run = _have_run(length[order], descending, part)
        # Images that have a run, longest first, take the runs in their order; the last runs stay
        # empty.
        taker = order[jnp.argsort(~has_run, stable=True)]
        taken = jnp.arange(images) < has_run.sum()
        turn = jnp.argsort(taker).astype(jnp.int32)  # inverse of `taker`: each image's turn
        run = jnp.where(taken[turn], turn, images)
        return Runs(
            owner=jnp.where(taken, taker.astype(jnp.int32), NOBODY)[run_of],
            offset=jnp.asarray(offset),
            start=jnp.asarray(run_start).at[run].get(mode="fill", fill_value=total),
            room=jnp.asarray(run_width).at[run].get(mode="fill", fill_value=0),
            within_capacity=run < images,
        )

    return jax.vmap(one)(lengths)


def _have_run(lengths: Array, widths: Sequence[int], part: int) -> Array:
    """Decides which images, longest first, get a run: [b] bool.

    `widths` are descending, with `part` runs of each.
    """
    has_run = jnp.zeros(lengths.shape, bool)
    for index, width in enumerate(widths):
        narrower = widths[index + 1] if index + 1 < len(widths) else -1
        # Images that need a run of this width, and as many of them as runs of it or wider are left.
        mine = (lengths <= width) & (lengths > narrower)
        free = (index + 1) * part - has_run.sum()
        has_run |= mine & (jnp.cumsum(mine) <= free)
    return has_run


def rows(lengths: Array, count: int, width: int) -> Runs:
    """Packs each group's images into rows: longest first, each into the first row with room.

    Args:
      lengths: [G, b] int32, number of positions each image needs.
      count: Number of rows of a group.
      width: Capacity of a row in tokens.
    """
    images, total = lengths.shape[1], count * width

    def one(length: Array) -> Runs:
        order = jnp.argsort(-length, stable=True)

        def put(filled: Array, need: Array) -> tuple[Array, Array]:
            room = filled + need <= width
            row = jnp.argmax(room)  # the first row with room
            found = room[row]
            start = jnp.where(found, row * width + filled[row], total)
            return filled.at[row].add(jnp.where(found, need, 0)), start.astype(jnp.int32)

        nothing = jnp.zeros((count,), length.dtype)
        _, starts = lax.scan(put, nothing, length[order], unroll=min(8, images))
        start = jnp.zeros((images,), jnp.int32).at[order].set(starts)
        within_capacity = start < total
        owner, first = _owners(start, total)
        offset = jnp.arange(total, dtype=jnp.int32) - first
        need = length.at[owner].get(mode="fill", fill_value=0)
        return Runs(
            owner=jnp.where(offset < need, owner, NOBODY),
            offset=offset,
            start=start,
            room=jnp.where(within_capacity, length, 0),
            within_capacity=within_capacity,
        )

    return jax.vmap(one)(lengths)


def _owners(start: Array, total: int) -> tuple[Array, Array]:
    """Finds the last image that starts at or before each position, and where it starts.

    Both are [T]; the image is b where there is none.
    """
    images = start.shape[0]
    # Images are marked at their first positions; each position takes the last mark before it.
    here = jnp.full((total,), images, jnp.int32)
    here = here.at[start].set(jnp.arange(images, dtype=jnp.int32), mode="drop")
    positions = jnp.arange(total, dtype=jnp.int32)
    first = lax.cummax(jnp.where(here < images, positions, 0))
    return here[first], first


def changes(segments: Array) -> Array:
    """Tells where another image, or none, begins in a row: [B, N] -> [B, N] bool, not at first."""
    return jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))


def pack(active: Array, runs: Runs, extra: Array | None = None) -> Packing:
    """Puts tokens into their images' runs, in their own order.

    Args:
      active: [B, N] bool, whether each token must have a position.
      runs: Runs made for lengths of `active.sum(axis=1)`.
      extra: [B, N] bool, inactive tokens that take positions behind the active ones, as many as the
        run has left.

    Returns:
      The packing; images that do not fit have no positions.
    """
    groups, images = runs.start.shape
    count, total = active.shape[1], runs.owner.shape[1]
    # A stable sort puts active tokens first, then extra ones, then the others, each in order.
    last = jnp.where(active, 0, 1 if extra is None else jnp.where(extra, 1, 2))
    order = jnp.argsort(last, axis=1, stable=True).astype(jnp.int32)
    carried = active if extra is None else active | extra
    limit = carried.sum(axis=1, dtype=jnp.int32).reshape(groups, images)
    limit = jnp.minimum(limit, runs.room)
    order = order.reshape(groups, images, count)

    def one(order: Array, limit: Array, runs: Runs) -> tuple[Array, Array, Array]:
        holds = (runs.owner >= 0) & (runs.offset < limit.at[runs.owner].get(mode="fill"))
        owner = jnp.where(holds, runs.owner, NOBODY)
        token = order.at[owner, runs.offset].get(mode="fill", fill_value=0)
        source = jnp.where(holds, owner * count + token, images * count)
        # `order` lists tokens by rank, its inverse gives the rank of each token.
        rank = jnp.argsort(order, axis=1).astype(jnp.int32)
        position = jnp.where(rank < limit[:, None], runs.start[:, None] + rank, total)
        return source, owner, position

    source, owner, position = jax.vmap(one)(order, limit, runs)
    return Packing(source, owner, position.reshape(-1, count), runs.within_capacity.reshape(-1))
