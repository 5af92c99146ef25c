"""The kinds of files that the library reads: an example of each, its reader, and special cases.

`fuzz_files` damages the examples and reads them.
"""

import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import pickle
import shutil
import tarfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from safetensors.numpy import load_file, save_file

from msvit_jax import checkpoint, sharding
from msvit_jax import config as configs
from msvit_jax.data import prepare_masks, sources
from msvit_jax.errors import UserError
from msvit_jax.exits.budget_curve import FITTED_FILE, fitted_thresholds
from msvit_jax.export import Options, write
from msvit_jax.export import run as runner
from msvit_jax.inference import Predictor
from msvit_jax.train_state import TrainState
from msvit_jax.tree import flat_names
from tests import tiny_run
from tests.export import made
from tests.weights.saved import Global, Made, torch_save
from tools import mutations

MODEL = "vit_tiny_patch16_224"
GATED = "msvit_tiny_patch16_224"
PIXELS = made.images(2)
MARKER = "executed"  # file that a pickle would write into the current folder
Folder = pathlib.Path
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a reader made of a file.

    Attributes:
      values: Arrays and settings by name.
      use: Function that computes something with them; its result must be finite.
    """

    values: Values
    use: Callable[[], np.ndarray] = lambda: np.zeros(0)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      share: Share of all cases, in percent.
      make: Function that writes the example into a folder.
      read: Function that reads the example in a folder as a command does.
      special: Cases that are made by hand: functions that change the folder, by what they do.
      raised: Errors that the kind's command turns into one line.
    """

    share: int
    make: Callable[[Folder], None]
    read: Callable[[Folder], Answer]
    special: dict[str, Callable[[Folder], Any]] = dataclasses.field(default_factory=dict)
    raised: tuple[type[Exception], ...] = (UserError, OSError)


def _predictor(path: Folder, model: Any = None) -> Answer:
    """Loads a run or weights as `predict` does."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    predictor = Predictor.load(path, model=model, batch_size=2, mesh=mesh)
    given = (predictor.model, predictor.class_names, predictor.crop, predictor.exif_orientation)
    arrays = flat_names(predictor._executables._variables["params"])
    return Answer({**arrays, "given": repr(given)}, lambda: predictor(PIXELS).logits)


def _plain_model() -> Any:
    return made.source(MODEL).model


def _write(form: str, name: str, file: str, **options: Any) -> Callable[[Folder], None]:
    return lambda folder: write(made.source(name), form, folder / file, Options(**options)) and None


def _make_pytorch(folder: Folder) -> None:
    write(made.source(MODEL), "timm", folder / "w.safetensors")
    arrays = load_file(folder / "w.safetensors")
    (folder / "w.safetensors").unlink()
    torch_save(folder / "w.pth", {"state_dict": arrays, "epoch": 3, "args": {"lr": 0.1}})


def _make_parts(folder: Folder) -> None:
    """A directory by transformers whose weights are in two files."""
    write(made.source(MODEL), "huggingface", folder / "made")
    for file in (folder / "made").iterdir():
        file.rename(folder / file.name)
    (folder / "made").rmdir()
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(arrays), {}
    for part in range(2):
        file = folder / f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: arrays[name] for name in names[part::2]}, file, {"format": "pt"})
        where |= dict.fromkeys(names[part::2], file.name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _make_run(folder: Folder) -> None:
    """A run's workdir with one checkpoint."""
    config = configs.resolve(tiny_run.config(data__data_dir="nowhere"), len(tiny_run.CLASSES))
    model = configs.build_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    dice = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(dice.normal(size=x.shape), x.dtype), shapes)
    checkpoint.claim_workdir(folder, config)
    about = {"config": config.to_dict(), "class_names": list(tiny_run.CLASSES)}
    about |= {"mean": list(model.mean), "std": list(model.std)}
    saved = checkpoint.Checkpoints(folder, about=about)
    saved.save(TrainState(jnp.int32(7), {"model": params, "gate_loss": {}}, ()), 7, {"top1": 50.0})
    saved.close()


