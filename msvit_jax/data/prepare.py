r"""Makes a data set of your own images: a TFDS folder in array_record, original bytes kept.

    python -m msvit_jax.data.prepare --source=<folder or zip of split/class/file> \
        --name=my_images --data_dir=<folder> [--on_error=skip] [--workers=4]

`--source` may be given several times (one archive per split). Every file is decoded once before
anything is written; those that cannot be read are listed by name.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import tensorflow_datasets as tfds
from absl import flags

from msvit_jax import errors
from msvit_jax.data import decode, sources
from msvit_jax.errors import UserError

LAYOUT = "Expected split/class/file, for instance train/cat/1.jpg and validation/cat/2.jpg."


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One image file in a folder or archive.

    Attributes:
        container: the folder or zip archive.
        path: its place in there, split/class/file with forward slashes.
    """

    container: str
    path: str

    @property
    def split(self) -> str:
        """The first of the three levels."""
        return self.path.split("/")[0]

    @property
    def label(self) -> str:
        """The class's name."""
        return self.path.split("/")[1]

    def read(self) -> bytes:
        """Returns the file's bytes."""
        archive = _archive(self.container)
        return archive.read(self.path) if archive else Path(self.container, self.path).read_bytes()


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A file that is no image or cannot be decoded to its end."""

    file: SourceFile
    reason: str

    def __str__(self) -> str:
        return f"  {self.file.container}: {self.file.path}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was made: the folder, examples per split, class names, and what was left out."""

    folder: Path
    examples: dict[str, int]
    class_names: tuple[str, ...]
    skipped: tuple[Unreadable, ...]


