"""Real processes with CPU devices: they train alike, stop, resume, are killed, disagree."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest

from msvit_jax import peers
from tests import tiny_run
from tools import kill_runs
from tools.kill_runs import Left

pytestmark = pytest.mark.multiprocess
# Processes that compile wait for one another, and give up on one that others keep from it.
quiet = pytest.mark.skipif(
    "MSVIT_QUIET_MACHINE" not in os.environ,
    reason="needs a machine with nothing else to do: set MSVIT_QUIET_MACHINE=1",
)
# A run of many steps, which signals reach before its end.
LONG = {
    "model__depth": 1,
    "data__mixup": 0.8,
    "epochs": 300.0,
    "eval_every_epochs": 100.0,
    "log_every_steps": 1,
    "optimizer__learning_rate": 1e-4,
}


@pytest.fixture
def start(tmp_path):
    jobs = []

    def run(name, *arguments, **options):
        jobs.append(kill_runs.Job(tmp_path, tmp_path / name, *arguments, **options))
        return jobs[-1]

    yield run
    for job in jobs:
        job.kill()


def _finish(job):
    """Waits for processes that end well."""
    codes = job.finish()
    assert not any(codes), "\n".join(map(job.said, range(len(codes))))
    return job.said(0)


def _last_line(job, index):
    return job.said(index).strip().splitlines()[-1]


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_of_two_processes_saves_and_stops_both(start, tmp_path, number):
    job = start("two", 2, options=LONG)
    job.wait_for("train  step      3")
    job.processes[1].send_signal(number)
    out = _finish(job)
    (stopped,) = [line for line in out.splitlines() if line.startswith("stopped at step")]
    step = int(stopped.split()[3].rstrip(";"))
    assert [int(p.name) for p in (tmp_path / "two" / "checkpoints").iterdir()] == [step]
    assert "train  step" not in job.said(1), "process 1 must leave reporting to process 0"
    if number == signal.SIGINT:
        return
    end = f"--config.steps={step + 3}"
    assert f"resumed at step {step}" in _finish(start("two", 2, end, options=LONG))
    _finish(start("one", 1, end, options=LONG))
    ours, theirs = Left.of(tmp_path / "two"), Left.of(tmp_path / "one")
    assert [r["step"] for r in ours.records] == [*range(1, step + 4), step + 3]
    assert ours.records[-1]["examples"] == tiny_run.VALIDATION
    assert ours.differences(theirs, tolerance=1e-3) == []


@pytest.mark.fault(2)
def test_processes_that_differ_are_refused_with_what_differs(start):
    each = (["--config.seed=3"], [])
    job = start("run", 2, options=LONG, each=each)
    assert job.finish() == [2, 2]
    for index, values in enumerate(("3 on process 0, 0 on process 1", "0 on process 1, 3 on")):
        assert f"config.seed: {values}" in job.said(index)
        assert "Traceback" not in job.said(index)
        assert "train  step" not in job.said(index)


@pytest.mark.fault(10)
def test_a_process_that_is_killed_ends_the_other_in_one_line(start):
    job = start("run", 2, options=LONG)
    job.wait_for("train  step      1")
    job.processes[1].kill()
    assert job.finish() == [2, -signal.SIGKILL]
    assert _last_line(job, 0).startswith("error: process 1 ended")
    assert "*** Check failure stack trace" not in job.said(0)


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "silent"])
def test_the_first_process_killed_and_one_that_is_silent(start, victim):
    job = start("run", 2, options=LONG)
    job.wait_for("train  step      1")
    if victim == "first":
        job.processes[0].kill()
        job.processes[1].wait(60)
        assert _last_line(job, 1).startswith("error: process 0 ended")
    else:
        child = _child(job.processes[1].pid)
        os.kill(child, signal.SIGSTOP)
        job.processes[0].wait(60)
        assert _last_line(job, 0).startswith("error: process 1 ended, or was silent")
        os.kill(child, signal.SIGKILL)


def _child(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return int(children.read().split()[0])


@pytest.mark.slow
def test_a_split_on_the_devices_is_the_same_for_one_process_and_two(start, tmp_path):
    given = {**kill_runs.OPTIONS, "epochs": 2.0, "data__on_device": True, "data__pad_shift": 2}
    for count in (1, 2):
        _finish(start(f"run{count}", count, options=given))
    one, two = (Left.of(tmp_path / f"run{count}") for count in (1, 2))
    assert one.records
    assert two.differences(one, tolerance=1e-5) == []


@pytest.mark.slow
def test_however_devices_and_processes_are_shared_out_training_is_the_same(start, tmp_path):
    """1 process of 4 devices, 2 of 2, 4 of 1: gate's loss and gradient among what is compared."""
    for count in (1, 2, 4):
        _finish(start(f"run{count}", count, options={**kill_runs.OPTIONS, "epochs": 3.0}))
    whole, *others = [Left.of(tmp_path / f"run{count}") for count in (1, 2, 4)]
    assert {"gate_loss", "total_loss", "grad_norm_gate"} <= set(whole.records[0])
    evaluated = [r for r in whole.records if r["kind"] == "eval"]
    assert [r["examples"] for r in evaluated] == [tiny_run.VALIDATION]
    for other in others:
        assert other.differences(whole, tolerance=1e-5) == []


