"""Opens data sets by name: TFDS folders in array_record, read without TensorFlow.

`scattered_digits` is prepared on first use. Any other data set must exist; the error for a missing
one includes the command that makes it.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from msvit_jax import paths
from msvit_jax.data import scattered_digits
from msvit_jax.errors import UserError, describe, nearest
from msvit_jax.segmentation.masks import MaskClasses

EMBEDDED = scattered_digits.ScatteredDigits.name
LABEL, MASK = "label", "segmentation_mask"  # values of `data.target`
# Masks of data sets that do not describe them themselves.
_KNOWN_CLASSES = {
    EMBEDDED: MaskClasses(("background", "digit")),
    "scene_parse150": MaskClasses(tuple(map(str, range(1, 151))), first=1, ignored=0),
}
# Names of the masks where they are others.
_MASK_FEATURES = {"scene_parse150": "annotation"}


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Properties of a data set that models and evaluations need.

    Attributes:
        name: Name of the data set.
        num_classes: Number of classes.
        class_names: Names of the classes, in the order of the labels.
        train_examples: Number of examples of the training split.
        eval_examples: Number of examples of the evaluation split.
        has_segmentation: Whether examples have a `segmentation_mask`.
        fingerprint: Text that is the same for the same data, as far as their description tells.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    train_examples: int
    eval_examples: int
    has_segmentation: bool
    fingerprint: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Examples:
    """A split as a sequence of {'image': encoded bytes, 'label', 'index'[, 'segmentation_mask']}.

    Attributes:
        name: Names of the data set and split, for messages.
        source: TFDS data source.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1. None if labels do not
            matter.
        mask: Name of the masks among the features.
    """

    name: str
    source: Any
    num_classes: int | None
    mask: str = MASK

    def __len__(self) -> int:
        return len(self.source)

    @property
    def _needed(self) -> tuple[str, str]:
        return "image", (LABEL if self.num_classes is not None else self.mask)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        with _reading(f"{self.name}, example {index}"):
            (record,) = _complete([self.source[int(index)]], self._needed)
        return self._example(index, record)

    def in_order(self, chunk: int = 512) -> Iterator[dict[str, Any]]:
        """Yields every example; reading in chunks is faster than one by one."""
        for start in range(0, len(self), chunk):
            indices = range(start, min(start + chunk, len(self)))
            with _reading(f"{self.name}, examples {start} to {indices[-1]}"):
                records = _complete(self.source.__getitems__(indices), self._needed)
            for index, record in zip(indices, records, strict=True):
                yield self._example(index, record)

    def _example(self, index: Any, record: dict[str, Any]) -> dict[str, Any]:
        kept = {key: record[key] for key in ("image", LABEL) if key in record}
        if self.mask in record:
            kept[MASK] = record[self.mask]
        name = _example_name(self.name, index, record)
        if self.num_classes is None:
            return kept | {"index": int(index), "name": name}
        label = int(record["label"])
        if not 0 <= label < self.num_classes:
            unlabeled = " Splits that are to be guessed carry such labels." if label == -1 else ""
            raise UserError(
                f"{name}: its label is {label}, and the classes are 0 to {self.num_classes - 1}."
                f"{unlabeled} Choose another split, or prepare the data set anew."
            )
        return kept | {"index": int(index), "name": name}


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Says in one line what of a data set is damaged; readers raise errors of many types."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{what}: cannot be read, its files are damaged ({describe(error)[:200]}). Copy or "
            "prepare the data set anew."
        ) from error


def _complete(records: Sequence[dict[str, Any]], needed: Sequence[str]) -> Sequence[dict[str, Any]]:
    """Returns records; a file that was cut off gives some without values."""
    for record in records:
        if any(record[key] is None for key in needed):
            raise ValueError("it lacks values")
    return records


def _example_name(split: str, index: int, record: dict[str, Any]) -> str:
    """Names an example in messages, with its id or file name if the data set has them."""
    for key in ("id", "file_name", "image/filename"):
        if isinstance(record.get(key), bytes):
            return f"{split}, example {index} ({key} {record[key].decode(errors='replace')!r})"
    return f"{split}, example {index}"


def data_root(data_dir: str) -> Path:
    """Returns the folder of data sets: `data_dir`, or TFDS's default if that is empty."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return paths.parse(data_dir or default)


