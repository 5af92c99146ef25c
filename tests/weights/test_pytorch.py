"""Files of torch.save, read without PyTorch; where it is there, its own files too."""

import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from msvit_jax.errors import UserError
from msvit_jax.weights import files, pytorch
from tests.weights.saved import Global, Made, namespace, torch_save


def arrays():
    rng = np.random.default_rng(0)
    return {
        "whole": rng.standard_normal((2, 3)).astype(np.float32),
        "half": np.linspace(-3, 3, 7).astype(ml_dtypes.bfloat16),
        "double": rng.standard_normal(4),
        "count": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


def test_tensors_and_settings_of_all_levels(tmp_path):
    settings = namespace(model="deit", lr=0.1, nested={"deep": [1, 2]})
    content = {"state_dict": arrays(), "epoch": 3, "args": settings}
    path = torch_save(tmp_path / "w.ckpt", content)
    found = files.read_contents(path)
    assert {name: found.values[name] for name in ("epoch", "args.model", "args.lr")} == {
        "epoch": 3,
        "args.model": "deit",
        "args.lr": 0.1,
    }
    for name, x in arrays().items():
        read = files.read(path)[f"state_dict.{name}"]
        np.testing.assert_array_equal(read, x.astype(np.float32) if name == "half" else x)
        assert read.shape == x.shape
    assert str(found) == "state_dict (5 arrays), args, epoch"


def test_classes_of_settings_are_inert_and_others_are_named(tmp_path):
    for module, name in (
        ("pytorch_lightning.utilities.parsing", "AttributeDict"),
        ("omegaconf.dictconfig", "DictConfig"),
        ("pathlib", "PosixPath"),
        ("numpy.core.multiarray", "scalar"),
    ):
        made = Made(Global(module, name), ("a",), {"kept": 1})
        path = torch_save(tmp_path / "w.pth", {"w": arrays()["whole"], "hyper_parameters": made})
        assert files.read_contents(path).values == {"hyper_parameters.kept": 1}
    for module, name in (("os", "system"), ("builtins", "eval"), ("pathlib", "Path.touch")):
        made = Made(Global(module, name), (str(tmp_path / "executed"),))
        path = torch_save(tmp_path / "w.pth", {"w": arrays()["whole"], "more": made})
        with pytest.raises(UserError, match=rf"w\.pth.* holds {module}\.{name}, .*state_dict\(\)"):
            files.read(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data/0": b"\0" * 8}, "storage 0 claims 24 bytes and holds 8"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": b"\x80\x02}q\x00"}, "cannot be read as weights"),
        ({"data.pkl": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."}, "cannot be read"),
        ({"data.pkl": b"\x80\x02}r" + struct.pack("<I", 2**31) + b"."}, "more objects than it"),
        ({"data.pkl": b"\x80\x02\x82\x01."}, "EXT1"),
        ({"data.pkl": b"\x80\x02N)R."}, "pickle is damaged"),
    ],
)
def test_damaged_and_lying_archives(tmp_path, changes, match):
    path = torch_save(tmp_path / "w.pth", {"w": arrays()["whole"]}, **changes)
    with pytest.raises(UserError, match=match):
        files.read(path)


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (7,), (1,)), (5, (2,), (1,)), (0, (3, 3), (0, 1)), (-1, (2,), (1,)), (0, (2,), (1, 1))],
)
def test_tensors_that_claim_more_than_their_storage(offset, shape, strides):
    storage = (lambda: bytes(24), np.dtype(np.float32), 24)
    with pytest.raises(ValueError, match=r"claims more|has the shape"):
        pytorch._tensor(storage, offset, shape, strides)


@pytest.mark.fault(3)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_archives_packed_otherwise_hold_the_same_numbers(tmp_path, method):
    path = torch_save(tmp_path / "w.pth", {"state_dict": arrays()})
    wanted = files.read(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    found = files.read(path)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_array_equal(found[name], x)


def test_views_are_read_as_such():
    values = np.arange(12, dtype=np.float32)
    storage = (values.tobytes, values.dtype, values.nbytes)
    found = np.asarray(pytorch._tensor(storage, 1, (2, 3), (1, 4)))
    np.testing.assert_array_equal(found, values.reshape(3, 4).T[1:3])


def test_containers_that_hold_one_another_end():
    content = {"a": arrays()["whole"]}
    content["self"] = content
    assert pytorch.flatten(content)[0] == {}
    shared = {}
    for _ in range(60):  # 2**60 paths
        shared = {"x": shared, "y": shared}
    assert pytorch.flatten(shared)[0] == {}


def test_a_zip_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("word/document.xml", "")
    with pytest.raises(UserError, match=r"not written by torch\.save.*word/document\.xml"):
        files.read(tmp_path / "w.pth")


def test_a_pickle_that_is_no_archive(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"before 1\.6"):
        files.read(tmp_path / "w.pth")


def test_pytorchs_own_files(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    content = {
        "plain": base,
        "transposed": base.T,
        "part": base[1:3, ::2],
        "parameter": torch.nn.Parameter(base[0]),
        "bfloat16": base.to(torch.bfloat16),
        "float16": base.half(),
        "float8": base.to(torch.float8_e4m3fn),
        "integers": base.long(),
        "number": torch.tensor(2.5),
    }
    torch.save({"model": content, "optimizer": {"state": {0: {"step": base}}}}, tmp_path / "w.pt")
    found = files.read(tmp_path / "w.pt")
    assert found.keys() == {*(f"model.{name}" for name in content), "optimizer.state.0.step"}
    for name, x in content.items():
        expected = x.detach().to(torch.float32).numpy()
        np.testing.assert_array_equal(found[f"model.{name}"].astype(np.float32), expected)
