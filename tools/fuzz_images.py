"""Damages images and zip archives at random, reads them, and says what became of them.

    python tools/fuzz_images.py [--count=1000] [--seed=0]

Every input must end in an answer or in one line of text; a traceback, a warning, or anything that a
library prints is an error, and so is an end of the process. Prints a line for each format.
"""

import argparse
import collections
import io
import os
import pathlib
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image

from msvit_jax.data import image_files, source_files
from msvit_jax.errors import UserError

# Pillow's formats that it can write, too, with what makes the example less simple.
OPTIONS: dict[str, dict[str, object]] = {
    "AVIF": {},
    "BMP": {},
    "DDS": {},
    "GIF": {"save_all": True},
    "ICNS": {},
    "ICO": {},
    "IM": {},
    "JPEG": {"progressive": True},
    "JPEG2000": {},
    "MPO": {"save_all": True},
    "PCX": {},
    "PNG": {"save_all": True},
    "PPM": {},
    "QOI": {},
    "SGI": {},
    "TGA": {"compression": "tga_rle"},
    "TIFF": {"compression": "tiff_lzw", "save_all": True},
    "WEBP": {"save_all": True},
}
_SEVERAL = ("GIF", "MPO", "PNG", "TIFF", "WEBP")  # pictures in one file
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def example(form: str, seed: int = 0) -> bytes:
    """A small image of a format, with EXIF where the format has it."""
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (4, 5, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    image = Image.fromarray(smooth)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    options = dict(OPTIONS[form])
    if form in ("AVIF", "JPEG", "JPEG2000", "MPO", "PNG", "TIFF", "WEBP"):
        options["exif"] = exif
    if form in _SEVERAL:
        options["append_images"] = [image.transpose(Image.Transpose.ROTATE_180)]
    buffer = io.BytesIO()
    with warnings.catch_warnings(
        action="ignore"
    ):  # IM can still be read, though Pillow 15 drops it
        image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def archive(seed: int = 0) -> bytes:
    """A zip of split/class/file, each file compressed in another way."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for index, method in enumerate(METHODS):
            path = f"{('train', 'validation')[index % 2]}/{('cat', 'dog')[index // 2]}/{index}.png"
            made.writestr(path, example("PNG", seed + index), compress_type=method)
    return buffer.getvalue()


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """A copy with one to eight changes, half of the time near the beginning, or cut short."""
    data = bytearray(whole)
    for _ in range(int(rng.integers(1, 9))):
        if not data:
            break
        reach = min(len(data), 64) if rng.integers(2) else len(data)
        at, kind = int(rng.integers(reach)), int(rng.integers(6))
        length = int(rng.integers(1, 9))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + length] = rng.bytes(length)
        elif kind == 2:
            data[at : at + length] = bytes([int(rng.choice([0, 1, 127, 128, 255]))]) * length
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * int(rng.integers(1, 5))
        elif rng.integers(4) == 0:
            del data[at:]
    return bytes(data)


def read_image(data: bytes) -> str:
    """'answered', or the line that a user gets."""
    try:
        pixels = image_files.center_crop(data, 16, 1.0)
    except image_files.ImageError as error:
        return str(error)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    return "answered"


def read_archive(data: bytes, folder: pathlib.Path) -> str:
    """The same for an archive, whose files may fail one by one."""
    file = folder / f"{len(os.listdir(folder))}.zip"
    file.write_bytes(data)
    try:
        listing = source_files.list_files(str(file))
    except UserError as error:
        return str(error).replace(str(file), "FILE")
    reasons = sorted({bad.reason for bad in source_files.find_unreadable(listing.files)})
    return "; ".join(reasons) or "answered"


def readers(folder: pathlib.Path) -> Iterator[tuple[str, bytes, Callable[[bytes], str]]]:
    """Name, whole example and reader of each kind of input."""
    for form in OPTIONS:
        if form in image_files.formats() or form == "MPO":
            yield form, example(form), read_image
    yield "zip", archive(), lambda data: read_archive(data, folder)


def try_all(whole: bytes, read: Callable[[bytes], str], count: int, seed: int) -> list[str]:
    """What became of `count` damaged copies; checks that each is a line of text."""
    assert read(whole) == "answered", "the example itself cannot be read"
    rng = np.random.default_rng(seed)
    results = []
    for _ in range(count):
        result = read(damaged(whole, rng))
        assert result, "an empty message"
        assert "\n" not in result, f"more than a line: {result!r}"
        assert "object at 0x" not in result, f"an address of the memory: {result!r}"
        results.append(result)
    return results


def main() -> None:
    """Runs all formats."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="damaged copies of each format")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        old = os.dup(2)
        os.dup2(printed.fileno(), 2)  # also what C libraries print
        try:
            for name, whole, read in readers(pathlib.Path(folder)):
                start = time.perf_counter()
                results = try_all(whole, read, given.count, given.seed)
                taken = time.perf_counter() - start
                answered = results.count("answered")
                lines = collections.Counter(results)
                print(
                    f"{name:9} {given.count} tried, {answered} answered, "
                    f"{given.count - answered} refused by {len(lines) - bool(answered)} different "
                    f"lines, {taken:.1f} s",
                    flush=True,
                )
        finally:
            os.dup2(old, 2)
            printed.seek(0)
            noise = printed.read()
            if noise:
                sys.stderr.write(noise.decode(errors="replace"))
                sys.exit("something was printed")


if __name__ == "__main__":
    main()
