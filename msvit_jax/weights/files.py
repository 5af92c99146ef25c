"""Reading weights files without executing what is in them, or taking memory that they only claim.

.safetensors, .npz, PyTorch's .pth, .pth.tar, .pt and .bin, which need the torch extra, and the
.index.json of transformers, which says in which of several files each array lies.
"""

import json
import math
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from msvit_jax.errors import UserError

Flat = dict[str, np.ndarray]

PYTORCH = (".pth", ".tar", ".pt", ".bin")
SUFFIXES = (".safetensors", ".npz", *PYTORCH)
INDEX = ".index.json"
# Weights are noise, which hardly shrinks; a small file of zeros may claim any size.
_MOST_SHRUNK = 100


def read(path: str | pathlib.Path) -> Flat:
    """Reads all arrays of a file by name; bfloat16 and float16 as float32.

    Raises:
      UserError: there is no such file, it is damaged, it holds something else than arrays of
        numbers, its suffix is not known, a file that it names is missing, or PyTorch is needed and
        not installed.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"There is no weights file {str(path)!r}.")
    if path.name.endswith(INDEX):
        return _read_parts(path)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{str(path)!r} cannot be read as weights: its suffix is {path.suffix or 'missing'}; "
            f"known are {', '.join((*SUFFIXES, INDEX))}."
        )
    if path.suffix in PYTORCH:
        return _read_pytorch(path)
    reader = _read_safetensors if path.suffix == ".safetensors" else _read_npz
    try:
        flat = reader(path)
    except (OSError, ValueError, EOFError, SafetensorError, zipfile.BadZipFile) as error:
        raise UserError(f"{str(path)!r} cannot be read as weights: {error}") from error
    return {name: _number(name, x, path) for name, x in flat.items()}


def _read_parts(path: pathlib.Path) -> Flat:
    """Reads all files that an index names, which lie beside it."""
    where = read_json(path.read_text(errors="replace"), path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{str(path)!r} does not say in which files the weights are (weight_map).")
    flat: Flat = {}
    for part in sorted(set(map(str, where.values()))):
        if pathlib.PurePath(part).name != part or part.endswith(INDEX):
            raise UserError(f"{str(path)!r} names {part!r}, which is no weights file beside it.")
        flat |= read(path.with_name(part))
    lost = sorted(set(where) - set(flat))
    if lost:
        raise UserError(
            f"{str(path)!r} names {len(lost)} arrays that its files lack: {', '.join(lost[:3])}"
        )
    return flat


def _number(name: str, x: np.ndarray, path: pathlib.Path) -> np.ndarray:
    if x.dtype == np.dtype("V2"):  # how NumPy stores bfloat16, which it does not know
        x = x.view(ml_dtypes.bfloat16)
    if x.dtype in (ml_dtypes.bfloat16, np.float16):
        return x.astype(np.float32)
    if x.dtype.kind not in "fiub":
        raise UserError(
            f"{str(path)!r} cannot be read as weights: {name} holds {x.dtype}, not numbers."
        )
    return x


def _read_safetensors(path: pathlib.Path) -> Flat:
    # The library checks every size against the file's before it reads.
    return load_file(path)


def read_metadata(path: str | pathlib.Path) -> dict[str, str]:
    """The texts by name in a .safetensors file's header.

    Raises:
      UserError: it is not such a file, or damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} cannot be read as weights: {error}") from error


def _read_npz(path: pathlib.Path) -> Flat:
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
    return flat


def _check_sizes(members: list[zipfile.ZipInfo], size: int) -> None:
    """Raises ValueError for an archive that claims more than a file of that size can hold."""
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
    """Raises ValueError unless a member is an array of plain values, as many as it holds."""
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


def _read_pytorch(path: pathlib.Path) -> Flat:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"Reading {path.suffix} files needs PyTorch: pip install 'msvit-jax[torch]'"
        ) from error
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{str(path)!r} is damaged, or was saved by PyTorch before 1.6, whose files cannot be "
            "checked before they are loaded: load it with PyTorch and save it again."
        )
    try:
        # Mapped: no memory is taken for what the file only claims to hold.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many types, for damaged files and for files with code in them
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{str(path)!r} is not a file of weights alone: {first}") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(x, torch.Tensor) for x in loaded.values()
    ):
        raise UserError(f"{str(path)!r} does not hold tensors by name.")
    return {
        name.removeprefix("module."): x.detach().to(torch.float32).numpy().copy()
        for name, x in loaded.items()
    }


def read_json(text: str, path: str | pathlib.Path) -> dict[str, Any]:
    """Parses an object.

    Raises:
      UserError: it is none.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{str(path)!r} holds damaged JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} holds JSON of {type(value).__name__}, not of names.")
    return value
