"""Finds, reads and decodes image files, for all parts of the library.

Needs only NumPy and Pillow, because exports contain a copy of this file for their run.py.

Reading and decoding is one guarded step: any failure in it raises an `ImageError` with a one-line
message. Images are rotated upright by their EXIF orientation unless that is turned off, as in the
pipelines behind published ImageNet figures.
"""

import contextlib
import ctypes
import dataclasses
import fnmatch
import functools
import io
import logging
import os
import pathlib
import re
import stat
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

Box: TypeAlias = tuple[float, float, float, float]  # left, upper, right, lower in pixels
Size: TypeAlias = int | Sequence[int]  # a side in pixels, or height and width
Resize: TypeAlias = Callable[[Image.Image, Box, Size], np.ndarray]

_LONGEST = 160  # most characters quoted from a decoder's message
MAX_BYTES = 2**30  # of an encoded image: a larger file is not an image, or an attack

# Pillow warns and logs about metadata, which is not used here; fatal errors are raised. This is set
# once for the whole process, because filters around single calls are not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\b")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):  # libtiff prints errors that Pillow also raises
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)

# An external program (EPS: Ghostscript) or a handler that the user installs would decode these.
_NOT_DECODED_BY_PILLOW = ("EPS", "BUFR", "GRIB", "HDF5", "WMF", "MPEG")
_CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # parts that Pillow may lack

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


HIDDEN = "hidden"  # this and the next: reasons to skip entries without loss
LOOPS = "links back to a folder that holds them"


class ImageError(ValueError):
    """A file cannot be read or decoded; the message is one line without the file's name."""


class NoFilesError(ValueError):
    """A name, folder or pattern matches no image file; the message names it."""


# Reading and decoding.


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Turns any error raised by reading or decoding into an `ImageError`.

    Decoders raise nearly any type of error on damaged data (zlib.error, struct.error, KeyError,
    ...), so types are not listed.
    """
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image, or of a format that is not read here"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, OSError) and error.filename is not None:
        return error.strerror or "it cannot be read"
    # Remove the memory address of the buffer, which Pillow includes.
    text = " ".join(re.sub(r"<_io\.BytesIO.*?>", "", shown(str(error))).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    if isinstance(error, ValueError | SyntaxError) and text:
        return text
    if isinstance(error, OSError) and text and error.errno is None:
        return text
    return f"damaged ({type(error).__name__}{': ' * bool(text)}{text})"


@guarded()
def read_bytes(path: str | pathlib.Path) -> bytes:
    """Reads a file that may be an image.

    Raises:
        ImageError: The file is missing, not a regular file (a pipe would block), empty, or too
            large.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"it is a {_kind(status.st_mode)}, no file")
    check_length(status.st_size)
    return pathlib.Path(path).read_bytes()


def check_length(length: int) -> None:
    """Checks that an encoded image can have this many bytes.

    Raises:
        ImageError: The length is 0 or more than `MAX_BYTES`.
    """
    if length == 0:
        raise ImageError("it is empty (0 bytes)")
    if length > MAX_BYTES:
        raise ImageError(f"it has {length:,} bytes; an image may have {MAX_BYTES:,}")


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read, in the order in which they are tried."""
    Image.preinit()  # common formats come first
    Image.init()
    missing = [name for name, codec in _CODECS.items() if not features.check(codec)]
    left_out = (*_NOT_DECODED_BY_PILLOW, *missing)
    return tuple(name for name in Image.ID if name not in left_out)


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes of the files taken from folders: '.jpg', '.jfif', '.avif', ..."""
    known = {*formats(), "MPO"}  # multi-picture JPEGs are opened as JPEGs
    found = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in found if name in known)


