"""Shared by all conversion tables: entries, common layers, and applying a table."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from msvit_jax.errors import UserError, nearest

State = Mapping[str, np.ndarray]
Flat = dict[str, np.ndarray]

# Parameters that may have another shape in the source: `adapt.adapt_weights` resizes or
# replaces them.
ADAPTABLE = re.compile(
    r"(^|/)(pos_embed|patch_embed/proj/kernel|head(_dist)?/(kernel|bias)"
    r"|decoder/(class_embed|mask_norm/(scale|bias)))$"
)
_HEAD = re.compile(r"(^|/)head(_dist)?/(kernel|bias)$")
# Most misfits that come with a suggestion: comparing names is slow.
_MOST_NEAREST = 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and its counterparts in another format.

    Attributes:
      theirs: Names in the other format, usually one; separate queries, keys and values are three.
      ours: Our name, joined by '/'.
      to_ours: Function that makes our array from theirs, in the order of `theirs`.
      to_theirs: Inverse function; returns as many arrays as `theirs` has names.
    """

    theirs: tuple[str, ...]
    ours: str
    to_ours: Callable[..., np.ndarray]
    to_theirs: Callable[[np.ndarray], Sequence[np.ndarray]]


def one(
    theirs: str,
    ours: str,
    to_ours: Callable[[np.ndarray], np.ndarray],
    to_theirs: Callable[[np.ndarray], np.ndarray],
) -> Entry:
    """An entry for a single parameter in both formats."""
    return Entry((theirs,), ours, to_ours, lambda x: (to_theirs(x),))


def same(theirs: str, ours: str) -> Entry:
    """An entry for a parameter with equal arrays in both formats."""
    return one(theirs, ours, lambda x: x, lambda x: x)


def squeezed(theirs: str, ours: str) -> Entry:
    """An entry for a parameter with an additional leading axis of length 1 in the other format."""
    return one(theirs, ours, lambda x: x[0], lambda x: x[None])


def linear(theirs: str, ours: str, *, bias: bool = True) -> Iterator[Entry]:
    """PyTorch's linear layer [out, in] as a kernel [in, out]."""
    yield one(f"{theirs}.weight", f"{ours}/kernel", np.transpose, np.transpose)
    if bias:
        yield same(f"{theirs}.bias", f"{ours}/bias")


def norm(theirs: str, ours: str) -> Iterator[Entry]:
    """PyTorch's layer norm."""
    yield same(f"{theirs}.weight", f"{ours}/scale")
    yield same(f"{theirs}.bias", f"{ours}/bias")


def conv(theirs: str, ours: str) -> Iterator[Entry]:
    """PyTorch's convolution [D, C, h, w] as a kernel [h, w, C, D]."""
    yield one(
        f"{theirs}.weight",
        f"{ours}/kernel",
        lambda w: w.transpose(2, 3, 1, 0),
        lambda k: k.transpose(3, 2, 0, 1),
    )
    yield same(f"{theirs}.bias", f"{ours}/bias")


def to_ours(
    state: State,
    entries: Sequence[Entry],
    shapes: Mapping[str, Any],
    *,
    adaptable: re.Pattern[str] | None = None,
) -> Flat:
    """Converts weights of another format to our names.

    Args:
      state: Arrays of the other format, by name.
      entries: Conversion table.
      shapes: Arrays or shapes of the model's parameters, by our names.
      adaptable: Pattern of our names for parameters that may differ in length along any axis, and
        for heads that may be absent; None: everything must fit.

    Raises:
      UserError: Keys are missing or unexpected, or have a wrong shape; all are listed.
    """
    found: Flat = {}
    misfits: list[str] = []
    unexpected = sorted(set(state) - {name for entry in entries for name in entry.theirs})
    for entry in entries:
        free = adaptable is not None and adaptable.search(entry.ours)
        missing = [name for name in entry.theirs if name not in state]
        if missing and free and _HEAD.search(entry.ours):
            continue
        for name in missing:
            near = nearest(name, unexpected) if len(misfits) < _MOST_NEAREST else ""
            misfits.append(f"{name}: missing.{near}")
        if missing:
            continue
        theirs, wanted = [np.asarray(state[n]) for n in entry.theirs], shapes[entry.ours]
        # A view of one number: takes no memory.
        like = entry.to_theirs(np.broadcast_to(np.False_, wanted.shape))
        wrong = [
            f"{name}: {there.shape} in the source, {here.shape} expected"
            for name, there, here in zip(entry.theirs, theirs, like, strict=True)
            if not (there.ndim == here.ndim and free) and there.shape != here.shape
        ]
        misfits += wrong
        if not wrong:
            found[entry.ours] = np.ascontiguousarray(entry.to_ours(*theirs), wanted.dtype)
    misfits += [f"{name}: unexpected" for name in unexpected]
    if misfits:
        raise UserError(
            f"These are not weights of this model ({len(misfits)} misfits):\n  "
            + "\n  ".join(misfits)
        )
    return found


def to_theirs(flat: State, entries: Sequence[Entry]) -> Flat:
    """The exact inverse of `to_ours`; an absent head is left out.

    Raises:
      UserError: Parameters are missing; all are listed.
    """
    absent = [e.ours for e in entries if e.ours not in flat and not _HEAD.search(e.ours)]
    if absent:
        raise UserError("The weights lack parameters of the model: " + ", ".join(absent))
    return {
        name: np.ascontiguousarray(x)
        for entry in entries
        if entry.ours in flat
        for name, x in zip(entry.theirs, entry.to_theirs(np.asarray(flat[entry.ours])), strict=True)
    }
