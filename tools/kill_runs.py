"""Kills training runs at random moments and compares what they leave with an undisturbed run.

    python tools/kill_runs.py --kills=200 --processes=1,2 --out=docs/results/kills.json

Every run is a tiny mixed-scale model on four CPU devices. It is killed (kill -9, one or all of its
processes) and started again with the same command until it ends by itself, and must then have the
parameters, the lines of metrics.jsonl and the TensorBoard events of the run that nobody disturbed.
With --out the result is written after every run, and the same command goes on from there.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

DEVICES = 4
PEER_TIMEOUT = 10  # seconds
# What depends on time, and so differs from run to run.
TIMED = ("time", "images_per_second", "seconds_per_step", "seconds_left")
CONFIG = """
from tests import tiny_run

def get_config():
    return tiny_run.msvit(**{options!r})
"""
OPTIONS = {
    "model__depth": 1,
    "data__mixup": 0.8,
    "model__drop_path": 0.1,
    "ema_decay": 0.9,
    "epochs": 8.0,
    "eval_every_epochs": 3.0,
    "checkpoint__every_steps": 4,
    "log_every_steps": 3,
    "log_images": 1,
}


class Job:
    """Processes of train.py on this machine; four devices altogether."""

    def __init__(
        self, folder: pathlib.Path, workdir: pathlib.Path, count: int = 1, *arguments: str,
        options: dict[str, Any] | None = None, each: Sequence[Sequence[str]] = (),
    ) -> None:  # fmt: skip
        """Starts them.

        Args:
          folder: Folder for the config file.
          workdir: Workdir of the run.
          count: Number of processes.
          arguments: Further arguments, the same for all.
          options: Options of the config; `OPTIONS` by default.
          each: Further arguments of each process.
        """
        from tests import tiny_run

        config = folder / "config.py"
        options = {
            "data__data_dir": tiny_run.data_dir(),
            **(OPTIONS if options is None else options),
        }
        config.write_text(CONFIG.format(options=options))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.processes, self.outputs, self._readers = [], [], []
        for index in range(count):
            flags = [f"--config={config}", f"--workdir={workdir}", *arguments]
            if count > 1:
                flags += [f"--coordinator={address}", f"--process_count={count}"]
                flags += [f"--process_index={index}", f"--peer_timeout={PEER_TIMEOUT}"]
            flags += each[index] if each else []
            self._start(flags, DEVICES // count)

    def _start(self, flags: list[str], devices: int) -> None:
        environment = {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "train.py", *flags],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(iter(process.stdout.readline, "")))
        reader.start()
        self.processes.append(process)
        self.outputs.append(said)
        self._readers.append(reader)

    def wait_for(self, text: str, seconds: float = 300.0) -> bool:
        """Waits until process 0 says a text; returns whether it did before it ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(text in line for line in list(self.outputs[0])):
                return True
            if self.processes[0].poll() is not None:
                return False
            time.sleep(0.05)
        raise TimeoutError("".join(self.outputs[0]))

    def finish(self, seconds: float = 300.0) -> list[int]:
        """Waits for all processes and returns their exit codes."""
        for process, reader in zip(self.processes, self._readers, strict=True):
            process.wait(seconds)
            reader.join(seconds)
            process.stdout.close()
        return [process.returncode for process in self.processes]

    def said(self, index: int) -> str:
        """Returns what a process has printed."""
        return "".join(self.outputs[index])

    def kill(self) -> None:
        """Kills all processes that still run."""
        for process in self.processes:
            process.kill()
        self.finish()


