"""Finding, reading and decoding of image files against EXIF's own definition, NumPy and Pillow."""

import importlib.util
import io
import os
import pathlib
import socket
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from msvit_jax.data import decode, image_files
from msvit_jax.data.image_files import ImageError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), np.uint8)
# What EXIF's 2.3 standard says of each orientation: where row 0 and column 0 of what is stored lie.
AS_STORED = {
    1: lambda x: x,  # top, left
    2: lambda x: x[:, ::-1],  # top, right
    3: lambda x: x[::-1, ::-1],  # bottom, right
    4: lambda x: x[::-1],  # bottom, left
    5: lambda x: x.swapaxes(0, 1),  # left, top
    6: lambda x: x[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda x: x[::-1].swapaxes(0, 1),  # left, bottom
}


def encoded(pixels, form="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(upright, orientation, form="PNG", **options):
    """An image as a camera stores it that was held another way."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.ascontiguousarray(AS_STORED[orientation](upright))
    return encoded(stored, form, exif=exif, **options)


LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


@pytest.mark.field(1)
@pytest.mark.parametrize("form", LOSSLESS)
@pytest.mark.parametrize("orientation", AS_STORED)
def test_photos_are_upright(form, orientation):
    data = photo(PIXELS, orientation, form, **LOSSLESS[form])
    np.testing.assert_array_equal(image_files.decode(data), PIXELS)
    if form != "TIFF":  # which Pillow turns itself
        stored = image_files.decode(data, exif_orientation=False)
        np.testing.assert_array_equal(stored, AS_STORED[orientation](PIXELS))


@pytest.mark.field(1)
@pytest.mark.parametrize("form", ["JPEG", "MPO", "AVIF"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_crops_of_photos_are_those_of_the_upright_photo(form, orientation):
    smooth = RNG.integers(0, 256, (4, 6, 3), np.uint8).repeat(40, 0).repeat(40, 1)
    box = (50.0, 10.0, 210.0, 170.0 - 20)  # not square: sides must not be mixed up
    opened = image_files.open_image(photo(smooth, orientation, form))
    assert opened.size == (240, 160)
    crop = image_files.resized_crop(opened, box, 16)
    expected = Image.fromarray(smooth).resize((16, 16), Image.Resampling.BICUBIC, box=box)
    assert np.abs(crop.astype(int) - np.asarray(expected)).mean() < 6  # a wrong turn: 60


def test_masks_are_turned_as_their_images():
    numbers = RNG.integers(0, 9, (6, 6), np.uint8)
    np.testing.assert_array_equal(decode.decode_mask(photo(numbers, 6), 6, 1.0), numbers)
    stored = decode.decode_mask(photo(numbers, 6), 6, 1.0, exif_orientation=False)
    np.testing.assert_array_equal(stored, AS_STORED[6](numbers))


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*"])
def test_a_damaged_exif_block_does_not_spoil_the_pixels(block):
    data = encoded(PIXELS, "WEBP", lossless=True, exif=block)
    np.testing.assert_array_equal(image_files.decode(data), PIXELS)


def test_an_unknown_orientation_is_none():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    np.testing.assert_array_equal(image_files.decode(encoded(PIXELS, exif=exif)), PIXELS)


GRAY = np.array([[0, 1, 2], [3, 4, 255]])


@pytest.mark.field(2)
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize(("low", "step"), [(0, 1), (-70000, 3), (1000, 8000000)])
def test_integers_and_floats_go_from_their_least_to_their_greatest(dtype, low, step):
    data = encoded((low + step * GRAY).astype(dtype), "TIFF")
    expected = np.repeat(GRAY[..., None], 3, axis=2)
    np.testing.assert_array_equal(image_files.decode(data), expected)


def test_sixteen_bits_are_the_upper_eight():
    values = (GRAY * 256 + 17).astype(np.uint16)
    expected = np.repeat(GRAY[..., None], 3, axis=2)
    for form in ("PNG", "TIFF", "PPM", "JPEG2000"):  # PPM comes as 32 bits, of a known white
        np.testing.assert_array_equal(image_files.decode(encoded(values, form)), expected, form)


def test_an_even_image_of_floats_is_black():
    even = np.full((2, 3), 7.5, np.float32)
    np.testing.assert_array_equal(image_files.decode(encoded(even, "TIFF")), np.zeros((2, 3, 3)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_floats_that_are_none_are_refused(value):
    with pytest.raises(ImageError, match="NaN or infinite"):
        image_files.decode(encoded(np.array([[0, value]], np.float32), "TIFF"))


def test_the_first_of_several_pictures_is_taken():
    others = [Image.fromarray(255 - PIXELS)]
    for form in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(PIXELS, form, save_all=True, append_images=others, **options)
        np.testing.assert_array_equal(image_files.decode(data), PIXELS, form)


def test_transparency_is_dropped():
    alpha = np.concatenate([PIXELS, np.full((5, 7, 1), 9, np.uint8)], axis=2)
    np.testing.assert_array_equal(image_files.decode(encoded(alpha)), PIXELS)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    data = encoded(palette, transparency=bytes([0, 128]))
    np.testing.assert_array_equal(image_files.decode(data), [[[10, 20, 30], [40, 50, 60]]])


def _png(width, height):
    """A header that promises more than there is."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    made = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(10))):
        made += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return made


BAD = [
    (b"", "no image, or of a format"),
    (b"no image", "no image, or of a format"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image, or of a format"),
    (encoded(PIXELS)[:-60], "truncated|broken"),
    (_png(60000, 60000), "more than 178,956,970 pixels"),
    (encoded(np.zeros((2, 2, 3), np.uint8), "TIFF")[:60], "."),
    (b"Image type: RGB image\r\nImage size (x*y): 4*4*4\r\n".ljust(511, b"\0") + b"\x1a", "header"),
    (
        b"Image type: RGB image\r\nImage size (x*y): 0*4\r\n".ljust(511, b"\0") + b"\x1a",
        "header|no image",
    ),
]


@pytest.mark.parametrize(("data", "reason"), BAD)
def test_bad_data_end_in_a_line(data, reason):
    with pytest.raises(ImageError, match=reason) as info:
        image_files.center_crop(data, 8, 1.0)
    assert "\n" not in str(info.value)
    assert "BytesIO" not in str(info.value)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a\nb"), KeyError(7), zlib.error("x"), MemoryError(), struct.error(), EOFError()],
)
def test_whatever_a_decoder_raises_is_a_line(error):
    with pytest.raises(ImageError) as info, image_files.guarded():
        raise error
    assert str(info.value)
    assert "\n" not in str(info.value)


def test_files_that_are_none_are_told_and_never_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "big.jpg").write_bytes(b"12345")
    (tmp_path / "locked.jpg").write_bytes(b"1")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    monkeypatch.setattr(image_files, "MAX_BYTES", 4)
    read = pathlib.Path.read_bytes

    def locked(path):
        if path.name == "locked.jpg":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", locked)
    reasons = {
        "pipe.jpg": "it is a pipe, no file",
        "folder.jpg": "it is a folder, no file",
        "empty.jpg": r"it is empty \(0 bytes\)",
        "big.jpg": "it has 5 bytes; an image may have 4",
        "locked.jpg": "Permission denied",
        "loop.jpg": "Too many levels of symbolic links",
        "gone.jpg": "No such file or directory",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=f"^{reason}$"):
            image_files.read_image(tmp_path / name, 8, 1.0)
    with pytest.raises(ImageError, match="it is a device, no file"):
        image_files.read_bytes("/dev/null")


ALONE = """
import runpy, sys
module = runpy.run_path(sys.argv[1])
for file in sys.argv[2:]:
    try:
        module["read_image"](file, 8, 1.0)
    except module["ImageError"] as error:
        print(error)
"""


def test_nothing_of_a_library_is_printed(tmp_path):
    """Warnings, log lines, and what libtiff prints in C; in a process without the library."""
    palette = Image.fromarray(PIXELS).convert("P")
    (tmp_path / "palette.png").write_bytes(encoded(palette, transparency=bytes(range(200))))
    tiff = bytearray(
        encoded(RNG.integers(0, 9, (64, 64), np.uint8), "TIFF", compression="tiff_lzw")
    )
    tiff[200:260] = bytes(60)
    (tmp_path / "damaged.tif").write_bytes(tiff)
    (tmp_path / "short.tif").write_bytes(tiff[:-40])
    (tmp_path / "exif.jpg").write_bytes(
        encoded(PIXELS, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    )
    (tmp_path / "big.bmp").write_bytes(
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 12000, 12000, 1, 24, 0, 0, 0, 0, 0, 0)
    )  # 144 million pixels: Pillow warns; they are missing
    command = [sys.executable, "-W", "always", "-I", "-c", ALONE, image_files.__file__]
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert 2 <= len(done.stdout.splitlines()) <= 3


def _tree(root, *names):
    for name in names:
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"x")


