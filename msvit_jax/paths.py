"""Paths as users write them: `~`, relative ones, and addresses such as gs://bucket/run.

Everything that a user names is opened through this module. A local path becomes a `pathlib.Path`,
an address an `etils.epath.Path`, which has the methods that we use: `exists`, `is_dir`, `is_file`,
`iterdir`, `glob` (of one level), `open` in text or bytes, `read_*`, `write_*`, `mkdir`, `unlink`.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import pathlib
import re
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

from msvit_jax import extras
from msvit_jax.errors import UserError, describe

PathLike: TypeAlias = str | os.PathLike[str]
# Kinds of addresses that epath opens, and the packages it needs for them.
BACK_ENDS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
# pathlib turns two slashes into one.
_COLLAPSED = re.compile(rf"({'|'.join(BACK_ENDS)}):/([^/].*)", re.DOTALL)
_REWRITTEN_EVERY = 30.0  # seconds between rewrites; an object at an address cannot grow
CONFIG_FILE = "config.json"  # in the workdir of a run
CACHE = "MSVIT_JAX_CACHE"  # environment variable with the folder for copies of addresses


def parse(path: PathLike) -> pathlib.Path:
    """Parses a path or an address.

    Args:
      path: Path or address; `~` and `~name` are homes, file:// is a local path.

    Returns:
      `pathlib.Path`, or `epath.Path` for an address.

    Raises:
      UserError: Not a path, an address of an unknown kind or without a bucket, or one whose back
        end is not installed.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UserError(f"{text!r} is not a path; give the path of a file or folder.")
    match = _ADDRESS.fullmatch(text) or _COLLAPSED.fullmatch(text)
    if match is None:
        return pathlib.Path(_home(text))
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        return pathlib.Path(rest.removeprefix("localhost"))
    if scheme not in BACK_ENDS:
        known = ", ".join(f"{name}://" for name in BACK_ENDS)
        raise UserError(f"{text!r}: addresses of this kind cannot be opened; use {known}.")
    if not rest.strip("/") or rest.startswith("/"):
        raise UserError(f"{text!r} names no bucket; write {scheme}://<bucket>/<path>.")
    _require(scheme, text)
    with extras.needed("gcs"):
        from etils import epath  # only addresses need it
    return cast(pathlib.Path, epath.Path(f"{scheme}://{rest}"))


def _home(text: str) -> str:
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise UserError(
            f"{text!r} begins with the home of a user who does not exist here. For a folder "
            f"of that name, write ./{text}."
        )
    return expanded


