"""Files as `torch.save` writes them, from NumPy arrays and without PyTorch."""

import io
import pickle
import zipfile
from typing import ClassVar

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}


class Global:
    """Something that a pickle names."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Made:
    """What a pickle makes by calling something that it names, and then gives a state."""

    def __init__(self, function, arguments=(), state=None):
        self.function, self.arguments, self.state = function, arguments, state


def namespace(**settings):
    return Made(Global("argparse", "Namespace"), (), settings)


class _Pickler(pickle._Pickler):
    """The pickler in Python, whose types can be taught."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages = []

    def save_global_name(self, named):
        self.write(b"c" + f"{named.module}\n{named.name}\n".encode())

    def save_made(self, made):
        self.save(made.function)
        self.save(made.arguments)
        self.write(pickle.REDUCE)
        if made.state is not None:
            self.save(made.state)
            self.write(pickle.BUILD)

    def save_array(self, x):
        self.storages.append(np.ascontiguousarray(x).tobytes())
        kind, key = Global("torch", STORAGES[x.dtype]), str(len(self.storages) - 1)
        strides = tuple(s // x.itemsize for s in np.ascontiguousarray(x).strides[: x.ndim])
        self.save(Global("torch._utils", "_rebuild_tensor_v2"))
        self.write(pickle.MARK)
        self.save(("storage", kind, key, "cpu", x.size))
        self.write(pickle.BINPERSID)
        for argument in (0, x.shape, strides, False, {}):
            self.save(argument)
        self.write(pickle.TUPLE + pickle.REDUCE)

    dispatch[Global] = save_global_name
    dispatch[Made] = save_made
    dispatch[np.ndarray] = save_array


def torch_save(path, content, **changes):
    """Writes an object with arrays as tensors; `changes` are members to write otherwise."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    members = {"data.pkl": pickled.getvalue(), "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{i}": x for i, x in enumerate(pickler.storages)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, x in {**members, **changes}.items():
            archive.writestr(f"archive/{name}", x)
    return path