class ImageFiles(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """A builder over listed files; takes its name and version from the caller."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(self, *, name: str, files: Sequence[SourceFile], **kwargs: Any) -> None:
        self.name = name
        self._files = files
        self._class_names = sorted({file.label for file in files})
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=self._class_names),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images in the encoding of their original files.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        splits = sorted({file.split for file in self._files})
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in self._files:
            if file.split == split:
                example = {"image": file.read(), "label": file.label, "file_name": file.path}
                yield file.path, example


def prepare(
    container: Sequence[str], *, name: str, data_dir: str, on_error: str = "stop", workers: int = 1
) -> Prepared:
    """Makes the TFDS data set `name` in `data_dir` from folders or zips of split/class/file.

    Args:
        container: the folders or archives.
        name: lower case letters, digits and underscores.
        data_dir: folder of data sets; empty for TFDS's default.
        on_error: 'stop' at unreadable files with nothing written, or 'skip' them.
        workers: processes that check the files.

    Raises:
        UserError: the source or its layout is wrong, the name is taken, or files are unreadable.
    """
    root = sources.data_root(data_dir)
    _check_name(name, root)
    files = [file for each in container for file in list_files(each)]
    _check_unique(files)
    bad = find_unreadable(files, workers)
    if bad and on_error == "stop":
        raise UserError(
            f"{len(bad)} of {len(files)} files cannot be read as images; nothing was written.\n"
            + "\n".join(map(str, bad))
            + "\nRepair or remove them, or leave them out with --on_error=skip."
        )
    left_out = {each.file for each in bad}
    good = [file for file in files if file not in left_out]
    _check_splits_left(files, good)
    folder = _write(name, good, root)
    counts = Counter(file.split for file in good)
    class_names = tuple(sorted({file.label for file in good}))
    return Prepared(folder, dict(sorted(counts.items())), class_names, tuple(bad))


def _write(name: str, files: Sequence[SourceFile], root: Path) -> Path:
    array_record = tfds.core.FileFormat.ARRAY_RECORD

    def builder(aside: str) -> ImageFiles:
        return ImageFiles(name=name, files=files, data_dir=aside, file_format=array_record)

    try:
        return sources.prepare_aside(builder, root)
    except FileExistsError as error:
        raise _taken(name, root) from error


def list_files(container: str) -> list[SourceFile]:
    """Lists a folder or zip of split/class/file in order; hidden files are passed over."""
    place = Path(container).expanduser()
    if not place.exists():
        raise UserError(f"--source={container} does not exist.")
    archive = _archive(str(place))
    if archive:
        paths = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    else:
        paths = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
    visible = sorted(path for path in paths if not _hidden(path))
    misplaced = [path for path in visible if path.count("/") != 2]
    if misplaced:
        raise UserError(
            f"{container} has {len(misplaced)} files that are not in split/class/file, the first "
            f"is {misplaced[0]}. {LAYOUT}"
        )
    if not visible:
        raise UserError(f"{container} holds no files. {LAYOUT}")
    return [SourceFile(str(place), path) for path in visible]


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(path).parts)


@functools.cache
def _archive(container: str) -> zipfile.ZipFile | None:
    """Opens a zip archive once per process; None for a folder."""
    if Path(container).is_dir():
        return None
    try:
        return zipfile.ZipFile(container)
    except zipfile.BadZipFile as error:
        raise UserError(f"{container} is neither a folder nor a zip archive ({error}).") from error


def find_unreadable(files: Iterable[SourceFile], workers: int = 1) -> list[Unreadable]:
    """Decodes every file to its end and returns those where that fails."""
    if workers <= 1:
        return [bad for bad in map(_check, files) if bad]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [bad for bad in pool.map(_check, files, chunksize=64) if bad]


def _check(file: SourceFile) -> Unreadable | None:
    try:
        decode.to_rgb(decode.open_image(file.read()))
    except (*decode.DECODE_ERRORS, zipfile.BadZipFile) as error:
        # Pillow names the memory address of the buffer, which tells nobody anything.
        return Unreadable(file, re.sub(r" <_io\.BytesIO.*?>", "", str(error)))
    return None


def _check_name(name: str, root: Path) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == sources.EMBEDDED:
        raise UserError(
            f"--name={name!r} cannot be a data set's name: use lower case letters, digits and "
            f"underscores, beginning with a letter, and not {sources.EMBEDDED!r}."
        )
    if any((root / name).glob("**/dataset_info.json")):
        raise _taken(name, root)


def _taken(name: str, root: Path) -> UserError:
    return UserError(
        f"There is a data set {name!r} in {root} already. Choose another --name, or remove the "
        f"folder {root / name}."
    )


def _check_unique(files: Sequence[SourceFile]) -> None:
    ordered = sorted(files, key=lambda file: file.path)
    for first, second in itertools.pairwise(ordered):
        if first.path == second.path:
            raise UserError(f"{first.path} is in both {first.container} and {second.container}.")


def _check_splits_left(files: Sequence[SourceFile], good: Sequence[SourceFile]) -> None:
    lost = {file.split for file in files} - {file.split for file in good}
    if lost:
        raise UserError(f"No file of split {', '.join(sorted(lost))} can be read as an image.")


_SOURCE = flags.DEFINE_multi_string(
    "source", None, "Folder or zip of split/class/file.", required=True
)
_NAME = flags.DEFINE_string("name", None, "Name of the data set to make.", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of data sets; empty for TFDS's default.")
_ON_ERROR = flags.DEFINE_enum("on_error", "stop", ["stop", "skip"], "What to do with bad files.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Processes that check the files.")


def main(argv: Sequence[str]) -> None:
    """The command."""
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; the source is given as --source=...")
    made = prepare(
        _SOURCE.value,
        name=_NAME.value,
        data_dir=_DATA_DIR.value,
        on_error=_ON_ERROR.value,
        workers=_WORKERS.value,
    )
    for bad in made.skipped:
        print(f"skipped{bad}")
    counts = ", ".join(f"{split}: {count}" for split, count in made.examples.items())
    print(f"{made.folder}\n{counts}, {len(made.class_names)} classes, {len(made.skipped)} skipped")
    print(
        f"Use it with --config.data.name={_NAME.value} "
        f"--config.data.data_dir={sources.data_root(_DATA_DIR.value)}"
    )


if __name__ == "__main__":
    errors.run(main)