@dataclasses.dataclass(frozen=True)
class Opened:
    """An image whose header has been read; its pixels are decoded when they are needed.

    Attributes:
        image: Pillow's image, as stored.
        turn: Operation that rotates or mirrors it upright; None if none is needed.
    """

    image: Image.Image
    turn: Image.Transpose | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright."""
        width, height = self.image.size
        swapped = self.turn in (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])
        return (height, width) if swapped else (width, height)

    def rgb(self) -> Image.Image:
        """Decodes the upright image."""
        rgb = _to_rgb(self.image)
        return rgb if self.turn is None else rgb.transpose(self.turn)


@guarded()
def open_image(encoded: bytes | np.ndarray, exif_orientation: bool = True) -> Opened:
    """Opens an image; if the file holds several, the first one.

    Args:
        encoded: Contents of a file, or decoded uint8 [H, W, C] pixels.
        exif_orientation: Whether to rotate the image upright by its EXIF data, as viewers do.

    Raises:
        ImageError: The file is not an image, or its header is damaged.
    """
    if isinstance(encoded, np.ndarray):
        return Opened(Image.fromarray(encoded))
    if encoded.startswith(b"version https://git-lfs"):
        raise ImageError("it is a pointer of Git LFS, not the file itself; run git lfs pull")
    image = Image.open(io.BytesIO(encoded), formats=formats())
    if len(image.size) != 2 or not all(isinstance(n, int) and n > 0 for n in image.size):
        raise ImageError("its header is damaged")  # some decoders accept any size
    return Opened(image, _turn(image) if exif_orientation else None)


def _turn(image: Image.Image) -> Image.Transpose | None:
    if image.format == "TIFF":  # Pillow always rotates these itself
        return None
    if image.format == "PNG":
        image.load()  # the orientation may follow the pixels, which must be complete
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not affect the pixels
        return None


@guarded()
def resized_crop(
    opened: Opened, box: Box, size: Size, resize: "Resize | None" = None
) -> np.ndarray:
    """Crops a box of an image and resizes it to uint8 [h, w, 3].

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size (in the DCT domain, at a fraction of the cost)
    if the crop then still has at least as many pixels per side as the result.

    Args:
        opened: The image.
        box: Area to crop, in pixels of the full upright image.
        size: Side of the result, or its height and width.
        resize: Function that crops and resizes; None: `resize_pillow`.

    Raises:
        ImageError: The pixels are damaged.
    """
    full = opened.size
    height, width = height_and_width(size)
    _decode_scaled(opened.image, min((box[2] - box[0]) / width, (box[3] - box[1]) / height))
    rgb = opened.rgb()
    across, down = rgb.width / full[0], rgb.height / full[1]
    box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    # Rounding must not put an edge slightly outside the image.
    box = (box[0], box[1], min(box[2], rgb.width), min(box[3], rgb.height))
    if rgb.size == (width, height) and box == (0, 0, width, height):
        return np.asarray(rgb)
    return (resize or resize_pillow)(rgb, box, size)


def height_and_width(size: Size) -> tuple[int, int]:
    """Returns height and width; a single number is both."""
    # As in msvit_jax.image_size, which exports do not hold.
    height, width = np.broadcast_to(size, 2).tolist()
    return height, width


def resize_pillow(rgb: Image.Image, box: Box, size: Size) -> np.ndarray:
    """Resizes by bicubic interpolation with antialiasing, as in the papers' PyTorch recipes."""
    shape = height_and_width(size)[::-1]
    return np.asarray(rgb.resize(shape, Image.Resampling.BICUBIC, box=box))


def _decode_scaled(image: Image.Image, factor: float) -> None:
    """Sets the JPEG decoder to the smallest scale of at least 1 / `factor`."""
    if image.format == "JPEG" and factor >= 2:
        image.draft("RGB", (int(image.width / factor), int(image.height / factor)))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decodes; gray, palette, RGBA, CMYK, 16-bit, ... become RGB (transparency is dropped)."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_from_least_to_greatest(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def _from_least_to_greatest(values: np.ndarray) -> np.ndarray:
    """Scales 32-bit integers or floats, for which files do not define white, to uint8.

    The image's least value becomes 0 and its greatest 255.
    """
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("it has NaN or infinite pixels")
    least, greatest = values.min(), values.max()
    return np.rint((values - least) * (255 / max(greatest - least, 1e-300))).astype(np.uint8)


