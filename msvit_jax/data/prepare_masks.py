"""Makes a data set of images with masks of class numbers, for segmentation.

Two layouts of folders or zips are known by their names:

    split/images/x.jpg  with  split/masks/x.png
    split/x.jpg         with  splitannot/x.png     (CamVid)

`--classes=FILE.json` names the classes: {"classes": ["road", "sky"], "ignore_label": 255,
"palette": [[128, 64, 128], [70, 130, 180]]}. Only `classes` is needed; a class behind the ignored
value is a name for what is ignored, and is left out. Without a file the numbers that occur are the
classes. Masks whose pixels are colors need the palette.
"""

import dataclasses
import io
import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from msvit_jax import paths
from msvit_jax.data import decode, image_files, sources
from msvit_jax.data import prepare as files
from msvit_jax.data.image_files import ImageError, shown
from msvit_jax.data.prepare import Prepared
from msvit_jax.data.source_files import SourceFile, Unreadable, list_any
from msvit_jax.errors import UserError
from msvit_jax.segmentation import IGNORED, MaskClasses, to_classes

IMAGES, MASKS, ANNOT = "images", "masks", "annot"
LAYOUT = "Expected split/images/x.jpg with split/masks/x.png, or split/x.jpg with splitannot/x.png."


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image's file and its mask's, in a split."""

    split: str
    image: SourceFile
    mask: SourceFile


@dataclasses.dataclass(frozen=True)
class Described:
    """What a file of `--classes` says.

    Attributes:
        classes: Classes of the masks.
        palette: [256**3] class number or `IGNORED` by color, -1 for other colors; None without one.
    """

    classes: MaskClasses
    palette: np.ndarray | None = None


def holds_masks(containers: Sequence[str]) -> bool:
    """Tells whether all sources have the folders of one of the two layouts."""
    return all(_kinds(list_any(container).files) for container in containers)


def _kinds(listed: Sequence[SourceFile]) -> bool:
    parts = [file.path.split("/") for file in listed]
    if not parts:
        return False
    if all(len(p) >= 3 for p in parts):
        return {p[1] for p in parts} == {IMAGES, MASKS}
    tops = {p[0] for p in parts}
    images = {top for top in tops if not top.endswith(ANNOT)}
    return all(len(p) == 2 for p in parts) and tops == images | {top + ANNOT for top in images}


def prepare(
    containers: Sequence[str],
    *,
    name: str,
    data_dir: str,
    classes: str | None = None,
    on_error: str = "stop",
) -> Prepared:
    """Makes the TFDS data set `name` in `data_dir`; the images keep their encoding.

    Masks are stored as PNGs of their class numbers, `IGNORED` for none.

    Args:
        containers: Paths of the folders or archives.
        name: Name of the data set: lower case letters, digits and underscores.
        data_dir: Folder of data sets; empty for TFDS's default.
        classes: Path of a JSON file, see the module; None for the numbers that occur.
        on_error: 'stop' at unusable pairs without writing anything, or 'skip' them.

    Raises:
        UserError: The source or its layout is wrong, the name is taken, an image has no mask or
            the other way round, their sizes differ, or a mask has other values than the classes'.
    """
    root = sources.data_root(data_dir)
    files.check_name(name, root)
    paths.check_writable(root, "data_dir", make=False)
    listings = [list_any(each) for each in containers]
    pairs = pair([file for each in listings for file in each.files])
    described = None if classes is None else read_classes(classes)
    bad = [found for found in (_check(each, described) for each in pairs) if found]
    if bad and on_error == "stop":
        raise UserError(
            f"{len(bad)} of {len(pairs)} images with masks cannot be used; nothing was written.\n"
            + "\n".join(files.listed(bad))
            + "\nMend or remove them, or leave them out with --on_error=skip."
        )
    lost = {each.file for each in bad}
    good = [each for each in pairs if not lost & {each.image, each.mask}]
    gone = {each.split for each in pairs} - {each.split for each in good}
    if gone:
        raise UserError(f"No image with a mask of split {', '.join(sorted(gone))} can be used.")
    described = described or _found(good)
    folder = _write(name, good, described, root)
    passed_over = image_files.Found()
    for each in listings:
        passed_over.add(image_files.Found(passed_over=each.passed_over))
    return Prepared(
        folder,
        dict(sorted(Counter(each.split for each in good).items())),
        described.classes.names,
        tuple(bad),
        passed_over.passed_over,
        () if classes else ("Classes are the numbers in the masks; --classes=FILE names them.",),
    )


def pair(listed: Sequence[SourceFile]) -> list[Pair]:
    """Pairs images with masks of the same name.

    Raises:
        UserError: Files lie elsewhere, or one of a pair is missing; the message names it.
    """
    images: dict[tuple[str, str], SourceFile] = {}
    masks: dict[tuple[str, str], SourceFile] = {}
    for file in listed:
        split, kind, stem = _place(file)
        place = masks if kind == MASKS else images
        if (split, stem) in place:
            other = place[split, stem].path
            raise UserError(
                f"{shown(other)} and {shown(file.path)} have the same name; rename one."
            )
        place[split, stem] = file
    for these, others, missing in ((images, masks, "mask"), (masks, images, "image")):
        alone = [these[key].path for key in these if key not in others]
        if alone:
            raise UserError(
                f"{len(alone)} files have no {missing} of their name; the first is "
                f"{shown(alone[0])}. {LAYOUT}"
            )
    return [Pair(key[0], images[key], masks[key]) for key in sorted(images)]


def _place(file: SourceFile) -> tuple[str, str, str]:
    """Returns split, kind and name without suffix."""
    first, *rest = file.path.split("/")
    if len(rest) >= 2 and rest[0] in (IMAGES, MASKS):
        split, kind, below = first, rest[0], rest[1:]
    elif len(rest) == 1 and first.endswith(ANNOT):
        split, kind, below = first.removesuffix(ANNOT), MASKS, rest
    elif len(rest) == 1:
        split, kind, below = first, IMAGES, rest
    else:
        raise UserError(f"{shown(file.path)} is not where images or masks are. {LAYOUT}")
    return split, kind, str(pathlib.PurePosixPath(*below).with_suffix(""))


def read_classes(path: str) -> Described:
    """Reads a file of `--classes`, see the module.

    Raises:
        UserError: It is missing or does not say what it has to.
    """
    try:
        said = json.loads(paths.parse(path).read_text())
        names = [str(name) for name in said["classes"]]
        ignored = int(said.get("ignore_label", IGNORED))
        colors = said.get("palette")
        if ignored == len(names) - 1:
            names.pop()  # the name of what is ignored
        classes = MaskClasses(tuple(names), ignored=ignored)
        if colors is None:
            return Described(classes)
        palette = np.full(256**3, -1, np.int32)
        for number, (red, green, blue) in enumerate(colors):
            known = number < len(names)
            palette[_color(np.asarray([red, green, blue]))] = number if known else ignored
        return Described(classes, palette)
    except FileNotFoundError as error:
        raise UserError(f"--classes={shown(path)} does not exist.") from error
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(
            f"--classes={shown(path)} is not valid ({type(error).__name__}: {error}); "
            'write {"classes": ["road", "sky"], "ignore_label": 255}, and "palette" if pixels of '
            "masks are colors."
        ) from error


def _color(rgb: np.ndarray) -> Any:
    rgb = rgb.astype(np.int32)
    return (rgb[..., 0] * 256 + rgb[..., 1]) * 256 + rgb[..., 2]


def values_of(encoded: bytes, described: Described | None) -> np.ndarray:
    """Decodes a mask's numbers, by the palette if its pixels are colors: [H, W] uint8 or uint16.

    Raises:
        ImageError: It cannot be decoded, or its colors are not in the palette.
    """
    palette = None if described is None else described.palette
    if palette is None:
        return decode.decode_mask_values(encoded)
    opened = image_files.open_image(encoded)
    if opened.image.mode not in ("RGB", "RGBA"):
        return decode.decode_mask_values(encoded)
    colors = np.asarray(opened.image.convert("RGB"))
    values = palette[_color(colors)]
    if (values < 0).any():
        red, green, blue = colors[values < 0][0]
        raise ImageError(f"its color ({red}, {green}, {blue}) is not in the palette")
    return values.astype(np.uint16)


def _check(each: Pair, described: Described | None) -> Unreadable | None:
    try:
        pixels = image_files.decode(each.image.read())
    except ImageError as error:
        return Unreadable(each.image, str(error))
    try:
        values = values_of(each.mask.read(), described)
        if described is not None:
            to_classes(values, described.classes)
        if values.shape != pixels.shape[:2]:
            (height, width), (rows, columns) = pixels.shape[:2], values.shape
            raise ImageError(f"it has {rows} x {columns} px, its image {height} x {width}")
    except ValueError as error:
        return Unreadable(each.mask, str(error))
    return None


def _found(pairs: Sequence[Pair]) -> Described:
    """Takes the numbers in the masks for classes, but for `IGNORED`."""
    most = -1
    for each in pairs:
        values = values_of(each.mask.read(), None)
        most = max([most, *np.unique(values[values != IGNORED]).tolist()])
        if most >= IGNORED:
            raise UserError(
                f"{shown(each.mask.path)} has a pixel of {most}; there can be {IGNORED} classes, "
                "from 0. Are its pixels something else than numbers of classes?"
            )
    if most < 0:
        raise UserError("No pixel of the masks has a class: all are ignored.")
    return Described(MaskClasses(tuple(map(str, range(most + 1)))))


class ImagesWithMasks(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """A builder over pairs of files; takes its name from the caller."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(
        self, *, name: str, pairs: Sequence[Pair], described: Described, **kwargs: Any
    ) -> None:
        self.name = name
        self._pairs, self._described = pairs, described
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            sources.MASK: tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "file_name": tfds.features.Text(),
        }
        classes = {"names": list(self._described.classes.names), "first": 0, "ignored": IGNORED}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images in the encoding of their original files, with masks.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(mask_classes=classes),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Iterator[tuple[bytes, dict[str, Any]]]]:
        del dl_manager
        splits = sorted({each.split for each in self._pairs})
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
        for each in self._pairs:
            if each.split == split:
                path = each.image.path.encode("utf-8", "surrogateescape")
                values = values_of(each.mask.read(), self._described)
                mask = io.BytesIO()
                Image.fromarray(to_classes(values, self._described.classes)).save(mask, "PNG")
                yield (
                    path,
                    {"image": each.image.read(), sources.MASK: mask.getvalue(), "file_name": path},
                )


def _write(name: str, pairs: Sequence[Pair], described: Described, root: pathlib.Path) -> Any:
    array_record = tfds.core.FileFormat.ARRAY_RECORD

    def builder(aside: str) -> ImagesWithMasks:
        return ImagesWithMasks(
            name=name, pairs=pairs, described=described, data_dir=aside, file_format=array_record
        )

    try:
        return sources.prepare_aside(builder, root)
    except FileExistsError as error:
        raise files.taken(name, root) from error
