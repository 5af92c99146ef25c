"""Ownership of a workdir by one run at a time, the run that trains in it.

The owner keeps the file `owner.json` and updates it every few seconds as a sign of life. On one
machine a lock of the kernel (`flock`) decides, which is gone as soon as its process is, however
that ended. Between machines, where a file system may have no such locks, and at addresses, an owner
that is silent for a minute counts as gone. Clocks are not compared: what counts is whether the file
changes while it is watched.
"""

import contextlib
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from msvit_jax import paths, peers
from msvit_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: the owner's signs of life alone decide
    fcntl = None  # type: ignore[assignment]

FILE = "owner.json"
_BEAT = 15.0  # seconds between signs of life
_PATIENCE = 4  # missed signs of life after which an owner counts as gone
_SETTLE = 2.0  # seconds within which a process that starts at the same time has written
_SIZE = 1024  # fixed bytes of the file, which is written in place


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
    """Owns a workdir; all processes of one run own it together, by their first one.

    Args:
      workdir: Directory to own; made where it is missing.

    Raises:
      UserError: Another run owns it, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        peers.on_first_process(lambda: held.enter_context(_hold(workdir)))
        yield


@contextlib.contextmanager
def _hold(workdir: pathlib.Path) -> Iterator[None]:
    paths.check_writable(workdir)
    us = _Claim(workdir)
    try:
        us.take()
        ended = threading.Event()
        beats = threading.Thread(target=us.beat, args=(ended,), daemon=True, name="owner")
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
            us.release()
    finally:
        us.close()


class _Claim:
    """Claim of this process on a workdir."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self._workdir, self._path = workdir, workdir / FILE
        self._descriptor: int | None = None
        self._beats = 0
        self._about = {
            "token": uuid.uuid4().hex,
            "machine": _machine(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "command": " ".join(sys.argv)[:300],
        }

    def take(self) -> None:
        """Becomes the owner.

        Raises:
          UserError: There is another.
        """
        locked = None if paths.is_address(self._path) else self._lock()
        found = self._read()
        if locked is False:
            raise self._refusal(found)
        if found and not self._gone(found, locked is True):
            raise self._refusal(self._read() or found)
        self._write()
        if not locked:
            time.sleep(_SETTLE)
            if self._token(self._read()) != self._about["token"]:
                raise self._refusal(self._read())

    def _lock(self) -> bool | None:
        """Takes the kernel's lock and returns whether that worked; None where there is none."""
        while True:
            self.close()
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            if fcntl is None:
                return None
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # several kinds, from file systems without locks
                return None
            # An owner that ends removes the file, and a lock on a removed file does not count.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                    return True

    def _gone(self, found: dict[str, Any], locked: bool) -> bool:
        """Tells whether the owner that a file names no longer runs."""
        if locked and found.get("host") == self._about["host"]:  # perhaps it restarted since
            return True
        if found.get("machine") == self._about["machine"]:
            pid = found.get("pid")
            if not (isinstance(pid, int) and paths.is_running(pid)):
                return True
        print(
            f"{self._workdir} was in use by process {found.get('pid')} on {found.get('host')}; "
            f"waiting up to {_BEAT * _PATIENCE:.0f} s for a sign of it.",
            file=sys.stderr,
            flush=True,
        )
        for _ in range(_PATIENCE * 4):
            time.sleep(_BEAT / 4)
            now = self._read()
            if not now:
                return True  # it ended
            if now != found:
                return False
        return True

    def _refusal(self, found: dict[str, Any]) -> UserError:
        who = "another run"
        if found:
            who = (
                f"process {found.get('pid')} on {found.get('host')}, which trains in it since "
                f"{found.get('since')} ({found.get('command')})"
            )
        return UserError(
            f"{str(self._workdir)!r} is in use by {who}. Wait until it has ended, stop it, or use "
            "another --workdir."
        )

    def beat(self, ended: threading.Event) -> None:
        """Gives signs of life until `ended`."""
        while not ended.wait(_BEAT):
            self._beats += 1
            # A back end's occasional failure must not end a run.
            with contextlib.suppress(Exception):
                owner = self._token(self._read())
                if owner not in (None, self._about["token"]):
                    _lost(self._workdir)
                self._write()

    def release(self) -> None:
        """Removes the file, if it is still ours."""
        with contextlib.suppress(Exception):
            if self._token(self._read()) == self._about["token"]:
                self._path.unlink()

    def close(self) -> None:
        """Lets go of the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self) -> None:
        text = json.dumps({**self._about, "beats": self._beats})
        if self._descriptor is None:
            self._path.write_text(text)
        else:
            with paths.named(self._path):
                os.pwrite(self._descriptor, text.encode().ljust(_SIZE), 0)

    def _read(self) -> dict[str, Any]:
        """Reads the file; returns an empty dict if it is missing or was cut short."""
        try:
            found = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @staticmethod
    def _token(found: dict[str, Any]) -> str | None:
        return found.get("token")


@functools.cache
def _machine() -> str:
    """Names this machine since its boot, and the namespace that its process numbers belong to."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _lost(workdir: pathlib.Path) -> None:
    """Ends the process at once, because its writes would mix with another run's."""
    print(
        f"error: {str(workdir)!r} was taken over by another run while this one gave no sign of "
        "life (it was suspended, perhaps). This one ends; the other goes on from its checkpoints.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
