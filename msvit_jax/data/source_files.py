"""Lists and reads the image files of a folder or zip archive of split/class/file."""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from msvit_jax import paths
from msvit_jax.data import image_files
from msvit_jax.data.image_files import ImageError, shown
from msvit_jax.errors import UserError

LAYOUT = "Expected split/class/file, for instance train/cat/1.jpg and validation/cat/2.jpg."
_DEFLATE64 = 9  # compression by Windows Explorer of files larger than 2 GB
_UNZIP = "unpack the archive with another tool, for instance 7-Zip, and give the folder"


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One image file in a folder or archive.

    Attributes:
        container: Path of the folder or zip archive.
        path: Path within the container, as split/class/file with forward slashes.
        entry: Name in the archive if it differs from `path`; else empty.
    """

    container: str
    path: str
    entry: str = ""

    @property
    def split(self) -> str:
        """Name of the split, the first level of the path."""
        return self.path.split("/")[0]

    @property
    def label(self) -> str:
        """Name of the class, the second level of the path."""
        return self.path.split("/")[1]

    def read(self) -> bytes:
        """Returns the file's bytes.

        Raises:
            ImageError: The file cannot be read, or its length is not that of an image.
        """
        archive = _archive(self.container)
        if archive is None:
            return image_files.read_bytes(Path(self.container, self.path))
        return _read_entry(archive, self.entry or self.path)


@image_files.guarded()
def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.flag_bits & 0x1:
        raise ImageError(f"it is locked with a password; {_UNZIP}")
    if info.compress_type == _DEFLATE64:
        raise ImageError(f"it is compressed by Deflate64, which Python cannot read; {_UNZIP}")
    image_files.check_length(info.file_size)
    try:
        return archive.read(name)
    except NotImplementedError as error:
        method = f"compressed by method {info.compress_type}, which Python cannot read"
        raise ImageError(f"it is {method}; {_UNZIP}") from error


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A file that is not an image or cannot be decoded completely."""

    file: SourceFile
    reason: str

    def __str__(self) -> str:
        return f"  {shown(self.file.container)}: {shown(self.file.path)}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Listing:
    """Contents of a folder or archive.

    Attributes:
        files: Visible files, sorted by path.
        folders: Paths of its folders, with forward slashes.
        passed_over: Paths that were skipped, by reason.
    """

    files: list[SourceFile]
    folders: set[str]
    passed_over: dict[str, list[str]]


def list_any(container: str) -> Listing:
    """Lists a folder or zip in order, whatever its layout; links to folders are followed.

    A source at an address (gs://...) is copied first, see `paths.fetch`.

    Raises:
        UserError: The source is missing, or neither a folder nor an archive.
    """
    place = paths.fetch(container)
    if not os.path.exists(place):
        raise UserError(f"--source={shown(container)} does not exist.")
    archive = _archive(str(place))
    return _list_folder(place) if archive is None else _list_archive(str(place), archive)


def list_files(container: str) -> Listing:
    """Lists a folder or zip of split/class/file in order, see `list_any`.

    Raises:
        UserError: The source cannot be listed, or has a wrong layout.
    """
    listing = list_any(container)
    misplaced = [file.path for file in listing.files if not _is_placed(file.path)]
    if misplaced:
        raise UserError(
            f"{shown(container)} has {len(misplaced)} files that are not in split/class/file, the "
            f"first is {shown(misplaced[0])}. {LAYOUT}"
        )
    for first, second in itertools.pairwise(listing.files):
        if first.path == second.path:
            raise UserError(
                f"{shown(container)} holds {shown(first.path)} twice; remove one of them."
            )
    if not listing.files:
        passed = image_files.passed_over_lines(listing.passed_over)
        told = "".join(f" Passed over: {line}." for line in passed)
        raise UserError(f"{shown(container)} holds no files. {LAYOUT}{told}")
    return listing


def _list_folder(place: Path) -> Listing:
    found = image_files.walk(place)
    files = [SourceFile(str(place), path.relative_to(place).as_posix()) for path in found.files]
    folders = {path.relative_to(place).as_posix() for path in found.folders}
    return Listing(sorted(files, key=lambda file: file.path), folders, found.passed_over)


def _list_archive(place: str, archive: zipfile.ZipFile) -> Listing:
    files, folders, passed_over = [], set(), image_files.Found()
    for entry in archive.infolist():
        path = entry.filename
        if "/" not in path:  # some Windows tools use backslashes, against the format's rules
            path = path.replace("\\", "/")
        path = path.removeprefix("./")
        if any(map(image_files.is_hidden, path.split("/"))) and ".." not in path.split("/"):
            passed_over.pass_over(path, image_files.HIDDEN)
        elif path.endswith("/"):
            folders.add(path.rstrip("/"))
        else:
            files.append(SourceFile(place, path, "" if path == entry.filename else entry.filename))
    return Listing(sorted(files, key=lambda file: file.path), folders, passed_over.passed_over)


def _is_placed(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 3 and not any(part in ("", ".", "..") for part in parts)


@functools.cache
def _archive(container: str) -> zipfile.ZipFile | None:
    """Opens a zip archive once per process; None for a folder."""
    if os.path.isdir(container):
        return None
    if not os.path.isfile(container):  # a pipe would block
        raise UserError(f"{shown(container)} is neither a folder nor a zip archive.")
    try:
        with image_files.guarded():
            return zipfile.ZipFile(container)
    except ImageError as error:
        raise UserError(
            f"{shown(container)} is neither a folder nor a zip archive that can be read ({error})."
        ) from error


def find_unreadable(files: Iterable[SourceFile], workers: int = 1) -> list[Unreadable]:
    """Decodes every file completely and returns those for which that fails.

    Raises:
        UserError: A worker process was killed, for instance for lack of memory.
    """
    if workers <= 1:
        return [bad for bad in map(_check, files) if bad]
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            return [bad for bad in pool.map(_check, files, chunksize=64) if bad]
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "A process that checks files was killed, perhaps because memory was full; "
            "use fewer --workers."
        ) from error


def _check(file: SourceFile) -> Unreadable | None:
    try:
        image_files.decode(file.read())
    except ImageError as error:
        return Unreadable(file, str(error))
    return None
