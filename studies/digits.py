"""The study on scattered digits: MSViT beside dense models and gates that learn nothing.

    make study        (or: python studies/digits.py --workdir=runs/study --seeds=0,1,2)

For every seed it trains, from the configs of this repository and with the same data:

* dense: configs/digits_vit.py
* lower resolution: configs/digits_vit_lowres.py, for dense's and the fine-tuning's epochs together
* MSViT: configs/digits_msvit.py, from dense
* random, centre: the same fine-tuning from dense with a gate that learns nothing, its share of
  fine regions rounded up to at least the tokens of the seed's MSViT

So all but dense itself are trained equally long. All are judged after their last step, not at
their best. Results are written to
docs/results/digits.md and digits.json. What is done already is not done again, so the study can
be interrupted. Cost: about an hour and a half on two CPU cores.
"""

import concurrent.futures
import json
import math
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from msvit_jax import config as configs
from msvit_jax import errors, host

ROOT = pathlib.Path(__file__).resolve().parent.parent
REGIONS, FINEST = 16, 64
ARMS = ("dense", "lower resolution", "random gate", "centre gate", "MSViT")

_WORKDIR = flags.DEFINE_string("workdir", "runs/study", "Where the runs go.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Of TFDS.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
_JOBS = flags.DEFINE_integer("jobs", os.cpu_count(), "Runs at a time, each on a core of its own.")
_OUT = flags.DEFINE_string("out", str(ROOT / "docs" / "results"), "Where the table goes.")

Figures = dict[str, Any]


class Workers:
    """Runs commands, as many at a time as there are cores to give."""

    def __init__(self, jobs: int) -> None:
        self._cores: queue.SimpleQueue[int] = queue.SimpleQueue()
        for core in range(jobs):
            self._cores.put(core)

    def run(self, command: Sequence[str], log: pathlib.Path) -> str:
        """Runs a command to its end on one core and returns its output."""
        core = self._cores.get()
        try:
            print(f"[core {core}] {' '.join(command)}", flush=True)
            with log.open("w") as errors_to:
                # Small models train fastest as one single-threaded process per core.
                done = subprocess.run(
                    [sys.executable, *command],
                    cwd=ROOT,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=errors_to,
                    env={**os.environ, **host.keep_freed_memory_environment()},
                    preexec_fn=lambda: _pin(core),
                )
        finally:
            self._cores.put(core)
        if done.returncode:
            raise errors.UserError(f"{' '.join(command)} failed; see {log}.")
        return done.stdout


def _pin(core: int) -> None:
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, {core})


class Study:
    """One seed's runs."""

    def __init__(self, workers: Workers, seed: int) -> None:
        self._workers, self._seed = workers, seed

    def arm(self, name: str, config: str, **overrides: Any) -> Figures:
        """Trains and evaluates one arm, unless that is done; returns its figures."""
        workdir = pathlib.Path(self.workdir(name))
        done = workdir.with_suffix(".trained")
        if not done.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            options = {"seed": self._seed, "data.data_dir": _DATA_DIR.value} | overrides
            changes = [f"--config.{key}={value}" for key, value in options.items()]
            training = ["train.py", f"--config=configs/{config}.py", f"--workdir={workdir}"]
            log = workdir.with_suffix(".log")
            workdir.with_suffix(".out").write_text(self._workers.run([*training, *changes], log))
            done.touch()
        return self.evaluated(name)

    def evaluated(self, name: str, as_model: str = "", **overrides: Any) -> Figures:
        """Evaluates an arm's last step, unless that is done; returns its figures.

        Args:
          name: of a trained arm.
          as_model: a name for the model around the same parameters, if it is another.
          **overrides: keys of the config that make it another.
        """
        workdir = pathlib.Path(self.workdir(name))
        result = workdir / f"{as_model or 'result'}.json"
        if not result.exists():
            changes = [f"--{key}={value}" for key, value in overrides.items()]
            command = ["eval.py", f"--workdir={workdir}", "--which=latest", *changes]
            out = self._workers.run(command, workdir.with_suffix(".log"))
            result.write_text(out.splitlines()[-1])
        figures = json.loads(result.read_text())
        figures.pop("workdir")  # where it lay says nothing about the result
        return figures

    def workdir(self, name: str) -> str:
        """Where an arm of this seed lies."""
        return str(pathlib.Path(_WORKDIR.value) / name / str(self._seed))

    def run(self) -> dict[str, Figures]:
        """Runs all arms; those that do not need one another at the same time."""
        tuning = configs.load(str(ROOT / "configs/digits_msvit.py"))
        epochs = configs.load(str(ROOT / "configs/digits_vit.py")).epochs + tuning.epochs
        with concurrent.futures.ThreadPoolExecutor(len(ARMS)) as pool:
            lowres = pool.submit(self.arm, "lowres", "digits_vit_lowres", epochs=epochs)
            dense = self.arm("dense", "digits_vit")
            start = {"init_from": self.workdir("dense")}
            mixed = pool.submit(self.arm, "msvit", "digits_msvit", **start)
            tokens = mixed.result()["tokens_mean"]
            fixed = start | {"loss.gate.kind": "none", "model.fine_share": share_for(tokens)}
            random, centre = (
                pool.submit(self.arm, gate, "digits_msvit", **fixed, **{"model.gate": gate})
                for gate in ("random", "centre")
            )
            arms = (dense, lowres, random, centre, mixed)
            figures = [a if isinstance(a, dict) else a.result() for a in arms]
        return dict(zip(ARMS, figures, strict=True))