def open_dataset(name: str, data_dir: str = "", target: str = LABEL) -> tfds.core.DatasetBuilder:
    """Opens a prepared data set.

    Args:
        name: Name as `name`, `name/config`, `name:version` or `name/config:version`.
        data_dir: Folder of data sets; empty for TFDS's default (`TFDS_DATA_DIR`).
        target: What is learned, 'label' or 'segmentation_mask'.

    Raises:
        UserError: The data set is unknown, missing, not in array_record (the message includes the
            command that makes it), or has no such target.
    """
    root = data_root(data_dir)
    if name.partition(":")[0].partition("/")[0] == EMBEDDED:
        folder = _prepare_embedded(name, root)
    else:
        folder = _find(name, root)
    local = paths.fetch(folder)
    with _reading(f"data set {name!r} in {folder}"):
        builder = tfds.builder_from_directory(local)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"Data set {name!r} in {folder} is stored as {builder.info.file_format.value}; it is "
            f"read from array_record only. Convert it (this one step needs `pip install "
            f"tensorflow`): {_convert_command(folder)}"
        )
    _check_features(name, builder, target)
    return builder


def prepared_classes(name: str, data_dir: str = "") -> int | None:
    """Number of classes of a data set, or None if it is missing; prepares nothing."""
    try:
        folder = _find(name, data_root(data_dir))
    except UserError:
        return None
    features = tfds.builder_from_directory(folder).info.features
    return getattr(features["label"], "num_classes", None) if "label" in features else None


def open_split(builder: tfds.core.DatasetBuilder, split: str, target: str = LABEL) -> Examples:
    """Opens a split, such as 'train' or 'train[:90%]'; images stay encoded."""
    num_examples(builder, split)
    encoded = {key: tfds.decode.SkipDecoding() for key in _image_keys(builder)}
    source = builder.as_data_source(split=split, decoders=encoded)
    name = f"data set {builder.info.full_name!r}, split {split!r}"
    classes = len(class_names(builder)) if target == LABEL else None
    return Examples(name, source, classes, mask_feature(builder))


def mask_feature(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the name of the masks among a data set's features, whether or not it has any."""
    return _MASK_FEATURES.get(builder.info.name, MASK)


def told_classes(builder: tfds.core.DatasetBuilder) -> MaskClasses | None:
    """Returns the classes of a data set's masks as its metadata or our table has them."""
    told = (builder.info.metadata or {}).get("mask_classes")
    if told is None:
        return _KNOWN_CLASSES.get(builder.info.name)
    return MaskClasses(tuple(told["names"]), int(told["first"]), int(told["ignored"]))


def class_names(builder: tfds.core.DatasetBuilder) -> tuple[str, ...]:
    """Returns the names of a data set's classes; their numbers if it has no names."""
    return tuple(builder.info.features["label"].names)


def fingerprint(builder: tfds.core.DatasetBuilder, names: tuple[str, ...] | None = None) -> str:
    """Returns a text that tells data sets apart: name, classes, and the sizes of all shards.

    Args:
        builder: The data set.
        names: Names of the classes that are learned; None: those of the labels.
    """
    splits = {
        name: (int(split.num_bytes), list(map(int, split.shard_lengths)))
        for name, split in sorted(builder.info.splits.items())
    }
    described = repr((builder.info.full_name, splits, names or class_names(builder)))
    digest = hashlib.sha256(described.encode()).hexdigest()[:12]
    return f"{builder.info.full_name} {digest}"


def num_examples(builder: tfds.core.DatasetBuilder, split: str) -> int:
    """Returns the size of a split; raises a `UserError` that lists the splits if it is missing."""
    try:
        return int(builder.info.splits[split].num_examples)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"Data set {builder.info.name!r} has no split {split!r}; it has "
            f"{', '.join(sorted(builder.info.splits))}. Set data.train_split and data.eval_split."
        ) from error


def _image_keys(builder: tfds.core.DatasetBuilder) -> list[str]:
    return [key for key in ("image", mask_feature(builder)) if key in builder.info.features]


def _check_features(name: str, builder: tfds.core.DatasetBuilder, target: str) -> None:
    features = builder.info.features
    has = ", ".join(features)
    needed: dict[str, Any] = {"image": tfds.features.Image, LABEL: tfds.features.ClassLabel}
    use = "classification"
    if target == MASK:
        needed = {"image": tfds.features.Image, mask_feature(builder): tfds.features.Image}
        use = "segmentation"
    for key, kind in needed.items():
        if key not in features or not isinstance(features[key], kind):
            raise UserError(
                f"Data set {name!r} cannot be used for {use}: it needs a feature "
                f"{key!r} of kind {kind.__name__}, and it has {has}."
            )
    channels = features["image"].shape[-1]
    if channels not in (None, 1, 3, 4):
        raise UserError(
            f"Images of data set {name!r} have {channels} channels; gray, RGB and RGBA images "
            "can be read (1, 3 or 4 channels). Store it with three channels."
        )


