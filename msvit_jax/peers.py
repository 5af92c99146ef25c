"""The processes of one job: they join, agree on what they do, and none waits for one that is gone.

They tell each other texts through the service that `jax.distributed` runs on process 0. JAX has no
public name for it, so this module alone knows where it is.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed

import msvit_jax
from msvit_jax import guard
from msvit_jax.errors import UserError, describe

_ENDED = "msvit_jax/ended"  # key under which a process that fails leaves why
_LOOK_EVERY = 1.0  # seconds between looks for it
_SLOWEST = 600.0  # seconds that processes may be apart when they tell each other something
_RESUME = "The same command on all of them goes on from the last checkpoint."
_LOST = re.compile(r"Gloo|NCCL|peer|Socket|UNAVAILABLE|DEADLINE_EXCEEDED|coordination", re.I)
_topics: dict[str, "itertools.count[int]"] = {}


class _Job:
    """Settings of the job that this process has joined."""

    timeout = 60.0
    leaving = False


def joined() -> bool:
    """Tells whether this process belongs to a job that several processes may belong to."""
    return jax.distributed.is_initialized()


def join(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    timeout: int,
) -> None:
    """Joins the other processes of a job.

    From here on the program runs in a child process (`guard.supervise`).

    Args:
      coordinator: host:port of process 0; None on clusters that JAX knows, for the three of them.
      count: Number of processes.
      index: Index of this process, from 0.
      timeout: Seconds to wait for the others, and without a sign of life of one of them until it
        counts as gone.

    Raises:
      UserError: The address, the count or the index is wrong, or the others cannot be joined.
    """
    options: dict[str, Any] = {
        "initialization_timeout": timeout,
        "heartbeat_timeout_seconds": timeout,
    }
    if coordinator is not None and count is not None and index is not None:
        _check(coordinator, count, index)
        options |= {"coordinator_address": coordinator, "num_processes": count}
        options |= {"process_id": index, "cluster_detection_method": "deactivate"}
    guard.supervise(functools.partial(explain, coordinator=coordinator, timeout=timeout))
    _Job.timeout = timeout
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError, OSError) as error:
        why = explain(str(error), coordinator=coordinator, timeout=timeout) or describe(error)
        raise UserError(f"The other processes could not be joined: {why}") from error
    threading.Thread(target=_watch, daemon=True, name="peers").start()


def _check(coordinator: str, count: int, index: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: host:port is needed, such as 10.0.0.1:8476.")
    if count < 1:
        raise UserError(f"--process_count={count}: at least 1 is needed.")
    if not 0 <= index < count:
        raise UserError(
            f"--process_index={index} with --process_count={count}: indices go from 0 to "
            f"{count - 1}, a different one for each process."
        )
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UserError(f"--coordinator={coordinator}: {host!r} is not known here.") from error
    if index == 0:
        _check_port(coordinator, int(port))


def _check_port(coordinator: str, port: int) -> None:
    with socket.socket(socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator={coordinator}: port {port} is taken on this machine; is there "
                "another process with --process_index=0? Take another port for all processes."
            ) from error


def explain(said: str, *, coordinator: str | None, timeout: int) -> str:
    """Says in one line what JAX's messages about other processes mean; '' for other messages."""
    gone = re.search(r"unhealthy \(stopped sending heartbeats\)[^:]*:\s*([\d,\s/a-z:_-]*)", said)
    if gone:
        which = ", ".join(re.findall(r"\d+", gone[1])) or "?"
        return f"process {which} ended, or was silent for {timeout} s; so does this one. {_RESUME}"
    if re.search(
        r"duplicate|ALREADY_EXISTS|different incarnation|already.*(register|connect)", said
    ):
        return "another process has the same --process_index; each needs one of its own."
    if "RegisterTask" in said or ("DEADLINE_EXCEEDED" in said and "Barrier" not in said):
        where = f" at {coordinator}" if coordinator else ""
        return (
            f"process 0{where} and all others have to be there within {timeout} s of each other, "
            "and were not. Start all of them with the same --coordinator and --process_count, each "
            "with its own --process_index; --peer_timeout gives them longer."
        )
    if re.search(r"leader|Socket closed|Failed to send RPC|UNAVAILABLE", said):
        return f"process 0 ended, or cannot be reached any more; so does this one. {_RESUME}"
    return ""