def _below(root, paths):
    return [os.fsencode(path.relative_to(root)) for path in paths]


def test_a_walk_follows_links_ends_loops_and_counts_the_rest(tmp_path):
    disk, photos = tmp_path / "disk", tmp_path / "photos"
    _tree(disk, b"deep/c.PNG", b"deep/d.avif")
    _tree(photos, b"b.jpg", b"a/\xe9.jfif", b"a/new\nline.jpg", b"._b.jpg", b".git/x.jpg")
    _tree(photos, b"__MACOSX/a/b.jpg", b"Thumbs.db", b"notes.txt", b"NOTES.TXT", b"bare", b"f.heic")
    (photos / "x.jpg").mkdir()
    (photos / "linked").symlink_to(disk)
    (disk / "back").symlink_to(photos)
    (photos / "up").symlink_to(".")
    (photos / "file.jpg").symlink_to("b.jpg")
    (photos / "dead.jpg").symlink_to("nowhere")
    (photos / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(photos / "pipe.jpg")
    found = image_files.walk(photos, image_files.suffixes())
    assert _below(photos, found.files) == [
        *(b"a/new\nline.jpg", b"a/\xe9.jfif", b"b.jpg", b"file.jpg"),
        *(b"linked/deep/c.PNG", b"linked/deep/d.avif"),
    ]
    counts = {reason: len(paths) for reason, paths in found.passed_over.items()}
    assert counts == {
        "hidden": 4,
        ".txt files": 2,
        ".heic files": 1,
        "files without a suffix": 1,
        "links back to a folder that holds them": 2,
        "links to nothing": 1,
        "not accessible (Too many levels of symbolic links)": 1,
        "pipes": 1,
    }
    assert set(_below(photos, found.folders)) == {b".", b"a", b"x.jpg", b"linked", b"linked/deep"}
    line = image_files.passed_over_lines(found.passed_over, 1)[-3]
    assert line == f"1 links to nothing: {photos}/dead.jpg"


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    _tree(tmp_path, b"a.jpg", b"locked/b.jpg")
    scan = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    found = image_files.walk(tmp_path)
    assert _below(tmp_path, found.files) == [b"a.jpg"]
    assert found.passed_over == {
        "folders that cannot be read (Permission denied)": [str(tmp_path / "locked")]
    }


def test_sockets_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # such names are short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.jpg")
        assert list(image_files.walk(".").passed_over) == ["sockets"]


def test_patterns_follow_links_and_leave_hidden_files_out(tmp_path, monkeypatch):
    _tree(tmp_path, b"disk/a.jpg", b"photos/b.jpg", b"photos/._b.jpg", b"photos/c[1].txt")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)

    def names(*patterns):
        return [str(path) for path in image_files.find(patterns).files]

    assert names("photos/**/*.jpg") == ["photos/b.jpg", "photos/linked/a.jpg"]
    assert names("photos/*.jpg") == ["photos/b.jpg"]
    assert image_files.find(["photos/*.jpg"]).passed_over == {"hidden": ["photos/._b.jpg"]}
    assert names("photos/._*") == ["photos/._b.jpg"]
    assert names("photos/c[1].txt", "disk") == ["photos/c[1].txt", "disk/a.jpg", "disk/back/b.jpg"]
    assert names("ph*", "disk/a.jpg") == ["photos/b.jpg", "photos/linked/a.jpg", "disk/a.jpg"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/disk/a.jpg") == [str(tmp_path / "disk" / "a.jpg")]


def test_a_pattern_that_finds_nothing_says_what_there_was(tmp_path):
    _tree(tmp_path, b"notes.txt", b".hidden.jpg")
    with pytest.raises(image_files.NoFilesError) as info:
        image_files.find([str(tmp_path)])
    assert "no folder with images" in str(info.value)
    assert f"1 .txt files: {tmp_path}/notes.txt" in str(info.value)
    assert f"1 hidden: {tmp_path}/.hidden.jpg" in str(info.value)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(
        image_files.NoFilesError, match=r"pipe\.jpg' is neither a file nor a folder"
    ):
        image_files.find([str(tmp_path / "pipe.jpg")])


def test_endings_are_those_that_pillow_decodes_itself():
    endings = image_files.suffixes()
    assert endings >= {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".bmp", ".gif", ".tif", ".mpo"}
    assert endings >= {".webp", ".avif", ".jp2"}  # where Pillow has their codecs, as its wheels do
    assert not endings & {".eps", ".ps", ".wmf", ".mpg", ".h5", ".pdf", ".txt", ""}


@given(st.binary(min_size=1, max_size=20))
def test_any_name_can_be_shown_on_one_line_of_text(name):
    text = image_files.shown(os.fsdecode(name))
    assert text.isprintable()
    text.encode()


def test_names_of_text_are_shown_as_they_are():
    for name in ("Müller 1.jpg", "日本.png", "e\u0301.jpg", "a\\b"):
        assert image_files.shown(name) == name
    assert image_files.shown(os.fsdecode(b"caf\xe9\n.png")) == "caf\\xe9\\n.png"


def _tool():
    path = pathlib.Path(__file__).parents[2] / "tools" / "fuzz_images.py"
    spec = importlib.util.spec_from_file_location("fuzz_images", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_damaged_images_and_archives_end_in_an_answer_or_a_line(tmp_path, capfd):
    """A sample; tools/fuzz_images.py tries a thousand of each."""
    tool = _tool()
    for name, whole, read in tool.readers(tmp_path):
        results = tool.try_all(whole, read, 12, seed=7)
        assert len(results) == 12, name
        assert set(results) != {"answered"}, name  # the damage is some
    assert capfd.readouterr() == ("", "")