def _read_compiled(folder: Folder) -> Answer:
    model = runner.Model(folder / "out")
    given = {k: v for k, v in model.about.items() if k in ("class_names", "crop", "threshold")}
    answers = model.classify(PIXELS)
    return Answer({**answers, "given": repr(given)}, lambda: answers["logits"])


def _make_data(folder: Folder) -> None:
    shutil.copytree(pathlib.Path(tiny_run.data_dir()) / "tiny", folder / "tiny")


def _read_data(folder: Folder) -> Answer:
    builder = sources.open_dataset("tiny", str(folder))
    values: Values = {"classes": repr(sources.class_names(builder))}
    for split in ("train", "validation"):
        for example in sources.open_split(builder, split).in_order():
            image = hashlib.sha1(example["image"]).hexdigest()
            values[f"{split}{example['index']}"] = (image, example["label"])
    return Answer(values)


def _make_thresholds(folder: Folder) -> None:
    rows = [{"budget": x, "thresholds": [x, 0.5], "top1": 50.0} for x in (0.2, 0.4, 0.8)]
    (folder / FITTED_FILE).write_text(json.dumps(rows))


def _make_classes(folder: Folder) -> None:
    said = {"classes": ["road", "sky"], "ignore_label": 255, "palette": [[1, 2, 3], [4, 5, 6]]}
    (folder / "classes.json").write_text(json.dumps(said))


def _read_classes(folder: Folder) -> Answer:
    found = prepare_masks.read_classes(str(folder / "classes.json"))
    palette = () if found.palette is None else np.flatnonzero(found.palette >= 0)
    return Answer({"classes": repr(found.classes), "palette": np.asarray(palette)})


def _read_npy(folder: Folder) -> Answer:
    about = {"image_size": made.SIDE, "pixels": "uint8"}
    images = dict(runner.read_npy(str(folder / "pixels.npy"), about))
    for pixels in images.values():
        if isinstance(pixels, str):
            raise ValueError(pixels)
    return Answer({pathlib.Path(name).name: pixels for name, pixels in images.items()})


# Pickles that would do something if they were run.
_HARMFUL = {
    "os.system": Made(Global("os", "system"), (f"touch {MARKER}",)),
    "posix.system": Made(Global("posix", "system"), (f"touch {MARKER}",)),
    "exec": Made(Global("builtins", "exec"), (f"open('{MARKER}', 'w')",)),
    "eval of Python 2": Made(Global("__builtin__", "eval"), (f"open('{MARKER}', 'w')",)),
    "open": Made(Global("builtins", "open"), (MARKER, "w")),
    "io.open": Made(Global("io", "open"), (MARKER, "w")),
    "subprocess": Made(Global("subprocess", "Popen"), (("touch", MARKER),)),
    "runpy": Made(Global("runpy", "run_path"), ("setup.py",)),
    "import": Made(Global("importlib", "import_module"), ("antigravity",)),
    "getattr": Made(Global("builtins", "getattr"), (Global("os", "path"), "join")),
    "a known class's method": Made(Global("pathlib.Path", "touch"), (MARKER,)),
    "a class's method by dots": Made(Global("pathlib", "Path.touch"), (MARKER,)),
    "a method of a module below": Made(Global("datetime", "sys.modules"), ()),
    "a module beside torch's": Made(Global("torch.hub", "load"), ("x", "y")),
    "torch.load": Made(Global("torch", "load"), ("x",)),
    "webbrowser": Made(Global("webbrowser", "open"), ("http://localhost:9",)),
    "shutil": Made(Global("shutil", "rmtree"), (".",)),
    "a state for a function": Made(Global("builtins", "print"), ("x",), {"__globals__": {}}),
    "numpy.load": Made(Global("numpy", "load"), ("x",)),
    "ctypes": Made(Global("ctypes", "CDLL"), ("libc.so.6",)),
}


def _harmful(folder: Folder, content: Any) -> None:
    torch_save(folder / "w.pth", {"state_dict": {"a": np.ones(3, np.float32)}, "extra": content})


