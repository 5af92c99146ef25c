r"""Makes a data set of your own images: a TFDS folder in array_record with the original bytes.

    python -m msvit_jax.data.prepare --source=<folder or zip of split/class/file> \
        --name=my_images --data_dir=<folder> [--on_error=skip] [--workers=4]

`--source` may be given several times (one archive per split). Every file is decoded once before
anything is written. Unreadable files are listed by name, together with skipped files and possible
problems with the classes. Images with masks are told by their folders, see `prepare_masks`.
"""

import dataclasses
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import flags

from msvit_jax import errors, paths
from msvit_jax.data import image_files, sources
from msvit_jax.data.image_files import shown
from msvit_jax.data.source_files import (
    Listing,
    SourceFile,
    Unreadable,
    find_unreadable,
    list_files,
)
from msvit_jax.errors import UserError

NAMED = 20  # most files or classes listed in a message


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    Attributes:
        folder: Folder of the data set.
        examples: Number of examples of each split.
        class_names: Names of the classes, in the order of the labels.
        skipped: Files that could not be read.
        passed_over: Files and folders that were skipped, by reason.
        notes: Possible problems with splits and classes, one sentence each.
    """

    folder: Path
    examples: dict[str, int]
    class_names: tuple[str, ...]
    skipped: tuple[Unreadable, ...]
    passed_over: Mapping[str, Sequence[str]]
    notes: tuple[str, ...]


class ImageFiles(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """A builder over listed files; takes its name and version from the caller."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(self, *, name: str, files: Sequence[SourceFile], **kwargs: Any) -> None:
        self.name = name
        self._files = files
        self._labels = {label: index for index, label in enumerate(_labels(files))}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=class_names(self._labels)),
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
    ) -> dict[str, Iterator[tuple[bytes, dict[str, Any]]]]:
        del dl_manager
        splits = sorted({file.split for file in self._files})
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
        for file in self._files:
            if file.split == split:
                # As bytes, because file names need not be text.
                path = file.path.encode("utf-8", "surrogateescape")
                label = self._labels[file.label]
                yield path, {"image": file.read(), "label": label, "file_name": path}


def _labels(files: Iterable[SourceFile]) -> list[str]:
    return sorted({file.label for file in files})


def class_names(labels: Iterable[str]) -> list[str]:
    r"""Class names that TFDS can store: one line of text each, without surrounding spaces.

    Other characters of the folders' names are escaped; a byte that is not UTF-8 becomes '\xe9'.

    Raises:
        UserError: Two folders get the same name, or one gets an empty name.
    """
    names: dict[str, str] = {}
    for label in labels:
        name = shown(label).strip()
        if not name:
            raise UserError(f"The class folder {label!r} has a name of spaces only; rename it.")
        if name in names:
            raise UserError(
                f"The class folders {names[name]!r} and {label!r} differ in nothing that a class "
                "name can hold; rename one of them."
            )
        names[name] = label
    return list(names)


def prepare(
    container: Sequence[str], *, name: str, data_dir: str, on_error: str = "stop", workers: int = 1
) -> Prepared:
    """Makes the TFDS data set `name` in `data_dir` from folders or zips of split/class/file.

    Args:
        container: Paths of the folders or archives.
        name: Name of the data set: lower case letters, digits and underscores.
        data_dir: Folder of data sets; empty for TFDS's default.
        on_error: 'stop' at unreadable files without writing anything, or 'skip' them.
        workers: Number of processes that check the files.

    Raises:
        UserError: The source or its layout is wrong, the name is taken, or files are unreadable.
    """
    root = sources.data_root(data_dir)
    check_name(name, root)
    paths.check_writable(root, "data_dir", make=False)
    listings = [list_files(each) for each in container]
    files = [file for each in listings for file in each.files]
    passed_over = image_files.Found()
    for each in listings:
        passed_over.add(image_files.Found(passed_over=each.passed_over))
    if on_error == "stop":
        _check_accessible(passed_over.passed_over)
    _check_unique(files)
    _check_splits(files)
    names = class_names(_labels(files))
    bad = find_unreadable(files, workers)
    if bad and on_error == "stop":
        raise UserError(
            f"{len(bad)} of {len(files)} files cannot be read as images; nothing was written.\n"
            + "\n".join(listed(bad))
            + "\nRepair or remove them, or leave them out with --on_error=skip."
        )
    left_out = {each.file for each in bad}
    good = [file for file in files if file not in left_out]
    _check_splits_left(files, good)
    names = class_names(_labels(good))
    folder = _write(name, good, root)
    counts = Counter(file.split for file in good)
    return Prepared(
        folder,
        dict(sorted(counts.items())),
        tuple(names),
        tuple(bad),
        passed_over.passed_over,
        tuple(_notes(listings, good)),
    )


