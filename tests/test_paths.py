import contextlib
import os
import pathlib

import pytest
from PIL import Image
from tensorboardX import record_writer

from msvit_jax import event_files, paths
from msvit_jax.data import source_files
from msvit_jax.errors import UserError
from msvit_jax.inference.images import find_files
from tests.bucket import bucket


@pytest.fixture
def gs(tmp_path):
    with bucket(tmp_path / "store") as folder:
        yield folder


def test_local_paths_are_those_of_pathlib(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    for text, place in (
        ("runs/a", "runs/a"),
        ("~/run", "/home/ada/run"),
        ("~", "/home/ada"),
        ("./~/run", "~/run"),
        ("/a/~b", "/a/~b"),
        ("file:///data/x", "/data/x"),
        ("C:/x", "C:/x"),
    ):
        assert paths.parse(text) == pathlib.Path(place)
        if not text.startswith(("file:", "./")):  # which pathlib shortens
            assert paths.parse(pathlib.Path(text)) == pathlib.Path(place)
        assert not paths.is_address(text)


def test_addresses_stay_addresses(gs):
    for path in (
        "gs://b/run",
        "gs://b/run/",
        pathlib.Path("gs://b/run"),
        paths.parse("gs://b/run"),
    ):
        place = paths.parse(path)
        assert str(place) == "gs://b/run"
        assert paths.is_address(place)
        assert str(paths.absolute(path)) == "gs://b/run"
        assert str(place / "config.json") == "gs://b/run/config.json"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is not a path"),
        ("a\0b", "is not a path"),
        ("~nobody_of_that_name/run", r"does not exist here.*\./~nobody"),
        ("http://host/run", "'http://host/run'.*use gs://"),
        ("memory://run", "use gs://"),
        ("gs://", "names no bucket"),
        ("gs:///run", "names no bucket"),
    ],
)
def test_paths_that_are_none(path, message):
    with pytest.raises(UserError, match=message):
        paths.parse(path)


@pytest.mark.parametrize("scheme", paths.BACK_ENDS)
def test_a_missing_back_end_is_named_with_its_package(scheme, monkeypatch):
    monkeypatch.setitem(paths.BACK_ENDS, scheme, "package_that_is_not_there")
    with pytest.raises(UserError, match=f"{scheme}:// needs .*pip install package_that_is_not"):
        paths.parse(f"{scheme}://bucket/run")


def test_files_are_written_whole(tmp_path, gs):
    for folder in (tmp_path, paths.parse("gs://b")):
        file = folder / "x.txt"
        for content in ("one\r\n", b"two"):
            paths.write_whole(file, content)
            assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert [p.name for p in folder.iterdir() if p.is_file()] == ["x.txt"]


def test_places_are_tried(tmp_path, gs):
    for folder in (tmp_path / "a" / "b", paths.parse("gs://b/c")):
        assert paths.check_writable(folder) == folder
        assert folder.is_dir()
        assert list(folder.iterdir()) == []
    file = tmp_path / "file"
    file.write_text("kept")
    for bad in (file, file / "below"):
        with pytest.raises(UserError, match=r"is a file|cannot be written: Not a directory"):
            paths.check_writable(bad)
    assert file.read_text() == "kept"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder that nobody can write in")
def test_a_place_that_cannot_be_written():
    with pytest.raises(UserError, match=r"'/proc/run' cannot be written"):
        paths.check_writable("/proc/run")


def test_errors_of_back_ends_are_one_line(gs, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("403 Forbidden\nwith a page of HTML")

    monkeypatch.setattr(type(gs), "makedirs", fails)
    with pytest.raises(UserError) as error:
        paths.check_writable("gs://b/run")
    assert str(error.value) == "'gs://b/run' cannot be written: 403 Forbidden"


def test_lines_are_added(tmp_path, gs):
    for file in (tmp_path / "m.jsonl", paths.parse("gs://b/m.jsonl")):
        for text in ("a\n", "b\n"):
            lines = paths.Lines(file)
            lines.write(text)
            lines.flush()
            lines.close()
        assert file.read_text() == "a\nb\n"


def test_lines_at_an_address_are_rewritten_now_and_then(gs, monkeypatch):
    file = paths.parse("gs://b/m.jsonl")
    lines = paths.Lines(file)
    lines.write("a\n")
    lines.flush()
    assert not file.exists()  # too soon: each time the whole of it is sent
    monkeypatch.setattr(paths, "_REWRITTEN_EVERY", 0.0)
    lines.flush()
    assert file.read_text() == "a\n"
    lines.close()


@pytest.mark.fault(11)
def test_a_full_disk_names_the_file(tmp_path):
    file = tmp_path / "m.jsonl"
    file.symlink_to("/dev/full")
    lines = paths.Lines(file)
    with pytest.raises(OSError, match="No space left") as error:
        lines.write("a\n")
    assert error.value.filename == str(file)
    lines.close()


def test_copies_of_addresses_are_made_once_and_anew_when_they_change(
    tmp_path, gs, monkeypatch, capsys
):
    monkeypatch.setenv(paths.CACHE, str(tmp_path / "cache"))
    source = tmp_path / "store" / "b" / "data" / "sub"
    source.mkdir(parents=True)
    (source / "x.bin").write_bytes(b"123")
    (source.parent / "y.txt").write_text("y")
    copy = paths.fetch("gs://b/data")
    assert (copy / "sub" / "x.bin").read_bytes() == b"123"
    assert (copy / "y.txt").read_text() == "y"
    assert "Copying gs://b/data (4 bytes)" in capsys.readouterr().err
    assert paths.fetch("gs://b/data") == copy
    assert paths.fetch("gs://b/data/y.txt").read_text() == "y"
    assert "gs://b/data (" not in capsys.readouterr().err
    (source / "x.bin").write_bytes(b"1234")
    assert (paths.fetch("gs://b/data") / "sub" / "x.bin").read_bytes() == b"1234"
    assert paths.fetch(tmp_path) == tmp_path
    with pytest.raises(UserError, match="nothing at 'gs://b/none'"):
        paths.fetch("gs://b/none")


def test_a_disk_without_room_for_a_copy(tmp_path, gs, monkeypatch):
    monkeypatch.setenv(paths.CACHE, str(tmp_path / "cache"))
    paths.write_whole("gs://b/x.bin", b"123")
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2}))
    with pytest.raises(UserError, match=r"has 3 bytes; .* room for 2.*MSVIT_JAX_CACHE"):
        paths.fetch("gs://b/x.bin")