def share_for(tokens: float) -> float:
    """The smallest share of fine regions, in whole regions, that has at least that many tokens."""
    return math.ceil((tokens - REGIONS) / 3) / REGIONS


def report(results: dict[int, dict[str, Figures]]) -> str:
    """Writes the table: mean and spread over seeds, then every seed."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "top-1 (%)": ("top1", "{:.2f}".format),
        "tokens": ("tokens_mean", "{:.1f}".format),
        "MMACs": ("gmacs_mean", lambda g: f"{1000 * g:.2f}"),
        "content fine": ("content_fine", "{:.3f}".format),
        "fine / content": ("fine_per_content", "{:.2f}".format),
        "agreement": ("agreement", "{:.3f}".format),
    }
    means, by_seed = [], []
    for arm in ARMS:
        cells = [arm]
        for key, show in columns.values():
            values = [r[arm][key] for r in results.values() if key in r[arm]]
            spread = f" ± {show(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
            cells.append(show(float(np.mean(values))) + spread if values else "")
        means.append(cells)
    for seed, row in results.items():
        cells = [f"{row[arm]['top1']:.2f} / {row[arm]['tokens_mean']:.1f}" for arm in ARMS]
        by_seed.append([str(seed), *cells])
    first, second = markdown(["model", *columns], means), markdown(["seed", *ARMS], by_seed)
    return f"{first}\n\nTop-1 and tokens by seed:\n\n{second}"


def checks(results: dict[int, dict[str, Figures]]) -> str:
    """Holds the figures against what the study is to show; every seed must."""
    claims: dict[str, Callable[[dict[str, Figures]], float]] = {
        "top-1 below dense, points (at most 1)": lambda r: r["dense"]["top1"] - r["MSViT"]["top1"],
        "share of the tokens (at most 0.5)": lambda r: r["MSViT"]["tokens_mean"] / FINEST,
        "top-1 above lower resolution, points (above 0)": lambda r: (
            r["MSViT"]["top1"] - r["lower resolution"]["top1"]
        ),
        "top-1 above the random gate, points (above 0)": lambda r: (
            r["MSViT"]["top1"] - r["random gate"]["top1"]
        ),
        "top-1 above the centre gate, points (above 0)": lambda r: (
            r["MSViT"]["top1"] - r["centre gate"]["top1"]
        ),
        "share of content regions fine (at least 0.85)": lambda r: r["MSViT"]["content_fine"],
        "fine regions over content regions (at most 1.5)": lambda r: r["MSViT"]["fine_per_content"],
        "agreement between images (below 1)": lambda r: r["MSViT"]["agreement"],
    }
    seeds = list(results)
    rows = [
        [claim, *(f"{figure(results[s]):.3f}" for s in seeds)] for claim, figure in claims.items()
    ]
    return markdown(["MSViT", *(f"seed {s}" for s in seeds)], rows)


def run_seeds(
    name: str,
    arms: Callable[[Study], dict[str, Figures]],
    report: Callable[[dict[int, dict[str, Figures]]], str],
) -> dict[int, dict[str, Figures]]:
    """Runs a study's arms with every seed; writes <name>.md and <name>.json.

    Args:
      name: of the study.
      arms: trains and evaluates one seed's.
      report: makes the tables of the figures by seed and arm.

    Returns:
      The figures by seed and arm.
    """
    workers = Workers(_JOBS.value)
    seeds = [int(seed) for seed in _SEEDS.value]
    with concurrent.futures.ThreadPoolExecutor(len(seeds)) as pool:
        found = pool.map(lambda seed: arms(Study(workers, seed)), seeds)
        results = dict(zip(seeds, found, strict=True))
    write(name, report(results), results)
    return results


def out(file: str) -> pathlib.Path:
    """Where a study's file goes."""
    directory = pathlib.Path(_OUT.value)
    directory.mkdir(parents=True, exist_ok=True)
    return directory / file


def write(name: str, text: str, results: dict[int, dict[str, Figures]]) -> None:
    """Writes a study's tables and all its figures."""
    out(f"{name}.md").write_text(text)
    out(f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {out(name)}.md, {out(name)}.json")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def with_spread(values: Sequence[float] | np.ndarray) -> str:
    """Mean and standard deviation."""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def main(argv: Sequence[str]) -> None:
    """Runs the study and writes its table."""
    del argv
    results = run_seeds("digits", Study.run, document)
    print(document(results).removeprefix(HEADER))


def document(results: dict[int, dict[str, Figures]]) -> str:
    """The study's page."""
    return f"{HEADER}{report(results)}\n\n{checks(results)}\n"


HEADER = """# Scattered digits

Made by `make study` (studies/digits.py says what is trained): mean and standard deviation over
seeds, 2,000 validation images, every model after its last step. Tokens and MACs
(multiply-accumulates)
are means over images; "content" regions have 5 % or more digit pixels; agreement is the share of
positions at which two different images' decisions agree (1 would be a fixed pattern).

"""

if __name__ == "__main__":
    errors.run(main)
