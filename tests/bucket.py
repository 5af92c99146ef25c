"""A gs:// bucket that is a folder: epath's and Orbax's own code runs, down to the file system."""

import contextlib
import os
import pathlib
import re
from unittest import mock

from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils

from msvit_jax import paths


class _Folder(backend._OsPathBackend):
    """Turns gs://bucket/name into root/bucket/name, and names that are listed back."""

    def __init__(self, root):
        self.root = pathlib.Path(root)

    def local(self, path):
        match = re.fullmatch(r"gs://(.*)", os.fspath(path))
        return os.fspath(self.root / match[1]) if match else os.fspath(path)

    def open(self, path, mode):
        if "w" in mode:  # a store has no folders that would have to be made
            os.makedirs(os.path.dirname(self.local(path)), exist_ok=True)
        assert "a" not in mode, "objects cannot be added to"
        return super().open(self.local(path), mode)

    def glob(self, path):
        found = super().glob(self.local(path))
        return [f"gs://{pathlib.Path(name).relative_to(self.root)}" for name in found]

    def rename(self, path, dst):
        super().rename(self.local(path), self.local(dst))

    def replace(self, path, dst):
        super().replace(self.local(path), self.local(dst))

    def copy(self, path, dst, overwrite):
        super().copy(self.local(path), self.local(dst), overwrite)


def _translated(name):
    def call(self, path, *arguments, **options):
        return getattr(super(_Folder, self), name)(self.local(path), *arguments, **options)

    return call


for _name in ("exists", "isdir", "listdir", "makedirs", "mkdir", "rmtree", "remove", "stat"):
    setattr(_Folder, _name, _translated(_name))


@contextlib.contextmanager
def bucket(root):
    """Makes gs:// addresses lie in a folder."""
    folder = _Folder(root)
    driver = lambda path: {"driver": "file", "path": folder.local(path)}  # noqa: E731
    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (gpath, "_is_tf_installed", lambda: False),
            (gcs_utils, "get_kvstore_for_gcs", driver),
            (gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(mock.patch.dict(gpath._PREFIX_TO_BACKEND, {"gs": folder}))
        stack.enter_context(mock.patch.dict(paths.BACK_ENDS, {"gs": "json"}))
        yield folder
