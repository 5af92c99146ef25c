"""Two processes with two devices each, for real: train, stop on a signal, resume."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from tests import tiny_run

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from tests import tiny_run

def get_config():
    return tiny_run.msvit(
        data__data_dir={data_dir!r},
        data__mixup=0.8,
        epochs=300.0,
        eval_every_epochs=100.0,
        log_every_steps=1,
        optimizer__learning_rate=1e-4,
    )
"""


class Job:
    """train.py in `processes` processes over four CPU devices altogether."""

    def __init__(self, folder, workdir, processes, *overrides):
        config = folder / "config.py"
        config.write_text(CONFIG.format(data_dir=tiny_run.data_dir()))
        command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--config.{o}" for o in overrides]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.processes = []
        for index in range(processes):
            flags = [f"--coordinator={address}", f"--process_count={processes}"]
            flags += [f"--process_index={index}"]
            self.processes.append(
                subprocess.Popen(
                    command + (flags if processes > 1 else []),
                    cwd=ROOT,
                    env={
                        **os.environ,
                        "JAX_NUM_CPU_DEVICES": str(4 // processes),
                        "PYTHONPATH": str(ROOT),
                    },
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def wait_for(self, text):
        """Reads process 0's output up to a line with `text`."""
        seen = []
        for line in self.processes[0].stdout:
            seen.append(line)
            if text in line:
                return
        pytest.fail("".join(seen))

    def finish(self):
        """Waits for all processes and returns their output."""
        outputs = [p.communicate(timeout=240)[0] for p in self.processes]
        assert [p.returncode for p in self.processes] == [0] * len(outputs), "\n".join(outputs)
        return outputs

    def kill(self):
        for process in self.processes:
            process.kill()


def _records(workdir, kind):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if r["kind"] == kind}


@pytest.fixture
def start(tmp_path):
    jobs = []

    def run(*arguments):
        jobs.append(Job(tmp_path, *arguments))
        return jobs[-1]

    yield run
    for job in jobs:
        job.kill()


@pytest.mark.multiprocess
def test_two_processes_stop_resume_and_equal_one(start, tmp_path):
    job = start(tmp_path / "two", 2)
    job.wait_for("train  step      3")
    job.processes[0].send_signal(signal.SIGTERM)
    outputs = job.finish()
    (stopped,) = [line for line in outputs[0].splitlines() if line.startswith("stopped at step")]
    step = int(stopped.split()[3].rstrip(";"))
    assert [int(p.name) for p in (tmp_path / "two" / "checkpoints").iterdir()] == [step]
    assert "step" not in outputs[1], "process 1 must leave reporting to process 0"

    end = f"steps={step + 3}"
    assert f"resumed at step {step}" in start(tmp_path / "two", 2, end).finish()[0]
    start(tmp_path / "one", 1, end).finish()
    ours, theirs = (_records(tmp_path / name, "train") for name in ("two", "one"))
    assert list(ours) == list(theirs) == list(range(1, step + 4))
    for number, record in ours.items():
        assert record["examples"] == 16
        for key in ("total_loss", "gate_loss", "grad_norm"):
            assert record[key] == pytest.approx(theirs[number][key], rel=1e-3), (number, key)
    evaluated = [_records(tmp_path / name, "eval")[step + 3] for name in ("two", "one")]
    assert evaluated[0]["examples"] == evaluated[1]["examples"] == tiny_run.VALIDATION
    assert evaluated[0]["loss"] == pytest.approx(evaluated[1]["loss"], rel=1e-3)