def center_box(width: int, height: int, fraction: float, size: Size = 1) -> Box:
    """Returns the central box of a size's shape, `fraction` of the largest one that there is.

    For a square, cropping and resizing it once is equivalent to resizing the short side to size /
    fraction and then cropping the center, but cheaper.
    """
    down, across = height_and_width(size)
    box_width = min(width, height * across / down) * fraction
    box_height = min(height, width * down / across) * fraction
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def center_crop(
    encoded: bytes | np.ndarray, size: Size, fraction: float, exif_orientation: bool = True
) -> np.ndarray:
    """Crops an image's central square or rectangle and resizes it to uint8 [h, w, 3].

    Args:
        encoded: Contents of a file, or uint8 [H, W, C] pixels.
        size: Side of the result, or its height and width.
        fraction: Share of the largest central box's sides that is kept, see `center_box`.
        exif_orientation: Whether to rotate the image upright by its EXIF data, as viewers do.

    Raises:
        ImageError: The file is not an image, or is damaged.
    """
    opened = open_image(encoded, exif_orientation)
    return resized_crop(opened, center_box(*opened.size, fraction, size), size)


def read_image(
    path: str | pathlib.Path, size: Size, fraction: float, exif_orientation: bool = True
) -> np.ndarray:
    """Reads a file and crops it as `center_crop` does, to uint8 [h, w, 3].

    Raises:
        ImageError: The file cannot be read, is not an image, or is damaged.
    """
    return center_crop(read_bytes(path), size, fraction, exif_orientation)


@guarded()
def decode(encoded: bytes | np.ndarray, exif_orientation: bool = True) -> np.ndarray:
    """Decodes an image completely, to uint8 [H, W, 3].

    Raises:
        ImageError: The file is not an image, or is damaged.
    """
    return np.asarray(open_image(encoded, exif_orientation).rgb())


# Finding.


@dataclasses.dataclass
class Found:
    """Files found in a folder or by a pattern.

    Attributes:
        files: Paths of the files taken.
        folders: Paths of all folders entered, including the first.
        passed_over: Paths that were skipped, by reason.
    """

    files: list[pathlib.Path] = dataclasses.field(default_factory=list)
    folders: list[pathlib.Path] = dataclasses.field(default_factory=list)
    passed_over: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def pass_over(self, path: str | pathlib.Path, reason: str) -> None:
        """Records a skipped file or folder."""
        others = self.passed_over.setdefault(reason, [])
        if str(path) not in others:
            others.append(str(path))

    def add(self, other: "Found") -> None:
        """Adds the entries of another `Found`, without duplicate files."""
        self.files = list(dict.fromkeys([*self.files, *other.files]))
        self.folders += other.folders
        for reason, paths in other.passed_over.items():
            for path in paths:
                self.pass_over(path, reason)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or the system's: '.DS_Store', 'Thumbs.db', ..."""
    return name.startswith((".", "__MACOSX")) or name.lower() in ("thumbs.db", "desktop.ini")


def walk(folder: str | pathlib.Path, endings: Container[str] | None = None) -> Found:
    """Finds a folder's files at any depth; follows links but not loops of links.

    Args:
        folder: Folder to search.
        endings: Suffixes of the files to take, in lower case; None: all files.
    """
    found = Found()
    waiting: list[tuple[pathlib.Path, tuple[tuple[int, int], ...]]] = [(pathlib.Path(folder), ())]
    while waiting:
        here, above = waiting.pop()
        try:
            status = os.stat(here)
            with os.scandir(here) as entries:
                listed = list(entries)
        except OSError as error:
            found.pass_over(here, f"folders that cannot be read ({error.strerror})")
            continue
        found.folders.append(here)
        above = (*above, (status.st_dev, status.st_ino))
        for entry in listed:
            path = here / entry.name
            reason, below = _reason_to_pass_over(entry, above, endings)
            if reason:
                found.pass_over(path, reason)
            elif below:
                waiting.append((path, above))
            else:
                found.files.append(path)
    found.files.sort()
    found.folders.sort()
    return found