@dataclasses.dataclass
class Left:
    """What a run left behind: its parameters, records and events."""

    parameters: dict[str, Any]
    records: list[dict[str, Any]]
    events: list[tuple[int, str, Any]]

    @classmethod
    def of(cls, workdir: pathlib.Path) -> "Left":
        """Reads a workdir."""
        from msvit_jax import checkpoint, checkpoint_files, event_files
        from msvit_jax.tree import flat_names

        step = workdir / "checkpoints" / str(checkpoint.find_step(workdir, "latest"))
        items = {name: checkpoint_files.read_tree(step / name) for name in ("model", "trainer")}
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        records = [{k: v for k, v in json.loads(t).items() if k not in TIMED} for t in lines]
        events = []
        for file in sorted((workdir / "tensorboard").iterdir()):
            for event, _ in event_files._records(file.read_bytes()):
                events += [
                    (event.step, value.tag, value.simple_value)
                    for value in event.summary.value
                    if value.tag.split("/")[-1] not in TIMED
                ]
        return cls(flat_names(items), records, sorted(events))

    def differences(self, other: "Left", tolerance: float = 0.0) -> list[str]:
        """Lists what differs from another run; pictures are compared by their names alone."""
        import numpy as np

        found = []
        for name in self.parameters | other.parameters:
            ours, theirs = self.parameters.get(name), other.parameters.get(name)
            if ours is None or theirs is None:
                if ours is not theirs:
                    found.append(name)
            elif not np.allclose(ours, theirs, rtol=tolerance, atol=tolerance):
                found.append(f"{name}: {np.abs(np.subtract(ours, theirs)).max()}")
        for kind in ("records", "events"):
            ours, theirs = getattr(self, kind), getattr(other, kind)
            if len(ours) != len(theirs):
                found.append(f"{len(ours)} {kind}, {len(theirs)} in the other")
            found += [
                f"{kind[:-1]} {a} is {b} in the other"
                for a, b in zip(ours, theirs, strict=False)
                if not _alike(a, b, tolerance)
            ]
        return found


def _alike(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b, [tolerance] * len(a)))
    if isinstance(a, float) and tolerance:
        return abs(a - b) <= tolerance * max(1.0, abs(a))
    return a == b


def run_with_kills(
    folder: pathlib.Path, workdir: pathlib.Path, processes: int, kills: int, dice: random.Random
) -> list[str]:
    """Runs to the end with some kills in between; returns when each happened."""
    moments = []
    while True:
        job = Job(folder, workdir, processes)
        try:
            if len(moments) < kills:
                if dice.random() < 0.75:  # while it trains, evaluates and saves
                    running = job.wait_for("train  step")
                    time.sleep(dice.uniform(0, 1.5) if running else 0)
                else:  # while it starts
                    time.sleep(dice.uniform(0.5, 12))
                victims = dice.choice([job.processes, [dice.choice(job.processes)]])
                alive = [v for v in victims if v.poll() is None]
                for victim in alive:
                    victim.send_signal(signal.SIGKILL)
                if alive:
                    last = re.findall(r"step +(\d+)", job.said(0))
                    moments.append(f"{len(alive)} of {processes} after step {(last or ['-'])[-1]}")
            codes = job.finish()
        finally:
            job.kill()
        if not any(codes):
            return moments
        unclear = [job.said(i) for i, c in enumerate(codes) if c > 0 and c not in (2, 137)]
        if unclear or any("Traceback" in job.said(i) for i in range(processes)):
            raise AssertionError("\n".join(unclear or map(job.said, range(processes))))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", default="1,2", help="numbers of processes, in turns")
    parser.add_argument("--most", type=int, default=6, help="kills of one run, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file for the result")
    given = parser.parse_args()
    counts = [int(text) for text in given.processes.split(",")]
    out = pathlib.Path(given.out) if given.out else None
    runs = json.loads(out.read_text())["each"] if out and out.exists() else []
    dice = random.Random(f"{given.seed} {len(runs)}")
    killed = sum(len(run["kills"]) for run in runs)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        whole = {}
        for count in counts:
            run_with_kills(folder, folder / f"whole{count}", count, 0, dice)
            whole[count] = Left.of(folder / f"whole{count}")
        while killed < given.kills:
            count = counts[len(runs) % len(counts)]
            workdir = folder / f"run{len(runs)}"
            number = min(dice.randint(1, given.most), given.kills - killed)
            moments = run_with_kills(folder, workdir, count, number, dice)
            differ = Left.of(workdir).differences(whole[count])
            killed += len(moments)
            runs.append({"processes": count, "kills": moments, "differences": differ[:20]})
            print(f"{killed} kills, run {len(runs)}: {'; '.join(moments)}: {differ[:3] or 'same'}")
            sys.stdout.flush()
            if out:
                same = sum(not run["differences"] for run in runs)
                result = {"kills": killed, "runs": len(runs), "same": same, "each": runs}
                out.write_text(json.dumps(result, indent=1) + "\n")
    good = sum(not run["differences"] for run in runs)
    print(f"{good} of {len(runs)} runs, {killed} kills: as the run that nobody disturbed")
    sys.exit(good != len(runs))


if __name__ == "__main__":
    main()
