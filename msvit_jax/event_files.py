"""TensorBoard's event files, written where `paths` can write, without disturbing a run.

Not tensorboardX's own writer, but its parts: that writer keeps events in a queue, where a killed
run loses them. Events that cannot be written are given up with one warning; the run's record is
`metrics.jsonl`.
"""

import os
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboardX import event_file_writer, record_writer, summary
from tensorboardX.proto.event_pb2 import Event

from msvit_jax import paths
from msvit_jax.errors import describe

_PREFIX = "msvit-jax"


class Board:
    """Writes events into one new file of a folder, each at once."""

    def __init__(self, folder: paths.PathLike) -> None:
        """Opens a file.

        Args:
          folder: Local folder or address; made where it is missing.
        """
        # The name has the time in seconds: a run resumed at once would write over its own events.
        suffix = f".{os.getpid()}.{time.monotonic_ns()}"
        place = paths.absolute(folder)
        place.mkdir(parents=True, exist_ok=True)
        prefix = f"{_PREFIX}:{place}/events"
        self._events = event_file_writer.EventsWriter(prefix, suffix)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Writes a figure of a step."""
        self._add(summary.scalar(name, value), step)

    def add_image(
        self, name: str, picture: np.ndarray, step: int, dataformats: str = "CHW"
    ) -> None:
        """Writes a picture: uint8, or float32 from 0 to 1."""
        self._add(summary.image(name, picture, dataformats=dataformats), step)

    def _add(self, content: Any, step: int) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=content))

    def flush(self) -> None:
        """Makes all events visible; matters at addresses alone."""
        self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


def cut_back(folder: paths.PathLike, step: int) -> None:
    """Removes events of steps after `step`, which a resumed run writes again."""
    place = paths.absolute(folder)
    for file in sorted(place.glob("events.*")) if place.is_dir() else []:
        data = file.read_bytes()
        kept = b"".join(record for event, record in _records(data) if event.step <= step)
        if kept != data:
            paths.write_whole(file, kept)


def _records(data: bytes) -> Iterator[tuple[Event, bytes]]:
    """Yields events and their bytes; ends at a torn or damaged one."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        end = at + 12 + length + 4
        if end > len(data):
            return
        try:
            event = Event.FromString(data[at + 12 : end - 4])
        except DecodeError:
            return
        yield event, data[at:end]
        at = end


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
            self._file.close()  # writes nothing: the file has no buffer

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
    """Opens files for tensorboardX; their paths come with our prefix."""

    def open(self, path: str) -> _EventFile:
        return _EventFile(path.removeprefix(f"{_PREFIX}:"))


record_writer.register_writer_factory(_PREFIX, _Factory())