@quiet
@pytest.mark.slow
def test_a_checkpoint_of_four_processes_resumes_on_one_and_on_two(start, tmp_path):
    first, last = "--config.steps=4", "--config.steps=6"
    _finish(start("four", 4, first))
    for count in (2, 1):
        shutil.copytree(tmp_path / "four", tmp_path / f"on{count}")
        assert "resumed at step 4" in _finish(start(f"on{count}", count, last))
    two, one = (Left.of(tmp_path / f"on{count}") for count in (2, 1))
    assert two.differences(one, tolerance=1e-5) == []


@pytest.mark.fault(9)
@quiet
@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 12), (2, 8)])
def test_kills_leave_no_trace(tmp_path, processes, kills):
    """Killed at random moments, a run leaves what an undisturbed one leaves, logs included."""
    dice = random.Random(processes)
    kill_runs.run_with_kills(tmp_path, tmp_path / "whole", processes, 0, dice)
    whole, killed = Left.of(tmp_path / "whole"), 0
    while killed < kills:
        workdir = tmp_path / f"run{killed}"
        moments = kill_runs.run_with_kills(tmp_path, workdir, processes, min(4, kills), dice)
        assert Left.of(workdir).differences(whole) == [], moments
        killed += max(1, len(moments))


@pytest.mark.fault(10)
def test_addresses_and_indices_that_cannot_be_are_refused_at_once():
    for given, wanted in (
        (("localhost", 2, 0), "host:port is needed"),
        (("localhost:x", 2, 0), "host:port is needed"),
        (("localhost:99999", 2, 0), "host:port is needed"),
        (("localhost:8476", 0, 0), "at least 1"),
        (("localhost:8476", 2, 5), "indices go from 0 to 1"),
        (("localhost:8476", 2, -1), "indices go from 0 to 1"),
        (("no.such.host.invalid:8476", 2, 1), "not known here"),
    ):
        with pytest.raises(peers.UserError, match=wanted):
            peers.join(*given, timeout=5)


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (
            "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n3\nThe "
            "tasks have crashed.",
            "process 3 ended",
        ),
        ("DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.../RegisterTask", "within 9 s"),
        (
            "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was "
            "preempted/died/restarted unexpectedly",
            "process 0 ended",
        ),
        ("something else", "^$"),
    ],
)
def test_what_jax_says_of_other_processes_becomes_one_line(said, wanted):
    assert re.search(wanted, peers.explain(said, coordinator="a:1", timeout=9))


def test_a_child_that_is_aborted_is_explained_by_its_parent():
    code = (
        "import os, sys; from msvit_jax import guard;"
        "guard.supervise(lambda said: 'it was ' + said.split()[-1]);"
        "print('before', file=sys.stderr, flush=True);"
        "os.write(2, b'F1126 16:00:00.1    1 client.h:86] fatal\\n*** stack: blue\\n'); os.abort()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "before\nerror: it was blue\n")
