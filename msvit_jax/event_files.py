"""TensorBoard's event files, written where `paths` can write, without disturbing a run.

tensorboardX writes in a thread of its own: an error there, of a full disk for instance, would end
that thread with a traceback and make the run wait for it forever. Here events that cannot be
written are given up with one warning; the run's record is `metrics.jsonl`.
"""

import sys
from typing import Any

from tensorboardX import SummaryWriter, record_writer

from msvit_jax import paths
from msvit_jax.errors import describe

_PREFIX = "msvit-jax"


def writer(folder: paths.PathLike) -> SummaryWriter:
    """Opens a folder for events.

    Args:
      folder: Local folder or address; made where it is missing.
    """
    return SummaryWriter(f"{_PREFIX}:{paths.absolute(folder)}")


class _EventFile:
    """One file of events; at an address it is rewritten with each flush."""

    def __init__(self, path: str) -> None:
        self._path = paths.parse(path)
        self._whole = bytearray()
        self._file: Any = None
        if not paths.is_address(self._path):
            self._file = self._path.open("wb", buffering=0)
        self._given_up = False

    def write(self, data: bytes) -> None:
        self._try(
            lambda: self._whole.extend(data) if self._file is None else self._file.write(data)
        )

    def flush(self) -> None:
        self._try(self._flush)

    def _flush(self) -> None:
        if self._file is None:
            self._path.write_bytes(bytes(self._whole))

    def close(self) -> None:
        self._try(self._flush)
        if self._file is not None:
            self._try(self._file.close)

    def _try(self, action: Any) -> None:
        if self._given_up:
            return
        try:
            action()
        except Exception as error:  # of many types at addresses
            self._given_up = True
            self._whole.clear()
            print(
                f"warning: TensorBoard events cannot be written to {self._path} any more "
                f"({describe(error)}); the run goes on without them.",
                file=sys.stderr,
                flush=True,
            )


class _Factory:
    """Opens files for tensorboardX; paths come with our prefix."""

    def open(self, path: str) -> _EventFile:
        return _EventFile(path.removeprefix(f"{_PREFIX}:"))

    def directory_check(self, path: str) -> None:
        paths.parse(path.removeprefix(f"{_PREFIX}:")).mkdir(parents=True, exist_ok=True)


record_writer.register_writer_factory(_PREFIX, _Factory())