def _strided(folder: Folder, count: int) -> None:
    """One number that claims to be many, by strides of 0."""
    body = (
        b"\x80\x02}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00"
        + pickle.dumps((count,), 2)[2:-1]
        + b"K\x00\x85\x89}tRu."
    )
    members = {"data.pkl": body, "byteorder": b"little", "version": b"3\n", "data/0": b"\0\0\x80?"}
    (folder / "w.pth").write_bytes(
        mutations.packed([(f"archive/{name}", x) for name, x in members.items()])
    )


def _pickled(folder: Folder, program: bytes) -> None:
    """A PyTorch file whose pickle is another program."""
    contents = mutations.members((folder / "w.pth").read_bytes())
    main = next(name for name in contents if name.endswith("data.pkl"))
    (folder / "w.pth").write_bytes(mutations.packed(list({**contents, main: program}.items())))


def _repacked(folder: Folder, file: str, method: int) -> None:
    contents = mutations.members((folder / file).read_bytes())
    (folder / file).write_bytes(mutations.packed(list(contents.items()), method))


def _legacy(folder: Folder) -> None:
    (folder / "w.pth").write_bytes(pickle.dumps({"a": [1.0]}) * 3)


def _legacy_tar(folder: Folder) -> None:
    with tarfile.open(folder / "w.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO(b""))


def _bomb(folder: Folder, size: int) -> None:
    """An archive that unpacks to as many zeros as the allowed ratio lets pass, or more."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros(size // 4, np.float32))
    dice = np.random.default_rng(0).bytes(size // 110)
    contents = [("a.npy", buffer.getvalue())]
    packed = mutations.packed(contents, 8)
    (folder / "w.npz").write_bytes(packed if size > 2**28 else packed + dice)


def _declared(folder: Folder, **changes: Any) -> None:
    """Changes what our own file says of its model."""
    file = folder / "w.safetensors"
    header, numbers = mutations.split_safetensors(file.read_bytes())
    entries = json.loads(header)
    about = json.loads(entries["__metadata__"]["msvit_jax"])
    for key, value in changes.items():
        (about if key in about and key not in ("mean", "std") else about["model"])[key] = value
    entries["__metadata__"]["msvit_jax"] = json.dumps(about)
    file.write_bytes(mutations.join_safetensors(json.dumps(entries).encode(), numbers))


def _json_change(folder: Folder, file: str, keys: tuple[Any, ...], value: Any) -> None:
    path = folder / file
    whole = json.loads(path.read_text())
    functools.reduce(lambda x, key: x[key], keys[:-1], whole)[keys[-1]] = value
    path.write_text(json.dumps(whole))


def _zarr(folder: Folder, **changes: Any) -> None:
    """Changes what a checkpoint says of one of its arrays, past all checksums of its files."""
    base = (folder / "checkpoints" / "7" / "model").absolute()
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{base}"}).result()
    keys = [key for key in store.list().result() if key.endswith((b".zarray", b"zarr.json"))]
    header = json.loads(store.read(keys[0]).result().value)
    store.write(keys[0], json.dumps({**header, **changes}).encode()).result()


_WRONG = {  # what a description may say of a model that no model has
    "depth": (10**9, 0, -1, 2.5, None, "12"),
    "width": (10**9, 0, -16, 17),
    "heads": (0, 3, 10**9),
    "image_size": (10**9, 0, 17),
    "patch_size": (0, 10**6),
    "num_classes": (10**9, -1),
    "norm_epsilon": (-1.0, float("nan")),
    "std": ([0.0] * 3, [float("nan")] * 3, [1.0]),
    "mean": ([float("inf")] * 3, "0.5"),
    "threshold": (float("nan"), 2.0),
    "crop": (0, -1, 7, "x", float("nan")),
    "class_names": (5, "abc", [1, 2, 3], [[], {}, None], {"a": 1}),
    "dtype": ("int32", "nothing", 7, "float32\n"),
}


_WRONG_BESIDE = (
    ("config.json", "num_hidden_layers", 10**9),
    ("config.json", "num_attention_heads", 0),
    ("config.json", "layer_norm_eps", -1),
    ("config.json", "patch_size", 0),
    ("config.json", "id2label", {"0": []}),
    ("preprocessor_config.json", "image_std", [0, 0, 0]),
    ("preprocessor_config.json", "image_mean", [None] * 3),
    ("preprocessor_config.json", "size", {"shortest_edge": 10**12}),
    ("model.safetensors.index.json", "weight_map", {"a": "/etc/passwd"}),
)


def _each_wrong() -> dict[str, Callable[[Folder], Any]]:
    return {
        f"{key}={value!r}": functools.partial(_declared, **{key: value})
        for key, values in _WRONG.items()
        for value in values
    }


def _programs() -> dict[str, bytes]:
    return {
        "claims a huge text": b"\x80\x02\x8d" + (2**40).to_bytes(8, "little") + b"x.",
        "claims a huge number": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"x.",
        "claims huge bytes": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
        "claims a huge frame": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b".",
        "claims a huge memo": b"\x80\x02Nr" + (2**31).to_bytes(4, "little") + b".",
        "nests deeply": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "is no program": b"\xff" * 64,
        "takes from an empty stack": b"\x80\x02a.",
        "is a number": b"\x80\x02K\x07.",
        "holds itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        "has lists as keys": b"\x80\x02}(]K\x01u.",
    }


KINDS: dict[str, Kind] = {
    "ours": Kind(
        14,
        _write("safetensors", GATED, "w.safetensors"),
        lambda folder: _predictor(folder / "w.safetensors"),
        _each_wrong(),
    ),
    "timm": Kind(
        8,
        _write("timm", MODEL, "w.safetensors"),
        lambda folder: _predictor(folder / "w.safetensors", _plain_model()),
    ),
    "big_vision": Kind(
        11,
        _write("big_vision", MODEL, "w.npz"),
        lambda folder: _predictor(folder / "w.npz", _plain_model()),
        {
            "deflated": lambda folder: _repacked(folder, "w.npz", 8),
            "a bomb of 256 MB": lambda folder: _bomb(folder, 2**28),
            "a bomb of 1 GB": lambda folder: _bomb(folder, 2**30),
        },
    ),
    "pytorch": Kind(
        15,
        _make_pytorch,
        lambda folder: _predictor(folder / "w.pth", _plain_model()),
        {
            **{
                name: functools.partial(_harmful, content=content)
                for name, content in _HARMFUL.items()
            },
            **{
                f"a pickle that {name}": functools.partial(_pickled, program=program)
                for name, program in _programs().items()
            },
            "a number that claims to be 1e9": lambda folder: _strided(folder, 10**9),
            "a number that claims to be 1e10": lambda folder: _strided(folder, 10**10),
            "deflated": lambda folder: _repacked(folder, "w.pth", 8),
            "packed by bzip2": lambda folder: _repacked(folder, "w.pth", 12),
            "a pickle alone": _legacy,
            "a tar archive": _legacy_tar,
        },
    ),
    "transformers": Kind(
        13,
        _make_parts,
        _predictor,
        {
            f"{file}: {key}={value!r}": functools.partial(
                _json_change, file=file, keys=(key,), value=value
            )
            for file, key, value in _WRONG_BESIDE
        },
    ),
    "run": Kind(
        16,
        _make_run,
        _predictor,
        {
            "an array that claims 8 GB": lambda folder: _zarr(folder, shape=[2**31]),
            "chunks that claim 8 GB": lambda folder: _zarr(folder, chunks=[2**31]),
            "an unknown type of numbers": lambda folder: _zarr(folder, dtype="<q9"),
            **{
                f"depth={value!r}": functools.partial(
                    _json_change, file="config.json", keys=("model", "depth"), value=value
                )
                for value in _WRONG["depth"]
            },
        },
    ),
    "compiled": Kind(
        9,
        _write("compiled", GATED, "out"),
        _read_compiled,
        raised=(ValueError, OSError),
    ),
    "data set": Kind(8, _make_data, _read_data),
    "thresholds": Kind(
        2, _make_thresholds, lambda folder: Answer({"": repr(fitted_thresholds(folder, 0.5))})
    ),
    "classes of masks": Kind(2, _make_classes, _read_classes),
    "pixels": Kind(
        2,
        lambda folder: np.save(folder / "pixels.npy", PIXELS),
        _read_npy,
        raised=(ValueError, OSError),
    ),
}