def exchange(topic: str, said: str) -> list[str]:
    """Tells all processes a text; all call this together, as they do a collective.

    Args:
      topic: Name of what it is about.
      said: Text of this process.

    Returns:
      The texts of all processes, by index.
    """
    if not joined():
        return [said]
    state = distributed.global_state
    number = next(_topics.setdefault(topic, itertools.count()))
    key = f"msvit_jax/{topic}/{number}"
    _client().key_value_set(f"{key}/{state.process_id}", said)
    return [_get(f"{key}/{index}", index) for index in range(state.num_processes)]


def _get(key: str, index: int) -> str:
    end = time.monotonic() + _SLOWEST
    while True:
        try:  # briefly, because nothing interrupts it
            return _client().blocking_key_value_get(key, 1000)
        except Exception as error:
            if "DEADLINE" not in str(error):
                raise
            if time.monotonic() > end:
                raise UserError(
                    f"Process {index} has not caught up with the others after {_SLOWEST:.0f} s; "
                    "look at its output."
                ) from error


def _client() -> Any:
    return distributed.global_state.client


def agree(facts: Mapping[str, Any]) -> None:
    """Checks that all processes say the same; all call it before anything is computed.

    The code's version, JAX's, and the number of processes are compared as well.

    Args:
      facts: JSON values by name.

    Raises:
      UserError: They differ; each process names what.
    """
    if not joined():
        return
    state = distributed.global_state
    ours = json.loads(
        json.dumps(
            {
                "msvit_jax": f"{msvit_jax.__version__} (sources {_sources()})",
                "jax": jax.__version__,
                "process_count": state.num_processes,
                **facts,
            },
            default=str,
        )
    )
    for index, text in enumerate(exchange("agreement", json.dumps(ours))):
        theirs = json.loads(text)
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if names:
            raise UserError(
                f"All processes need the same settings, but process {index} has others:"
                + "".join(
                    f"\n  {name}: {ours.get(name)!r} on process {state.process_id}, "
                    f"{theirs.get(name)!r} on process {index}"
                    for name in names
                )
            )


@functools.cache
def _sources() -> str:
    folder = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def on_first_process(action: Callable[[], Any]) -> None:
    """Runs an action on process 0; if it fails there, all processes raise the same error.

    Raises:
      UserError: The action raised a UserError or an error of the operating system.
    """
    failed = ""
    if jax.process_index() == 0:
        try:
            action()
        except (UserError, OSError) as error:
            if not joined():
                raise
            failed = str(error) if isinstance(error, UserError) else describe(error)
    if failed := exchange("first", failed)[0]:
        raise UserError(failed)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends all processes of a job where one fails: the others are told why, and do not wait."""
    try:
        yield
    except BaseException as error:
        if not joined() or (isinstance(error, SystemExit) and not error.code):
            raise
        _leave(error)


def _leave(error: BaseException) -> NoReturn:
    """Ends this process without waiting for the others, as JAX would at a normal end."""
    _Job.leaving = True
    if isinstance(error, UserError | OSError):
        text = str(error) if isinstance(error, UserError) else describe(error)
    elif isinstance(error, Exception) and _LOST.search(str(error)):
        # JAX knows soon which process is gone, and ends this one; or that process says why.
        _Job.leaving = False
        time.sleep(1.5 * _Job.timeout)
        text = f"the connection to other processes was lost ({describe(error)}). {_RESUME}"
    elif isinstance(error, KeyboardInterrupt | SystemExit):
        text = "it was interrupted"
    else:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {describe(error)}"
    _tell(text)
    print(f"error: {text}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed.global_state.process_id == 0:
        time.sleep(3 * _LOOK_EVERY)  # the others ask this process why
    os._exit(2)


def _tell(why: str) -> None:
    """Leaves for the others why this process ends."""
    said = json.dumps({"index": distributed.global_state.process_id, "why": why})
    with contextlib.suppress(Exception):  # another one was first, or process 0 is gone
        _client().key_value_set(_ENDED, said)


def _watch() -> None:
    """Ends this process once another one has left why it ended."""
    ours = distributed.global_state.process_id
    while True:
        time.sleep(_LOOK_EVERY)
        try:
            found = json.loads(_client().key_value_try_get(_ENDED))
        except Exception:  # not there yet, or the job is over
            continue
        if found["index"] != ours and not _Job.leaving:
            print(f"error: process {found['index']} ended: {found['why']}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(2)
