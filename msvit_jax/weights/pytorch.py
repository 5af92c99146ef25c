"""Reads files by `torch.save` without PyTorch and without executing their contents.

Such a file is a zip archive with a pickle that names tensors and a member of plain bytes for each
of their storages. A pickle is a program that may call whatever it names. Here it can only name
tensors, containers, and classes of settings, which become inert stand-ins. Anything else is
rejected by its name before it is called.
"""

import collections
import dataclasses
import io
import math
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}
_DTYPES: dict[str, Any] = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
}
# Classes of settings that are stored with the tensors. A final `*` stands for a whole package.
_SETTINGS = (
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.dict",
    "builtins.float",
    "builtins.frozenset",
    "builtins.int",
    "builtins.list",
    "builtins.object",
    "builtins.range",
    "builtins.set",
    "builtins.slice",
    "builtins.str",
    "builtins.tuple",
    "collections.Counter",
    "collections.defaultdict",
    "copyreg._reconstructor",
    "datetime.*",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.*",
    "numpy._core.multiarray.*",
    "numpy.dtypes.*",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "addict.*",
    "easydict.*",
    "lightning.*",
    "lightning_fabric.*",
    "ml_collections.*",
    "omegaconf.*",
    "pytorch_lightning.*",
    "transformers.training_args.*",
    "typing.*",
    "yacs.config.*",
)
# Opcodes that allocate by a merely claimed length, call unnamed objects, or use external data.
_REFUSED_OPCODES = {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4"}
_INDEXED = {"PUT", "BINPUT", "LONG_BINPUT"}
_DEEPEST = 100


class Inert(dict[Any, Any]):
    """Inert stand-in for an object of settings: holds its attributes by name and runs nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.update(state)

    def _ignore(self, *args: Any) -> None:
        """Ignores items of a list or set."""

    append = extend = add = _ignore


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the file; its values are read by `np.asarray`.

    Attributes:
      read: Function that reads all bytes of its storage.
      dtype: NumPy's type of its elements.
      shape: Length of each axis.
      strides: Stride of each axis, in elements.
      offset: Index of its first element within the storage.
      count: Number of elements of the storage.
    """

    read: Callable[[], bytes]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    count: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        flat = np.frombuffer(self.read(), self.dtype)[self.offset :]
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        return np.array(view, dtype)


def read(path: pathlib.Path) -> Any:
    """Reads the saved object, with its tensors as `Tensor`.

    Raises:
      ValueError: The file is damaged, claims more than it holds, or names an object that must not
        be loaded.
    """
    archive = zipfile.ZipFile(path)  # stays open for the tensors
    members = {member.filename: member for member in archive.infolist()}
    main = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(main) != 1:
        first = ", ".join(list(members)[:3]) or "nothing"
        raise ValueError(f"it was not written by torch.save: it is a zip archive of {first}")
    folder = main[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in members and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian; save it again on another machine")
    content = archive.read(main[0])
    _check(content)
    try:
        return _Unpickler(content, archive, members, folder).load()
    except (ValueError, zipfile.BadZipFile):
        raise
    except Exception as error:  # a damaged pickle can raise any type of error
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error})") from error


def _check(content: bytes) -> None:
    """Raises ValueError for a pickle that is damaged or would allocate memory it merely claims."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _REFUSED_OPCODES:
            raise ValueError(f"its pickle holds {opcode.name}, which weights have no use for")
        if opcode.name in _INDEXED and int(argument or 0) > len(content):
            raise ValueError("its pickle claims more objects than it holds")


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        content: bytes,
        archive: zipfile.ZipFile,
        members: Mapping[str, zipfile.ZipInfo],
        folder: str,
    ) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._archive, self._members, self._folder = archive, members, folder

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        package, _, last = full.rpartition(".")
        if package in ("torch", "torch.storage") and last in _STORAGES:
            return np.dtype(_STORAGES[last])
        if package == "torch" and last in _DTYPES:
            return np.dtype(_DTYPES[last])
        if full in _FUNCTIONS:
            return _FUNCTIONS[full]
        if any(full == known or _within(full, known) for known in _SETTINGS):
            return type(last, (Inert,), {})
        raise ValueError(
            f"it holds {full}, which is neither a tensor nor a known class of settings and was not "
            "loaded; save the weights alone: torch.save(model.state_dict(), file)"
        )

    def persistent_load(self, pid: Any) -> tuple[Callable[[], bytes], np.dtype[Any], int]:
        _, dtype, key, _, count = pid
        member = self._members.get(f"{self._folder}data/{key}")
        if member is None:
            raise ValueError(f"it lacks the values of its storage {key}")
        if count * dtype.itemsize > member.file_size:
            raise ValueError(
                f"storage {key} claims {count * dtype.itemsize:,} bytes and holds "
                f"{member.file_size:,}"
            )
        return lambda: self._archive.read(member), dtype, member.file_size


def _within(full: str, known: str) -> bool:
    # A known name stands for more only if it ends with '.*': 'pathlib.Path.touch' is not known.
    return known.endswith(".*") and full.startswith(known[:-1])


def _tensor(
    storage: Any, offset: int, shape: Iterable[int], strides: Iterable[int], *more: Any
) -> Tensor:
    """PyTorch's `_rebuild_tensor_v2`, and v3, which also passes the type of the elements."""
    read, dtype, size = storage
    named = [x for x in more if isinstance(x, np.dtype)]
    dtype = named[0] if named else dtype
    shape, strides, count = tuple(shape), tuple(strides), size // dtype.itemsize
    if min((offset, *shape, *strides), default=0) < 0 or len(shape) != len(strides):
        raise ValueError(f"a tensor has the shape {shape} and the strides {strides}")
    last = offset + sum((length - 1) * by for length, by in zip(shape, strides, strict=True))
    if math.prod(shape) and (math.prod(shape) > count or last >= count):
        raise ValueError(f"a tensor of shape {shape} claims more than its {count} values")
    return Tensor(read, dtype, shape, strides, offset, count)


def _parameter(tensor: Any, *more: Any) -> Any:
    return tensor


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    return function(*arguments)


# Functions that a pickle of tensors may call.
_FUNCTIONS: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Tensor": _parameter,
}


def flatten(content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flattens nested mappings, with names joined by '.', into tensors and everything else.

    Each container is visited once, because containers in a pickle can form cycles.
    """
    tensors: dict[str, Any] = {}
    others: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(value: Any, name: str, depth: int) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping) and value and depth < _DEEPEST:
            if id(value) not in seen:
                seen.add(id(value))
                for key, inner in value.items():
                    visit(inner, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(value, list | tuple) and depth < _DEEPEST and any(map(_holds, value)):
            if id(value) not in seen:
                seen.add(id(value))
                for index, inner in enumerate(value):
                    visit(inner, f"{name}.{index}" if name else str(index), depth + 1)
        else:
            others[name] = value

    visit(content, "", 0)
    return tensors, others


def _holds(value: Any) -> bool:
    """Whether a member of a list is a tensor or may hold tensors."""
    return isinstance(value, Tensor) or (isinstance(value, Mapping) and bool(value))