def _require(scheme: str, text: str) -> None:
    package = BACK_ENDS[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{text!r}: {scheme}:// needs a package: pip install {package}")


def is_address(path: PathLike) -> bool:
    """Tells whether a parsed path is an address; a text is parsed first."""
    return not isinstance(parse(path) if isinstance(path, str) else path, pathlib.Path)


def absolute(path: PathLike) -> pathlib.Path:
    """Parses a path, and makes a relative one absolute."""
    parsed = parse(path)
    return parsed if is_address(parsed) else parsed.absolute()


@contextlib.contextmanager
def named(path: PathLike) -> Iterator[None]:
    """Adds the file's name to errors of the operating system that have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def whole(path: PathLike) -> Iterator[pathlib.Path]:
    """Writes a file or folder atomically, so that it is never there in part.

    Everything that the library writes at once is written by this: in a temporary folder beside its
    place (`aside`), and renamed at the end.

    Args:
      path: Path or address of the file or folder. A file that is there is replaced, a folder is
        not.

    Yields:
      Local path with the same name, to write to.
    """
    place = parse(path)
    with aside(place.parent) as folder, named(place):
        yield folder / place.name
        if is_address(place):
            upload(folder / place.name, place)
        else:
            os.replace(folder / place.name, place)


@contextlib.contextmanager
def aside(parent: PathLike) -> Iterator[pathlib.Path]:
    """Makes a temporary folder in a folder, or a local one for an address, and removes it.

    Those that killed processes left in the same place are removed, too.
    """
    place = parse(parent)
    far = is_address(place)
    if not far:
        _sweep(place)
    with named(place):
        made = tempfile.mkdtemp(prefix=_temporary_prefix(), dir=None if far else place)
    try:
        yield pathlib.Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


_TEMPORARY = ".msvit_part."  # first letters of temporary folders
_STALE_AFTER = 86400.0  # seconds; for those of other machines, whose processes are not seen here


def _temporary_prefix() -> str:
    return f"{_TEMPORARY}{socket.gethostname().replace('.', '-')[:64]}.{os.getpid()}."


def _sweep(folder: pathlib.Path) -> None:
    """Removes temporary folders whose processes are gone."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError, ValueError):
            host, pid = left.name.removeprefix(_TEMPORARY).split(".")[:2]
            if host == _temporary_prefix().removeprefix(_TEMPORARY).split(".")[0]:
                gone = not is_running(int(pid))
            else:
                gone = time.time() - left.stat().st_mtime > _STALE_AFTER
            if gone:
                shutil.rmtree(left, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Tells whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def write_whole(path: PathLike, content: str | bytes) -> None:
    """Replaces a file atomically, see `whole`.

    Args:
      path: Path of the file.
      content: Bytes, or text that is written as it is, in UTF-8.
    """
    place = parse(path)
    data = content.encode() if isinstance(content, str) else content
    if is_address(place):  # objects appear whole
        place.write_bytes(data)
        return
    with whole(place) as part:
        part.write_bytes(data)


def check_writable(folder: PathLike, name: str = "", *, make: bool = True) -> pathlib.Path:
    """Tries to write in a folder; leaves no file.

    Args:
      folder: Folder to write in.
      name: Name that messages use, for instance '--out'.
      make: Whether it is made where it is missing. If not, the nearest existing parent is tried
        instead; addresses have no folders to make.

    Returns:
      Parsed path of the folder.

    Raises:
      UserError: It cannot be made or written, or is a file.
    """
    place, called = parse(folder), f"{name}=" if name else ""
    with _as_user_errors(place, "cannot be written", called):
        tried = place
        if not make and not is_address(place):
            tried = next(p for p in (place, *place.absolute().parents) if p.exists())
        if tried.exists() and not tried.is_dir():
            raise UserError(f"{called}{str(tried)!r} is a file; a folder is needed there.")
        tried.mkdir(parents=True, exist_ok=True)
        probe = tried / f".write_test.{uuid.uuid4().hex}"
        try:
            probe.write_bytes(bytes(4096))
        finally:
            with contextlib.suppress(Exception):
                probe.unlink()
    return place


@contextlib.contextmanager
def _as_user_errors(place: pathlib.Path, what: str, called: str = "") -> Iterator[None]:
    """Raises errors at a path as UserErrors; back ends of addresses raise many types."""
    errors: type[Exception] = Exception if is_address(place) else OSError
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(f"{called}{str(place)!r} {what}: {describe(error, named=False)}") from error


class Lines:
    """A text file that lines are added to.

    At an address the file is rewritten, at most every 30 seconds and when it is closed, so a run
    that is killed may lose the last lines.
    """

    def __init__(self, path: PathLike) -> None:
        """Opens a file to append to; its content stays."""
        self._path = parse(path)
        self._written, self._text = time.monotonic(), ""
        self._file: Any = None
        if not is_address(self._path):
            with named(self._path):
                # Not buffered, so that a write a full disk refused is not tried again at the end.
                self._file = self._path.open("ab", buffering=0)
        elif self._path.exists():
            self._text = self._path.read_text()

    def write(self, text: str) -> None:
        """Appends text."""
        if self._file is None:
            self._text += text
        else:
            left = text.encode()
            with named(self._path):
                while left:  # a disk that is nearly full takes a part before it refuses
                    left = left[self._file.write(left) :]

    def flush(self) -> None:
        """Makes appended text visible to readers, soon if not at once."""
        if self._file is None and time.monotonic() - self._written >= _REWRITTEN_EVERY:
            self._write_anew()

    def sync(self) -> None:
        """Makes appended text safe, also from a loss of power."""
        if self._file is None:
            self._write_anew()
        else:
            with named(self._path), contextlib.suppress(io.UnsupportedOperation):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes what is left and closes the file."""
        if self._file is None:
            self._write_anew()
        else:
            self._file.close()

    def _write_anew(self) -> None:
        self._path.write_text(self._text)
        self._written = time.monotonic()


def fetch(path: PathLike) -> pathlib.Path:
    """Returns a local copy of a file or folder at an address, for readers of local files.

    Copies are kept in `~/.cache/msvit_jax` (variable MSVIT_JAX_CACHE) and renewed when names, sizes
    or dates at the address change. A local path is returned as it is.

    Raises:
      UserError: There is nothing at the path, it cannot be read, or the disk is too full for a
        copy.
    """
    place = parse(path)
    if not is_address(place):
        return place
    with _as_user_errors(place, "cannot be read"):
        files = dict(_files(place))
        if not files:
            raise UserError(f"There is nothing at {str(place)!r}.")
        sizes = {name: (s.length, s.mtime) for name, f in files.items() for s in [_stat(f)]}
    mark = hashlib.sha256(repr((str(place), sorted(sizes.items()))).encode()).hexdigest()[:16]
    cache = check_writable(os.environ.get(CACHE) or "~/.cache/msvit_jax") / mark
    copy = cache / place.name
    if copy.exists():
        return copy
    total, free = sum(size for size, _ in sizes.values()), shutil.disk_usage(cache.parent).free
    if total > free:
        raise UserError(
            f"{str(place)!r} has {total:,} bytes; {str(cache.parent)!r} has room for {free:,}. Set "
            f"{CACHE} to a folder on a larger disk, or mount the bucket and give its local path."
        )
    print(f"Copying {place} ({total:,} bytes) to {cache}, once.", file=sys.stderr, flush=True)
    with aside(cache.parent) as folder:
        for name, file in files.items():
            target = folder / place.name / name if name else folder / place.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with _as_user_errors(place, "cannot be copied"):
                _copy(file, target)
        cache.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):  # another process was faster; its copy is the same
            (folder / place.name).rename(copy)
    return copy


def upload(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a local file or folder to a path or address."""
    with _as_user_errors(target, "cannot be written"):
        for name, file in _files(source):
            place = target / name if name else target
            place.parent.mkdir(parents=True, exist_ok=True)
            _copy(file, place)


def _files(place: pathlib.Path, prefix: str = "") -> Iterator[tuple[str, pathlib.Path]]:
    """Lists every file in a folder by its relative path; a file itself by an empty text."""
    if place.is_dir():
        for inner in sorted(place.iterdir(), key=str):
            if inner != place:  # some back ends list a marker of the folder itself
                yield from _files(inner, f"{prefix}/{inner.name}".lstrip("/"))
    elif place.exists():
        yield prefix, place


def _stat(file: pathlib.Path) -> Any:
    return cast(Any, file).stat()


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    with source.open("rb") as read, target.open("wb") as written, named(target):
        shutil.copyfileobj(read, written, 2**22)
