import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from msvit_jax import paths, peers
from msvit_jax.errors import UserError
from msvit_jax.train import owner
from tests.bucket import bucket

HOLDER = """
import pathlib, sys
from msvit_jax.train import owner
with owner.hold(pathlib.Path(sys.argv[1])):
    print("owned", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def quick(monkeypatch):
    """Signs of life within hundredths of a second."""
    monkeypatch.setattr(owner, "_BEAT", 0.04)
    monkeypatch.setattr(owner, "_SETTLE", 0.02)


@pytest.fixture
def store(tmp_path):
    with bucket(tmp_path / "store"):
        yield paths.parse("gs://b/run")


def _leave(workdir, **about):
    """An owner's file without an owner."""
    workdir.mkdir(parents=True, exist_ok=True)
    known = {"token": "t", "machine": owner._machine(), "host": "there", "pid": 1, "since": "then"}
    (workdir / owner.FILE).write_text(json.dumps({**known, **about}))


def _no_locks(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.fault(8)
def test_the_second_run_is_refused_and_the_first_one_named(tmp_path):
    workdir = tmp_path / "run"
    with owner.hold(workdir):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*--workdir"):
            owner.hold(workdir).__enter__()
        with owner.hold(tmp_path / "other"):
            pass
    assert list(workdir.iterdir()) == []
    with owner.hold(workdir):  # free again
        pass


def test_an_error_in_a_run_frees_its_workdir(tmp_path):
    with pytest.raises(ZeroDivisionError), owner.hold(tmp_path):
        raise ZeroDivisionError
    with owner.hold(tmp_path):
        pass


def test_a_run_that_is_killed_leaves_its_workdir_free_at_once(tmp_path, capsys):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "owned\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on"):
            owner.hold(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / owner.FILE).exists()
    with owner.hold(tmp_path):
        assert json.loads((tmp_path / owner.FILE).read_text())["pid"] == os.getpid()
    assert "waiting" not in capsys.readouterr().err


def test_an_owner_on_another_machine_is_gone_when_it_is_silent(tmp_path, quick, capsys):
    _leave(tmp_path, machine="another", host="there", pid=7)
    with owner.hold(tmp_path):
        assert json.loads((tmp_path / owner.FILE).read_text())["pid"] == os.getpid()
    assert "was in use by process 7 on there; waiting" in capsys.readouterr().err


def test_an_owner_on_another_machine_that_lives_is_respected(tmp_path, quick):
    _leave(tmp_path, machine="another")
    ended = threading.Event()

    def live():
        beats = 0
        while not ended.wait(0.005):
            beats += 1
            paths.write_whole(
                tmp_path / owner.FILE, json.dumps({"token": "t", "machine": "a", "beats": beats})
            )

    living = threading.Thread(target=live)
    living.start()
    try:
        with pytest.raises(UserError, match="in use by process"):
            owner.hold(tmp_path).__enter__()
    finally:
        ended.set()
        living.join()


def test_at_an_address_and_without_locks_signs_of_life_decide(tmp_path, store, quick, monkeypatch):
    monkeypatch.setattr(owner.fcntl, "flock", _no_locks)
    for workdir in (store, tmp_path / "run"):
        with owner.hold(workdir):
            with pytest.raises(UserError, match="in use by process"):
                owner.hold(workdir).__enter__()
            assert (workdir / owner.FILE).exists()
        assert not (workdir / owner.FILE).exists()
        _leave(workdir, pid=2**22 + 1)  # larger than any process number: gone
        with owner.hold(workdir):
            pass


def test_of_two_that_start_at_once_one_is_the_owner(store, quick, monkeypatch):
    def other_writes_last(claim):
        real(claim)
        _leave(store, pid=99, host="there")

    real = owner._Claim._write
    monkeypatch.setattr(owner._Claim, "_write", other_writes_last)
    with pytest.raises(UserError, match="process 99 on there"):
        owner.hold(store).__enter__()


def test_an_owner_that_was_taken_for_dead_ends(store, quick, monkeypatch):
    lost = threading.Event()
    monkeypatch.setattr(owner, "_lost", lambda workdir: lost.set())
    with owner.hold(store):
        _leave(store, token="another's")
        assert lost.wait(timeout=60)


@pytest.mark.fault(11)
def test_a_workdir_that_cannot_be_written_is_said(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file; a folder is needed"):
        owner.hold(file).__enter__()


def test_what_fails_on_the_first_process_fails_on_all(monkeypatch):
    said = []

    def exchange(topic, text):
        said.append(text)
        return [said[0], text]

    monkeypatch.setattr(peers, "joined", lambda: True)
    monkeypatch.setattr(peers, "exchange", exchange)

    def fail():
        raise UserError("in use, ünd so weiter")

    for index in (0, 1):
        monkeypatch.setattr(peers.jax, "process_index", lambda index=index: index)
        with pytest.raises(UserError, match="in use, ünd so weiter"):
            peers.on_first_process(fail)
    said.clear()
    ran = []
    monkeypatch.setattr(peers.jax, "process_index", lambda: 0)
    peers.on_first_process(lambda: ran.append(1))
    assert ran == [1]
