"""Files that are damaged, lie about their sizes, or hold something else than numbers."""

import io
import json
import pathlib
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from msvit_jax import create_model, weights
from msvit_jax.errors import UserError
from msvit_jax.export import write
from msvit_jax.weights import files
from tests.export import made

FORTY_GB = 40 * 2**30


def refuses(path, match):
    """Asserts one clear error, and that no memory was taken for what the file claims."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=match) as error:
            files.read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)


def npy(array, **kwargs):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **kwargs)
    return buffer.getvalue()


def npy_claiming(shape, body, descr="<f4"):
    buffer = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + body


def npz_of(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def safetensors_claiming(path, shape, end, body=b"\0" * 64):
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def test_a_safetensors_header_that_claims_40_gb(tmp_path):
    path = safetensors_claiming(tmp_path / "w.safetensors", [FORTY_GB // 4], FORTY_GB)
    refuses(path, "cannot be read as weights")


def test_a_safetensors_header_that_is_itself_40_gb(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", FORTY_GB) + b"{}" * 100)
    refuses(path, "cannot be read as weights")


def test_a_shape_that_its_bytes_do_not_hold(tmp_path):
    refuses(safetensors_claiming(tmp_path / "w.safetensors", [1000], 64), "cannot be read")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_truncated_files(tmp_path, suffix, kept):
    path = tmp_path / f"w{suffix}"
    flat = {"a": np.arange(1000, dtype=np.float32), "b": np.ones((20, 30), np.float32)}
    save_file(flat, path) if suffix == ".safetensors" else np.savez(path, **flat)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refuses(path, "cannot be read as weights")


def test_an_npz_member_that_claims_more_than_it_holds(tmp_path):
    path = npz_of(tmp_path / "w.npz", {"w": npy_claiming((FORTY_GB // 4,), b"\0" * 64)})
    refuses(path, r"w\.npy claims 42,949,672,960 bytes and holds 64")


@pytest.mark.fault(5)
def test_an_npz_member_that_unpacks_to_far_more_than_weights_would(tmp_path):
    zeros = npy(np.zeros(2**20, np.float32))
    path = npz_of(tmp_path / "w.npz", {"w": zeros}, zipfile.ZIP_DEFLATED)
    del zeros
    refuses(path, r"claims to unpack to 4,194,432 bytes from 4,\d\d\d")


def test_compressed_files_with_a_head_of_zeros(tmp_path):
    rng = np.random.default_rng(0)
    flat = {"trunk": rng.standard_normal(10_000), "head": np.zeros(100_000, np.float32)}
    np.savez_compressed(tmp_path / "w.npz", **flat)
    found = files.read(tmp_path / "w.npz")
    np.testing.assert_array_equal(found["trunk"], flat["trunk"])
    np.testing.assert_array_equal(found["head"], flat["head"])


def test_an_npz_directory_that_claims_other_sizes(tmp_path):
    path = npz_of(tmp_path / "w.npz", {"w": npy(np.ones(16, np.float32))})
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content)
    refuses(path, "beyond the end of the file")


def test_python_objects_are_never_loaded(tmp_path):
    class Opened:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "executed",)

    objects = npy(np.array([Opened()], dtype=object), allow_pickle=True)
    refuses(npz_of(tmp_path / "w.npz", {"w": objects}), "Python objects, which are never loaded")
    assert not (tmp_path / "executed").exists()


def test_what_is_no_number(tmp_path):
    np.savez(tmp_path / "w.npz", names=np.array(["a", "b"]))
    refuses(tmp_path / "w.npz", "names holds <U1, not numbers")
    (tmp_path / "x.npz").write_bytes(npz_of(tmp_path / "y.npz", {"w": b"no array"}).read_bytes())
    refuses(tmp_path / "x.npz", "cannot be read as weights")


def test_half_precision_becomes_float32(tmp_path):
    values = np.linspace(-3, 3, 7, dtype=np.float32)
    rounded = {
        "bfloat16": values.astype(ml_dtypes.bfloat16),
        "float16": values.astype(np.float16),
    }
    np.savez(tmp_path / "w.npz", **rounded)
    with np.load(tmp_path / "w.npz") as file:
        assert file["bfloat16"].dtype == np.dtype("V2")  # how JAX's own checkpoints come
    save_file(rounded, tmp_path / "w.safetensors")
    for suffix in ("npz", "safetensors"):
        found = files.read(tmp_path / f"w.{suffix}")
        for name, x in rounded.items():
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], x.astype(np.float32))


def test_our_own_files_notice_numbers_that_changed(tmp_path):
    path = tmp_path / "w.safetensors"
    model = create_model("vit_tiny_patch16_224", **made.SIZES)
    write(made.source("vit_tiny_patch16_224"), "safetensors", path)
    wanted = made.source("vit_tiny_patch16_224").params
    found = weights.read(path, model)
    assert found.keys() == wanted.keys()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + bytes(4) + whole[-96:])
    with pytest.raises(UserError, match=r"is damaged: \S+ changed after it was saved"):
        weights.read(path, model)


def test_a_damaged_description_is_told(tmp_path):
    path = tmp_path / "w.safetensors"
    for text, match in (("{", "damaged JSON"), ("3", "a JSON int instead")):
        save_file({"a": np.ones(1)}, path, metadata={"msvit_jax": text})
        with pytest.raises(UserError, match=match):
            weights.describe(path)
    save_file({"a": np.ones(1)}, path, metadata={"format": "pt"})
    assert weights.describe(path) is None


def parts_of(folder, where, **parts):
    """Files beside an index that says where each array lies; returns the index."""
    for name, arrays in parts.items():
        save_file(arrays, folder / f"{name}.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def test_weights_in_several_files(tmp_path):
    arrays = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("abc")}
    path = parts_of(
        tmp_path,
        {"a": "first.safetensors", "b": "second.safetensors", "c": "first.safetensors"},
        first={"a": arrays["a"], "c": arrays["c"]},
        second={"b": arrays["b"]},
    )
    found = files.read(path)
    assert sorted(found) == ["a", "b", "c"]
    for name, x in arrays.items():
        np.testing.assert_array_equal(found[name], x)
    (tmp_path / "second.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"names 2 files, of which 1 are missing beside it: second\.safetensors"
    ):
        files.read(path)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ({"a": "first.safetensors", "b": "first.safetensors"}, r"1 arrays .* lack: b"),
        ({"a": "../first.safetensors"}, "not a weights file beside it"),
        ({"a": "model.safetensors.index.json"}, "not a weights file beside it"),
        ({}, "weight_map"),
        (3, "weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files(tmp_path, where, match):
    path = parts_of(tmp_path, where, first={"a": np.ones(1)})
    refuses(path, match)


def test_pytorch_files(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pth"
    half = torch.linspace(-3, 3, 7).to(torch.bfloat16)
    torch.save({"state_dict": {"a": torch.ones(2, 3), "b": half}, "epoch": 3}, path)
    found = files.read(path)
    np.testing.assert_array_equal(found["state_dict.a"], np.ones((2, 3)))
    np.testing.assert_array_equal(found["state_dict.b"], half.float().numpy())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuses(path, "damaged")
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    refuses(path, "before 1.6")


def test_code_in_pytorch_files_is_never_executed(tmp_path):
    torch = pytest.importorskip("torch")

    class Opened:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": {"a": torch.ones(2), "b": Opened()}}, tmp_path / "w.pth")
    refuses(tmp_path / "w.pth", "neither a tensor nor a known class of settings")
    assert not (tmp_path / "executed").exists()


def test_a_pytorch_file_that_claims_40_gb(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(100_003)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    data = next(name for name in members if name.endswith("data.pkl"))
    number, larger = (b"J" + struct.pack("<i", n) for n in (100_003, 2**31 - 1))
    assert members[data].count(number) >= 1
    members[data] = members[data].replace(number, larger)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refuses(path, "claims more|claims 8,589,934,588 bytes")


@pytest.mark.field(70)
def test_git_lfs_pointers_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 44136744\n"
    for name in ("w.safetensors", "w.npz", "w.pth", "w.safetensors.index.json"):
        (tmp_path / name).write_bytes(pointer)
        refuses(tmp_path / name, "git-lfs pointer.*git lfs pull")


def test_eight_bit_floats_become_float32(tmp_path):
    values = np.linspace(-3, 3, 7).astype(ml_dtypes.float8_e4m3fn)
    found = files.number("w", values, "file")
    np.testing.assert_array_equal(found, values.astype(np.float32))
    assert found.dtype == np.float32
