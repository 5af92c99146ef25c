"""Reads weights files without executing their contents or allocating memory they merely claim.

The formats are .safetensors, .npz, PyTorch's .pth, .pth.tar, .pt, .bin and .ckpt, and the
.index.json of transformers, which assigns arrays to several files. Everything is read under the
file's own names; `wrappers` finds the model in it.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from msvit_jax.errors import UserError, describe, short
from msvit_jax.weights import pytorch, wrappers

Flat = dict[str, np.ndarray]

PYTORCH = (".pth", ".tar", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".npz", *PYTORCH)
INDEX = ".index.json"
# Largest accepted compression ratio. Weights hardly compress; a small file of zeros may claim any
# size.
_MOST_SHRUNK = 100
_LISTED = 12  # most parts listed in a message


_LFS = b"version https://git-lfs.github.com/spec/"
# Types smaller than float32 that are converted to float32, which is exact.
_SMALL = (ml_dtypes.bfloat16, np.float16)


@dataclasses.dataclass(frozen=True)
class Contents:
    """Contents of a file.

    Attributes:
      arrays: Arrays by name; names of nested mappings are joined with '.'. PyTorch's tensors are
        read lazily, by `number`.
      values: Everything else by name: settings, counters, texts.
    """

    arrays: dict[str, Any]
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Summary of the contents, for messages."""
        held = wrappers.groups(sorted(self.arrays))[:_LISTED]
        named = {name.split(".")[0] for name in self.values}
        held += sorted(named - {name.split(".")[0] for name in self.arrays})[:_LISTED]
        return ", ".join(held) or "nothing"


def read(path: str | pathlib.Path) -> Flat:
    """Reads all arrays of a file by name; numbers smaller than float32 as float32.

    Raises:
      UserError: The file is missing or damaged, holds arrays of something other than numbers, has
        an unknown suffix, or names a file that is missing.
    """
    path = pathlib.Path(path)
    return {name: number(name, x, path) for name, x in read_contents(path).arrays.items()}


def read_contents(path: str | pathlib.Path) -> Contents:
    """Reads the contents of a file; see `read`."""
    path = pathlib.Path(path)
    check_there(path)
    if path.name.endswith(INDEX):
        return Contents(_read_parts(path))
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{str(path)!r} cannot be read as weights: its suffix is {path.suffix or 'missing'}; "
            f"known are {', '.join((*SUFFIXES, INDEX))}."
        )
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    with _reading(path):
        return readers.get(path.suffix, _read_pytorch)(path)


@contextlib.contextmanager
def _reading(path: str | pathlib.Path, part: str = "") -> Iterator[None]:
    """Reports in one line what is damaged; readers of archives raise errors of any type."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = f"{part}: {describe(error)}" if part else describe(error)
        raise UserError(f"{str(path)!r} cannot be read as weights: {what}") from error


def check_there(path: pathlib.Path) -> None:
    """Raises UserError if a file is missing or is an unfetched git-lfs pointer."""
    if not path.is_file():
        raise UserError(f"There is no weights file {str(path)!r}.")
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if start == _LFS:
        raise UserError(
            f"{str(path)!r} is a git-lfs pointer, not the weights: fetch them with 'git lfs pull' "
            "in its repository, or download the file itself."
        )


def _read_parts(path: pathlib.Path) -> Flat:
    """Reads all files that an index names; they must be in its folder."""
    where = read_json(path.read_text(errors="replace"), path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{str(path)!r} does not say in which files the weights are (weight_map).")
    parts = sorted(set(map(str, where.values())))
    for part in parts:
        # Names of more letters are those of no file.
        if pathlib.PurePath(part).name != part or part.endswith(INDEX) or len(part) > 255:
            raise UserError(
                f"{str(path)!r} names {short(part)!r}, which is not a weights file beside it."
            )
    missing = [part for part in parts if not path.with_name(part).is_file()]
    if missing:
        raise UserError(
            f"{str(path)!r} names {len(parts)} files, of which {len(missing)} are missing beside "
            f"it: {', '.join(missing[:_LISTED])}"
        )
    flat: Flat = {}
    for part in parts:
        flat |= read(path.with_name(part))
    lost = sorted(set(where) - set(flat))
    if lost:
        raise UserError(
            f"{str(path)!r} names {len(lost)} arrays that its files lack: {', '.join(lost[:3])}"
        )
    return flat


def number(name: str, x: Any, path: str | pathlib.Path) -> np.ndarray:
    """Reads an array's values; floats of fewer than 32 bits become float32.

    Raises:
      UserError: The array does not hold real numbers, or its values cannot be read.
    """
    with _reading(path, name):  # a part of an archive may be damaged
        x = np.asarray(x)
    if x.dtype == np.dtype("V2"):  # NumPy stores bfloat16, which it does not know, as this
        x = x.view(ml_dtypes.bfloat16)
    if x.dtype in _SMALL or x.dtype.name.startswith("float8"):
        return x.astype(np.float32)
    if x.dtype.kind not in "fiub":
        raise UserError(
            f"{str(path)!r} cannot be read as weights: {name} holds {x.dtype}, not numbers."
        )
    return x


def _read_safetensors(path: pathlib.Path) -> Contents:
    # The library checks every size against the file's before reading.
    return Contents(dict(load_file(path)))


def read_metadata(path: str | pathlib.Path) -> dict[str, str]:
    """Reads the metadata of a .safetensors file: strings by name.

    Raises:
      UserError: The file is damaged or not a .safetensors file.
    """
    with _reading(path), safe_open(path, "numpy") as file:
        return dict(file.metadata() or {})


def _read_npz(path: pathlib.Path) -> Contents:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_sizes(members, path.stat().st_size)
        flat = {}
        for member in members:
            _check_header(archive, member)
            with archive.open(member) as file:
                flat[member.filename.removesuffix(".npy")] = np.lib.format.read_array(
                    file, allow_pickle=False
                )
    return Contents(flat)


def _check_sizes(members: list[zipfile.ZipInfo], size: int) -> None:
    """Raises ValueError if an archive claims more data than a file of its size can hold."""
    for member in members:
        if member.header_offset + member.compress_size > size:
            raise ValueError(f"{member.filename} reaches beyond the end of the file")
        stored = member.compress_type == zipfile.ZIP_STORED
        if stored and member.file_size != member.compress_size:
            raise ValueError(f"{member.filename} claims a size that it was not stored with")
    claimed = sum(member.file_size for member in members)
    if claimed > _MOST_SHRUNK * size + 2**20:
        raise ValueError(f"it claims to unpack to {claimed:,} bytes from {size:,}")


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises ValueError unless a member is an array of plain values of the size it claims."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = header(file)
        held = member.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects, which are never loaded")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != held:
        raise ValueError(f"{member.filename} claims {claimed:,} bytes and holds {held:,}")


def _read_pytorch(path: pathlib.Path) -> Contents:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            "it is damaged, or was saved by PyTorch before 1.6, whose files cannot be checked "
            "before they are loaded: load it with PyTorch and save it again"
        )
    with zipfile.ZipFile(path) as archive:
        _check_sizes(archive.infolist(), path.stat().st_size)
    return Contents(*pytorch.flatten(pytorch.read(path)))


def read_json(text: str, path: str | pathlib.Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      UserError: The text is not a JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} holds damaged JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{str(path)!r} holds a JSON {type(value).__name__} instead of named values."
        )
    return value