def test_uploads_are_the_same_files(tmp_path, gs):
    folder = tmp_path / "made"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x").write_bytes(b"\0\1")
    (folder / "y").write_text("y")
    paths.upload(folder, paths.parse("gs://b/out"))
    assert paths.parse("gs://b/out/sub/x").read_bytes() == b"\0\1"
    assert paths.parse("gs://b/out/y").read_text() == "y"
    paths.upload(folder / "y", paths.parse("gs://b/one"))
    assert paths.parse("gs://b/one").read_text() == "y"


def test_events_are_tensorboards_records_wherever_they_lie(tmp_path, gs):
    for folder in (tmp_path / "board", paths.parse("gs://b/board")):
        board = event_files.Board(folder)
        board.add_scalar("train/loss", 1.5, 3)
        board.close()
        (file,) = folder.iterdir()
        copy = tmp_path / "events"
        copy.write_bytes(file.read_bytes())
        from tensorboardX.proto import event_pb2

        records = list(_records(copy.read_bytes()))
        last = event_pb2.Event.FromString(records[-1]).summary.value[0]
        assert (last.tag, last.simple_value) == ("train/loss", 1.5)


def _records(data):
    """TFRecord: length (8 bytes), a checksum (4), the record, another (4)."""
    while data:
        size = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + size]
        data = data[16 + size :]


def test_events_that_cannot_be_written_do_not_hold_a_run_up(tmp_path, monkeypatch, capsys):
    def on_a_full_disk(self, path):
        (tmp_path / "events").symlink_to("/dev/full")
        return event_files._EventFile(str(tmp_path / "events"))

    factory = record_writer.REGISTERED_FACTORIES[event_files._PREFIX]
    monkeypatch.setattr(type(factory), "open", on_a_full_disk)
    board = event_files.Board(tmp_path / "board")
    for step in range(50):
        board.add_scalar("x", 1.0, step)
        board.flush()
    board.close()
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "No space left on device" in said


def test_images_at_an_address_are_copied_first(gs, tmp_path, monkeypatch):
    monkeypatch.setenv(paths.CACHE, str(tmp_path / "cache"))
    for split in ("train", "validation"):
        for name in ("a", "b"):
            folder = tmp_path / "store" / "b" / "photos" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / "x.png")
    listed = source_files.list_files("gs://b/photos").files
    assert sorted(str(file.path) for file in listed) == [
        f"{split}/{name}/x.png" for split in ("train", "validation") for name in ("a", "b")
    ]
    found = find_files(["gs://b/photos/train", "gs://b/photos/validation/a/x.png"]).files
    assert [str(path)[-len("train/a/x.png") :] for path in found[:1]] == ["train/a/x.png"]
    assert len(found) == 3
    with pytest.raises(UserError, match="nothing at 'gs://b/none'"):
        find_files(["gs://b/none"])
    with pytest.raises(UserError, match=r"http://host/x\.jpg.*use gs://"):
        find_files(["http://host/x.jpg"])


@pytest.mark.fault(13)
def test_what_killed_writers_left_is_removed(tmp_path):
    ours, others = paths._temporary_prefix(), f"{paths._TEMPORARY}elsewhere.1."
    dead = ours.replace(f".{os.getpid()}.", ".4194305.")  # above the largest number of a process
    for name in (f"{ours}a", f"{dead}b", f"{others}c", f"{others}d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    os.utime(tmp_path / f"{others}d", (0, 0))
    paths.write_whole(tmp_path / "file", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {f"{ours}a", f"{others}c", "file"}


@pytest.mark.fault(11)
@pytest.mark.parametrize("name", ["file.json", "f" * 255])
def test_a_file_is_there_whole_or_as_it_was(tmp_path, name):
    paths.write_whole(tmp_path / name, "before")
    with contextlib.suppress(ZeroDivisionError), paths.whole(tmp_path / name) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "before")]
    with pytest.raises(OSError, match="name too long"):
        paths.write_whole(tmp_path / ("f" * 300), "x")
    assert len(list(tmp_path.iterdir())) == 1