def _reason_to_pass_over(
    entry: os.DirEntry[str], above: tuple[tuple[int, int], ...], endings: Container[str] | None
) -> tuple[str, bool]:
    """The reason to skip an entry, or '', and whether the entry is a folder."""
    if is_hidden(entry.name):
        return HIDDEN, False
    try:
        status = entry.stat()
    except FileNotFoundError:
        return "links to nothing", False
    except OSError as error:
        return f"not accessible ({error.strerror})", False
    if stat.S_ISDIR(status.st_mode):
        loops = (status.st_dev, status.st_ino) in above
        return (LOOPS if loops else ""), True
    if not stat.S_ISREG(status.st_mode):
        return f"{_kind(status.st_mode)}s", False
    suffix = pathlib.PurePath(entry.name).suffix.lower()
    if endings is not None and suffix not in endings:
        return f"{shown(suffix)} files" if suffix else "files without a suffix", False
    return "", False


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((kind for test, kind in kinds.items() if test(mode)), "device")


def find(patterns: Sequence[str]) -> Found:
    """Finds image files that are named, lie in a named folder (at any depth), or match a glob.

    Each file appears once, in the order of the patterns. Named files and matches of a glob are
    taken regardless of suffix; folders are searched for `suffixes`.

    Raises:
        NoFilesError: A pattern finds nothing.
    """
    found = Found()
    for pattern in patterns:
        one = _matching(os.path.expanduser(pattern))
        if not one.files:
            if os.path.lexists(pattern) and not os.path.isdir(pattern):
                raise NoFilesError(f"'{shown(pattern)}' is neither a file nor a folder.")
            passed = "".join(
                f" Passed over: {line}." for line in passed_over_lines(one.passed_over)
            )
            raise NoFilesError(
                f"'{shown(pattern)}' is no file, no folder with images (.jpg, .png, and whatever "
                f"else Pillow decodes), and no glob that matches one.{passed}"
            )
        found.add(one)
    return found


def _matching(pattern: str) -> Found:
    if os.path.isfile(pattern):
        return Found([pathlib.Path(pattern)])
    if os.path.isdir(pattern):
        return walk(pattern, suffixes())
    found = Found()
    path = pathlib.Path(pattern)
    for match in _glob(pathlib.Path(path.anchor), path.parts[bool(path.anchor) :], found):
        if os.path.isfile(match):
            found.files.append(match)
        elif os.path.isdir(match):
            found.add(walk(match, suffixes()))
    found.files = sorted(set(found.files))
    return found


def _glob(folder: pathlib.Path, parts: Sequence[str], found: Found) -> Iterator[pathlib.Path]:
    """Yields matching paths below a folder; unlike pathlib and glob, it stops at link loops."""
    if not parts:
        yield folder
        return
    first, *rest = parts
    if first == "**":
        for below in walk(folder).folders if rest else [folder]:
            yield from _glob(below, rest, found)
    elif not re.search(r"[*?\[]", first):
        yield from _glob(folder / first, rest, found)
    else:
        try:
            names = fnmatch.filter(os.listdir(folder), first)
        except OSError:  # not a readable folder: nothing matches
            return
        for name in sorted(names):
            if is_hidden(name) and not first.startswith("."):
                found.pass_over(folder / name, HIDDEN)
            else:
                yield from _glob(folder / name, rest, found)


# Display.


def shown(name: object) -> str:
    r"""A file's name for display: bytes that are not text, newlines, ... are escaped as '\xe9'."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(name))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python's file functions return it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def passed_over_lines(passed_over: Mapping[str, Sequence[str]], named: int = 3) -> list[str]:
    """A line for each reason, such as '4 hidden: a/.x, a/.y, a/.z, ...'.

    Args:
        passed_over: Names of skipped entries, by reason.
        named: Most names listed in a line.
    """
    return [
        f"{len(paths)} {reason}: {', '.join(map(shown, paths[:named]))}"
        + (", ..." if len(paths) > named else "")
        for reason, paths in sorted(passed_over.items())
    ]
