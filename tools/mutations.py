"""Changes to files that a reader must survive: in their bytes, their descriptions and their values.

Every function takes what a file holds and a random generator, and returns what it holds then.
`change` chooses one that fits the file. `fuzz_files` reads the results.
"""

import io
import json
import pathlib
import shutil
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tools.fuzz_images import METHODS, damaged

# What a description may say where something else is expected.
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 0.5, -1e-9, 1e38, 10**9, 10**30),
    *(float("nan"), float("inf"), "", "x", "../../x", "/etc/passwd", "\ud800", "A" * 10**5),
    *([], {}, [[]], [None], [0, 0, 0], {"": {}}, [1e38] * 3, ["a", "a", "a"]),
)
VALUES = (float("nan"), float("inf"), -float("inf"), 1e38, -3e38)  # as float32
_DEEP = 50_000  # lists within one another


def change(file: pathlib.Path, rng: np.random.Generator) -> str:
    """Changes one file in place, in one of the ways that fit it, and says how."""
    whole = file.read_bytes()
    ways: list[tuple[str, Callable[[bytes, np.random.Generator], bytes]]] = [
        ("bytes", damaged),
        ("a block of zeros", _zeros),
        ("cut off", lambda data, dice: data[: int(dice.integers(len(data) or 1))]),
    ]
    if _json(whole) is not None:
        ways += [("description", change_json)] * 6 + [("nested deeply", _nested)]
    if file.suffix == ".safetensors":
        ways += [("header", _header)] * 3 + [("metadata", _metadata)] * 3 + [("values", _values)]
    if zipfile.is_zipfile(file):
        ways += [("member", _member)] * 6 + [("values", _member_values)] * 2
        ways += [("directory of the archive", _directory)] * 2
    name, way = ways[int(rng.integers(len(ways)))]
    file.write_bytes(way(whole, rng))
    return name


def replace(file: pathlib.Path, others: list[pathlib.Path], rng: np.random.Generator) -> str:
    """Takes a file away, empties it, makes it a folder, or puts another file in its place."""
    others = [other for other in others if other != file]
    kind = int(rng.integers(4 if others else 3))
    if kind == 0:
        file.unlink()
        return "removed"
    if kind == 1:
        file.write_bytes(b"")
        return "empty"
    if kind == 2:
        file.unlink()
        file.mkdir()
        return "a folder"
    shutil.copy(others[int(rng.integers(len(others)))], file)
    return "another file"


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def change_json(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes, takes away or renames one entry of a JSON value."""
    value = json.loads(data)
    places = list(_places(value))
    if not places:
        return json.dumps(ODD[int(rng.integers(len(ODD)))]).encode()
    holder, key = places[int(rng.integers(len(places)))]
    kind = int(rng.integers(8))
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == 2:
        other, name = places[int(rng.integers(len(places)))]
        holder[key] = json.loads(json.dumps(other[name]))
    else:
        holder[key] = ODD[int(rng.integers(len(ODD)))]
    return json.dumps(value).encode()


def _places(value: Any) -> Any:
    """Yields each entry of a JSON value: what holds it, and its key."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _nested(data: bytes, rng: np.random.Generator) -> bytes:
    return b'{"a": ' + b"[" * _DEEP


def _zeros(data: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(data) or 1))
    end = min(len(data), start + int(rng.integers(1, 4096)))
    return data[:start] + bytes(end - start) + data[end:]


def split_safetensors(data: bytes) -> tuple[bytes, bytes]:
    """Header and numbers of a .safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    return data[8:start], data[start:]


def join_safetensors(header: bytes, numbers: bytes) -> bytes:
    """A .safetensors file of a header and numbers."""
    return struct.pack("<Q", len(header)) + header + numbers


def _header(data: bytes, rng: np.random.Generator) -> bytes:
    header, numbers = split_safetensors(data)
    return join_safetensors(change_json(header, rng), numbers)


def _metadata(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes what the file says of its model, where it says anything."""
    header, numbers = split_safetensors(data)
    entries = json.loads(header)
    texts = {k: v for k, v in entries.get("__metadata__", {}).items() if _json(v.encode())}
    if not texts:
        return _header(data, rng)
    key = sorted(texts)[int(rng.integers(len(texts)))]
    entries["__metadata__"][key] = change_json(texts[key].encode(), rng).decode()
    return join_safetensors(json.dumps(entries).encode(), numbers)


def _put_value(data: bytes, start: int, rng: np.random.Generator) -> bytes:
    """Writes a number that weights do not have among the float32 that begin at `start`."""
    count = (len(data) - start) // 4
    if count < 1:
        return data
    at = start + 4 * int(rng.integers(count))
    value = np.float32(VALUES[int(rng.integers(len(VALUES)))]).tobytes()
    return data[:at] + value + data[at + 4 :]


def _values(data: bytes, rng: np.random.Generator) -> bytes:
    header, numbers = split_safetensors(data)
    return join_safetensors(header, _put_value(numbers, 0, rng))


def members(data: bytes) -> dict[str, bytes]:
    """Contents of a zip archive's members by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {member.filename: archive.read(member) for member in archive.infolist()}


def packed(contents: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of names and contents, whose checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in contents:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return buffer.getvalue()


def _member(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes one member of an archive, or how the archive keeps it."""
    contents = list(members(data).items())
    at, kind = int(rng.integers(len(contents))), int(rng.integers(7))
    # Half of the time the first one, which is the program of a PyTorch file.
    at = 0 if rng.integers(2) else at
    name, content = contents[at]
    method = METHODS[int(rng.integers(len(METHODS)))]
    if kind == 0:
        del contents[at]
    elif kind == 1:
        contents[at] = (("../x", "/tmp/x", "x", name + "x", "")[int(rng.integers(5))], content)
    elif kind == 2:
        contents[at] = (name, content[: int(rng.integers(len(content) or 1))])
    elif kind == 3:
        contents[at] = (name, b"")
    elif kind in (4, 5):
        contents[at] = (name, damaged(content, rng))
    return packed(contents, method)


def _member_values(data: bytes, rng: np.random.Generator) -> bytes:
    contents = list(members(data).items())
    large = [i for i, (_, content) in enumerate(contents) if len(content) >= 64]
    if not large:
        return data
    name, content = contents[at := large[int(rng.integers(len(large)))]]
    # An array of NumPy begins with a header of 128 bytes.
    start = 128 if content.startswith(b"\x93NUMPY") else 0
    contents[at] = (name, _put_value(content, start, rng))
    return packed(contents)


def _directory(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes a field in the archive's list of members: method, flags, sizes, checksum, place."""
    entries = [at for at in range(len(data) - 4) if data[at : at + 4] == b"PK\x01\x02"]
    if not entries:
        return damaged(data, rng)
    at = entries[int(rng.integers(len(entries)))]
    # Offset and length of: version, flags, method, checksum, sizes packed and unpacked, place.
    fields = ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (42, 4))
    start, length = fields[int(rng.integers(len(fields)))]
    choices = (0, 1, 8, 9, 12, 14, 93, 99, 2**15, 2**31 - 1, 2**32 - 1)
    value = int(choices[int(rng.integers(len(choices)))]) % 256**length
    return data[: at + start] + value.to_bytes(length, "little") + data[at + start + length :]
