"""Trains for thousands of steps and predicts hundreds of times, and says whether anything grows.

    python tools/soak.py [--steps=2000] [--calls=300] [--out=docs/results/soak.json]

A tiny mixed-scale run with two input workers evaluates, saves checkpoints and writes all its logs;
then four threads share a Predictor. Memory, open files, threads and child processes are sampled
meanwhile. After a quarter, in which programs are compiled, they have to stay as they are: open
files, threads and children in number, memory within 5 %. A checkpoint takes some of each for a
moment, so the numbers are those that nine of ten samples reach; what is never given back adds to
them.
"""

import argparse
import concurrent.futures
import contextlib
import json
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

EVERY = 0.1  # seconds between samples
THREADS = 4
GROWTH = 1.05  # largest ratio of a count in the last quarter to that in the second
COUNTED = ("files", "threads", "children")


def sample() -> dict[str, float]:
    """What this process and its children hold now; memory in MB."""
    own = pathlib.Path("/proc/self")
    children: list[pathlib.Path] = []
    for task in (own / "task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            numbers = (task / "children").read_text().split()
            children += [pathlib.Path("/proc", number) for number in numbers]
    memory = 0.0
    for process in (own, *children):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            text = (process / "status").read_text()
            memory += int(text.split("VmRSS:")[1].split()[0]) / 1000 if "VmRSS:" in text else 0
    return {
        "megabytes": round(memory, 1),
        "files": len(list((own / "fd").iterdir())),
        "threads": len(list((own / "task").iterdir())),
        "children": len(children),
    }


@contextlib.contextmanager
def sampled(progress: Callable[[], float]) -> Iterator[list[dict[str, float]]]:
    """Collects samples meanwhile, each with the progress of the work, from 0 to 1."""
    samples: list[dict[str, float]] = []
    ended = threading.Event()

    def collect() -> None:
        while not ended.wait(EVERY):
            samples.append({"done": round(progress(), 4), **sample()})

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def quarters(samples: list[dict[str, float]]) -> list[dict[str, float]]:
    """Summarizes samples by quarters of the work: mean memory, and the lasting number of others."""
    rows = []
    for quarter in range(4):
        own = [s for s in samples if quarter / 4 <= s["done"] < (quarter + 1) / 4]
        rows.append(
            {
                "samples": len(own),
                "megabytes": round(float(np.mean([s["megabytes"] for s in own])), 1),
                **{name: float(np.percentile([s[name] for s in own], 10)) for name in COUNTED},
            }
        )
    return rows


def grown(rows: list[dict[str, float]]) -> list[str]:
    """Names what grew from the second quarter to the last."""
    before, after = rows[1], rows[-1]
    return [name for name in (*COUNTED, "megabytes") if after[name] > GROWTH * before[name]]


def train(workdir: pathlib.Path, steps: int) -> list[dict[str, float]]:
    """Trains, and returns what was sampled."""
    from msvit_jax.run_log import RECORDS
    from msvit_jax.train import loop
    from tests import tiny_run

    epochs = steps * 16 / tiny_run.TRAIN
    config = tiny_run.msvit(
        data__mixup=0.8,
        data__workers=2,
        ema_decay=0.9,
        epochs=epochs,
        steps=steps,
        eval_every_epochs=epochs / 20,
        checkpoint__every_steps=50,
        log_every_steps=10,
        optimizer__learning_rate=1e-4,
    )
    records = workdir / RECORDS

    def progress() -> float:
        lines = records.read_text().splitlines() if records.exists() else []
        return json.loads(lines[-1])["step"] / steps if lines else 0.0

    with sampled(progress) as samples:
        loop.train(config, workdir)
    return samples


def predict(workdir: pathlib.Path, calls: int) -> list[dict[str, float]]:
    """Calls one Predictor from several threads, and returns what was sampled."""
    from msvit_jax.inference import Predictor
    from tests import tiny_run

    predictor = Predictor.load(workdir, batch_size=8).warm_up()
    dice = np.random.default_rng(0)
    pixels = dice.integers(0, 256, (64, tiny_run.SIDE, tiny_run.SIDE, 3), np.uint8)
    wanted = predictor(pixels).logits
    done = 0

    def call(number: int) -> None:
        nonlocal done
        count = 1 + number * 7 % len(pixels)
        np.testing.assert_allclose(
            predictor(pixels[:count]).logits, wanted[:count], rtol=1e-4, atol=1e-4
        )
        done += 1

    with (
        sampled(lambda: done / calls) as samples,
        concurrent.futures.ThreadPoolExecutor(THREADS) as threads,
    ):
        list(threads.map(call, range(calls)))
    return samples


def main() -> None:
    """Runs both parts."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--out", help=".json file for all samples")
    given = parser.parse_args()
    result: dict[str, Any] = {"steps": given.steps, "calls": given.calls}
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder, "run")
        for name, work, count in (
            ("training", train, given.steps),
            ("predicting", predict, given.calls),
        ):
            start = time.perf_counter()
            samples = work(workdir, count)
            rows = quarters(samples)
            result[name] = {
                "seconds": round(time.perf_counter() - start, 1),
                "quarters": rows,
                "grown": grown(rows),
            }
            for quarter, row in enumerate(rows, start=1):
                print(name, "quarter", quarter, *(f"{key} {value}" for key, value in row.items()))
        held = [file for file in workdir.rglob("*") if file.is_file()]
        result["steps kept"] = sorted(p.name for p in (workdir / "checkpoints").iterdir())
        result["files in the workdir"] = len(held)
    grew = [
        f"{name} {what}" for name in ("training", "predicting") for what in result[name]["grown"]
    ]
    print("grown:", ", ".join(grew) or "nothing")
    if given.out:
        pathlib.Path(given.out).write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(grew))


if __name__ == "__main__":
    main()