def _convert_command(folder: Path) -> str:
    return (
        "tfds convert_format --out_file_format=array_record "
        f"--dataset_dir={folder} --out_path={folder}"
    )


def _find(name: str, root: Path) -> Path:
    """Returns the folder of the newest matching version of a prepared data set."""
    path, _, version = name.partition(":")
    if not root.is_dir():
        raise UserError(f"data_dir {root} does not exist. {_how_to_make(path, root)}")
    base = root / path
    prepared = [info.parent for info in base.glob("*/dataset_info.json")]
    configs = sorted({info.parent.parent for info in base.glob("*/*/dataset_info.json")})
    if not prepared and len(configs) > 1:
        choices = ", ".join(f"{path}/{config.name}" for config in configs)
        raise UserError(f"Data set {path!r} has several configs; name one of {choices}.")
    if not prepared and configs:
        prepared = [info.parent for info in configs[0].glob("*/dataset_info.json")]
    matching = [folder for folder in prepared if version in ("", folder.name)]
    if prepared and not matching:
        versions = ", ".join(sorted(folder.name for folder in prepared))
        raise UserError(f"Data set {path!r} has no version {version}; it has {versions}.")
    if not matching:
        raise UserError(f"No data set {path!r} in {root}. {_how_to_make(path, root)}")
    return max(matching, key=lambda folder: tfds.core.Version(folder.name))


def _how_to_make(path: str, root: Path) -> str:
    """Returns a hint on how to make a missing data set."""
    name = path.partition("/")[0]
    known = set(tfds.list_builders(with_community_datasets=False)) | {EMBEDDED}
    if name in known:
        command = f"tfds build {path} --file_format=array_record --data_dir={root}"
        return f"Make it (this one step needs `pip install tensorflow`): {command}"
    prepared = {
        info.relative_to(root).parts[0]
        for depth in (2, 3)
        for info in root.glob("*/" * depth + "dataset_info.json")
    }
    command = (
        "python -m msvit_jax.data.prepare --source=<folder or zip of split/class/file> "
        f"--name={name} --data_dir={root}"
    )
    return (
        f"It is not a TFDS data set either.{nearest(name, known | prepared)} Your images: {command}"
    )


def _prepare_embedded(name: str, root: Path) -> Path:
    """Returns the folder of `scattered_digits`, preparing it if it is missing."""
    path, _, version = name.partition(":")
    configs = {config.name for config in scattered_digits.ScatteredDigits.BUILDER_CONFIGS}
    config = path.partition("/")[2] or "default"
    if config not in configs:
        raise UserError(
            f"{EMBEDDED} has no config {config!r}.{nearest(config, configs)} "
            f"Its configs are {', '.join(sorted(configs))}."
        )
    offered = str(scattered_digits.ScatteredDigits.VERSION)
    if version not in ("", offered):
        raise UserError(f"{EMBEDDED} has no version {version}; it has {offered}.")
    folder = root / EMBEDDED / config / offered
    if not (folder / "dataset_info.json").exists():
        _prepare_aside(config, root, folder)
    return folder


def _prepare_aside(config: str, root: Path, folder: Path) -> None:
    """Prepares `scattered_digits`; if several processes do so at once, the fastest one wins."""
    say = f"Preparing {EMBEDDED}/{config} in {root} (about half a minute, once)."
    print(say, file=sys.stderr, flush=True)
    try:
        prepare_aside(
            lambda aside: scattered_digits.ScatteredDigits(
                data_dir=aside, config=config, file_format=tfds.core.FileFormat.ARRAY_RECORD
            ),
            root,
        )
    except FileExistsError:
        if not (folder / "dataset_info.json").exists():
            raise
        # Another process was faster; its data are identical.


def prepare_aside(make: Callable[[str], tfds.core.DatasetBuilder], root: Path) -> Path:
    """Runs a builder in a temporary folder and moves the result, so that it is complete or absent.

    Args:
        make: Function that returns the builder for a given data_dir.
        root: Folder of data sets; created if it is missing.

    Raises:
        FileExistsError: The data set already exists.
        UserError: The folder cannot be written.
    """
    paths.check_writable(root)
    with paths.aside(root) as aside:
        builder = make(str(aside))
        _prepare_quietly(builder)
        made = Path(builder.data_dir)
        folder = root / made.relative_to(aside)
        if paths.is_address(root):
            if (folder / "dataset_info.json").exists():
                raise FileExistsError(f"{folder} exists already")
            paths.upload(made, folder)
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(made, folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise FileExistsError(f"{folder} exists already") from error
    return folder


def _prepare_quietly(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a data set without TFDS's progress bars and messages."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    finally:
        tfds.enable_progress_bar()