def _check_accessible(passed_over: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for inaccessible entries: a broken link may stand for a whole class."""
    harmless = (image_files.HIDDEN, image_files.LOOPS)
    lost = {reason: paths for reason, paths in passed_over.items() if reason not in harmless}
    if lost:
        raise UserError(
            "Some files or folders cannot be read; nothing was written.\n  "
            + "\n  ".join(image_files.passed_over_lines(lost, NAMED))
            + "\nRepair or remove them, or leave them out with --on_error=skip."
        )


def listed(bad: Sequence[Unreadable]) -> list[str]:
    """Returns a line for each unusable file, and one for those beyond `NAMED`."""
    lines = [str(each) for each in bad[:NAMED]]
    if len(bad) > NAMED:
        lines.append(f"  ... and {len(bad) - NAMED} more")
    return lines


def _write(name: str, files: Sequence[SourceFile], root: Path) -> Path:
    array_record = tfds.core.FileFormat.ARRAY_RECORD

    def builder(aside: str) -> ImageFiles:
        return ImageFiles(name=name, files=files, data_dir=aside, file_format=array_record)

    try:
        return sources.prepare_aside(builder, root)
    except FileExistsError as error:
        raise taken(name, root) from error


def check_name(name: str, root: Path) -> None:
    """Raises UserError for a name that no data set can have, or that one has already."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == sources.EMBEDDED:
        raise UserError(
            f"--name={name!r} cannot be a data set's name: use lower case letters, digits and "
            f"underscores, beginning with a letter, and not {sources.EMBEDDED!r}."
        )
    if any((root / name).glob("**/dataset_info.json")):
        raise taken(name, root)


def taken(name: str, root: Path) -> UserError:
    """Returns the error for a data set that is there already."""
    return UserError(
        f"There is a data set {name!r} in {root} already. Choose another --name, or remove the "
        f"folder {root / name}."
    )


def _check_unique(files: Sequence[SourceFile]) -> None:
    ordered = sorted(files, key=lambda file: file.path)
    for first, second in itertools.pairwise(ordered):
        if first.path == second.path:
            raise UserError(
                f"{shown(first.path)} is in both {shown(first.container)} and "
                f"{shown(second.container)}; remove one of them."
            )


def _check_splits(files: Iterable[SourceFile]) -> None:
    for split in sorted({file.split for file in files}):
        if not re.fullmatch(r"\w+(-\w+)*", split, re.ASCII) or split == "all":
            raise UserError(
                f"{split!r} cannot be a split's name: use letters, digits and underscores, for "
                "instance 'train' and 'validation'."
            )


def _check_splits_left(files: Sequence[SourceFile], good: Sequence[SourceFile]) -> None:
    lost = {file.split for file in files} - {file.split for file in good}
    if lost:
        raise UserError(
            f"No file of split {', '.join(sorted(lost))} can be read as an image; repair one."
        )


def _notes(listings: Sequence[Listing], good: Sequence[SourceFile]) -> Iterator[str]:
    """Yields possible problems with splits and classes, one sentence each."""
    used = {file.path.rpartition("/")[0] for file in good}
    used |= {path.partition("/")[0] for path in used}
    held = {folder for listing in listings for folder in listing.folders if folder != "."}
    held |= {file.path.rpartition("/")[0] for listing in listings for file in listing.files}
    empty = sorted(folder for folder in held - used if folder.count("/") < 2)
    if empty:
        yield f"No image is in {_named(empty)}."
    for kind, level in (("Splits", 0), ("Classes", 1)):
        for alike in _alike({file.path.split("/")[level] for file in good}):
            names = " and ".join(ascii(name) for name in alike)
            yield (
                f"{kind} {names} differ only by case, Unicode form or spaces, and are kept apart."
            )
    labels = set(_labels(good))
    for split in sorted({file.split for file in good}):
        missing = labels - {file.label for file in good if file.split == split}
        if missing:
            yield (
                f"Split {split} has no image of {len(missing)} of the {len(labels)} classes: "
                f"{_named(sorted(missing))}."
            )


def _alike(names: Iterable[str]) -> list[list[str]]:
    groups = defaultdict(list)
    for name in sorted(names):
        groups[unicodedata.normalize("NFKC", name).casefold().strip()].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


def main(argv: Sequence[str]) -> None:
    """Prepares the data set and prints a summary."""
    errors.refuse_arguments(argv, "the source is given as --source=...")
    given = flags.FLAGS
    options = {"name": given.name, "data_dir": given.data_dir, "on_error": given.on_error}
    from msvit_jax.data import prepare_masks  # which imports this module

    masked = given.classes is not None or prepare_masks.holds_masks(given.source)
    if masked:
        made: Any = prepare_masks.prepare(given.source, classes=given.classes, **options)
    else:
        made = prepare(given.source, workers=given.workers, **options)
    for bad in made.skipped:
        print(f"skipped{bad}")
    for line in image_files.passed_over_lines(made.passed_over):
        print(f"passed over: {line}")
    for note in made.notes:
        print(f"note: {note}")
    counts = ", ".join(f"{split}: {count}" for split, count in made.examples.items())
    print(f"{made.folder}\n{counts}, {len(made.class_names)} classes, {len(made.skipped)} skipped")
    print(
        f"Use it with --config.data.name={given.name} "
        f"--config.data.data_dir={sources.data_root(given.data_dir)}"
        + (f" --config.data.target={sources.MASK}" if masked else "")
    )


if __name__ == "__main__":
    # Here, because the module is imported under its own name, too.
    flags.DEFINE_multi_string(
        "source", None, "Folder or zip archive of split/class/file; may be repeated.", required=True
    )
    flags.DEFINE_string("name", None, "Name of the data set to make.", required=True)
    flags.DEFINE_string("data_dir", "", "Folder of data sets; empty for TFDS's default.")
    flags.DEFINE_enum(
        "on_error", "stop", ["stop", "skip"], "Whether to stop at unreadable files or skip them."
    )
    flags.DEFINE_integer("workers", 1, "Number of processes that check the files.")
    flags.DEFINE_string(
        "classes",
        None,
        "JSON file with names of the masks' classes, and their palette and ignored value if need "
        "be; for images with masks.",
    )
    errors.run(main)
