"""The study on scattered digits: MSViT beside dense models and gates that learn nothing.

    make study        (or: python studies/digits.py --workdir=runs/study --seeds=0,1,2)

On two variants of the data set, the default one and one of smaller digits (10 to 20 px), for every
seed, from the configs of this repository:

* dense: configs/digits_vit.py
* MSViT: configs/digits_msvit.py, from dense

On the small digits also, from dense and for as many epochs as MSViT:

* dense, longer
* lower resolution: the images at 48 px, 36 tokens, the nearest to MSViT's MACs
* random, center: a gate that learns nothing, its share of fine regions rounded up to at least the
  tokens of the seed's MSViT

All are judged after their last step, not at their best. Results are written to
docs/results/digits.md and digits.json. What is done already is not done again, so the study can
be interrupted. Cost: about an hour and a half on two CPU cores.
"""

import concurrent.futures
import itertools
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
from tables import markdown, with_spread

from msvit_jax import config as configs
from msvit_jax import errors, process_tuning

ROOT = pathlib.Path(__file__).resolve().parent.parent
REGIONS, FINEST = 16, 64
SMALL = {"data.name": "scattered_digits/small_digits"}
SMALL_TARGET = 0.25  # share of fine regions; smaller digits lie in fewer of them
ARMS = ("dense", "MSViT")
SMALL_ARMS = ("dense", "dense, longer", "lower resolution", "random gate", "center gate", "MSViT")

_WORKDIR = flags.DEFINE_string("workdir", "runs/study", "Folder of the runs.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of data sets; empty for TFDS's default.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs.")
_JOBS = flags.DEFINE_integer(
    "jobs", os.cpu_count(), "Number of runs at a time, each on its own core."
)
_OUT = flags.DEFINE_string("out", str(ROOT / "docs" / "results"), "Folder for the table.")

Figures = dict[str, Any]


class Workers:
    """Runs commands, as many at a time as there are cores to give."""

    def __init__(self, jobs: int) -> None:
        self._cores: queue.SimpleQueue[int] = queue.SimpleQueue()
        for core in itertools.islice(itertools.cycle(_own_cores()), jobs):
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
                    env={**os.environ, **process_tuning.keep_freed_memory_environment()},
                    preexec_fn=lambda: _pin(core),
                )
        finally:
            self._cores.put(core)
        if done.returncode:
            raise errors.UserError(f"{' '.join(command)} failed; see {log}.")
        return done.stdout


def _own_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


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
            out = self._workers.run([*training, *changes], log)
            workdir.with_suffix(".out").write_text(out)
            if "stopped at step" in out:
                raise errors.UserError(f"{name} was stopped; the same command goes on with it.")
            done.touch()
        return self.evaluated(name)

    def evaluated(self, name: str, as_model: str = "", **overrides: Any) -> Figures:
        """Evaluates an arm's last step, unless that is done; returns its figures.

        Args:
          name: Name of a trained arm.
          as_model: Name for the model around the same parameters, if it is another.
          **overrides: Config keys to change.
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
        """Runs the arms on both variants; those that do not need one another at the same time."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            small = pool.submit(self.run_small)
            figures = {"dense": self.arm("dense", "digits_vit")}
            start = {"init_from": self.workdir("dense")}
            figures["MSViT"] = self.arm("msvit", "digits_msvit", **start)
            return figures | {f"small: {name}": value for name, value in small.result().items()}

    def run_small(self) -> dict[str, Figures]:
        """Runs the arms on the small digits."""
        tuning = configs.load(str(ROOT / "configs/digits_msvit.py"))
        dense = self.arm("small/dense", "digits_vit", **SMALL)
        start = SMALL | {"init_from": self.workdir("small/dense")}
        tuned = start | {
            "epochs": tuning.epochs,
            "optimizer.learning_rate": tuning.optimizer.learning_rate,
            "optimizer.warmup_epochs": tuning.optimizer.warmup_epochs,
        }
        with concurrent.futures.ThreadPoolExecutor(len(SMALL_ARMS)) as pool:
            longer = pool.submit(self.arm, "small/longer", "digits_vit", **tuned)
            lower = pool.submit(self.arm, "small/lowres", "digits_vit_lowres", **tuned)
            target = {"loss.gate.target": SMALL_TARGET}
            mixed = self.arm("small/msvit", "digits_msvit", **start, **target)
            fixed = start | {
                "loss.gate.kind": "none",
                "model.layout": "slots",
                "model.fine_share": share_for(mixed["tokens_mean"]),
            }
            random, center = (
                pool.submit(
                    self.arm, f"small/{gate}", "digits_msvit", **fixed, **{"model.gate": gate}
                )
                for gate in ("random", "center")
            )
            waited = (longer.result(), lower.result(), random.result(), center.result())
        return dict(zip(SMALL_ARMS, (dense, *waited, mixed), strict=True))


def share_for(tokens: float) -> float:
    """The smallest share of fine regions, in whole regions, that has at least that many tokens."""
    return math.ceil((tokens - REGIONS) / 3) / REGIONS


def report(results: dict[int, dict[str, Figures]], arms: Sequence[str], prefix: str = "") -> str:
    """Writes a variant's table: mean and spread over seeds, then every seed."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "top-1 (%)": ("top1", "{:.2f}".format),
        "tokens": ("tokens_mean", "{:.1f}".format),
        "MMACs": ("gmacs_mean", lambda g: f"{1000 * g:.2f}"),
        "content fine": ("content_fine", "{:.3f}".format),
        "plain coarse": ("plain_coarse", "{:.3f}".format),
        "agreement": ("agreement", "{:.3f}".format),
    }
    means, by_seed = [], []
    for arm in arms:
        cells = [arm]
        for key, show in columns.values():
            values = [r[prefix + arm][key] for r in results.values() if key in r[prefix + arm]]
            spread = f" ± {show(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
            cells.append(show(float(np.mean(values))) + spread if values else "")
        means.append(cells)
    for seed, found in results.items():
        rows = [found[prefix + arm] for arm in arms]
        by_seed.append([str(seed), *(f"{r['top1']:.2f} / {r['tokens_mean']:.1f}" for r in rows)])
    first, second = markdown(["model", *columns], means), markdown(["seed", *arms], by_seed)
    return f"{first}\n\nTop-1 and tokens by seed:\n\n{second}"


def checks(results: dict[int, dict[str, Figures]]) -> str:
    """Holds the figures against what the study is to show."""

    def above(arm: str) -> Callable[[dict[str, Figures]], float]:
        return lambda r: r["small: MSViT"]["top1"] - r[f"small: {arm}"]["top1"]

    claims: dict[str, Callable[[dict[str, Figures]], float]] = {
        "share of the tokens": lambda r: r["small: MSViT"]["tokens_mean"] / FINEST,
        "tokens over the target's": lambda r: (
            r["small: MSViT"]["tokens_mean"] / (REGIONS * (1 + 3 * SMALL_TARGET))
        ),
        **{f"top-1 above {arm}, points": above(arm) for arm in SMALL_ARMS[:-1]},
    }
    seeds = list(results)
    rows = []
    for claim, figure in claims.items():
        values = [figure(results[s]) for s in seeds]
        rows.append([claim, with_spread(values), *(f"{value:.3f}" for value in values)])
    return markdown(["MSViT on small digits", "mean", *(f"seed {s}" for s in seeds)], rows)


def run_seeds(
    name: str,
    arms: Callable[[Study], dict[str, Figures]],
    report: Callable[[dict[int, dict[str, Figures]]], str],
) -> dict[int, dict[str, Figures]]:
    """Runs a study's arms with every seed; writes <name>.md and <name>.json.

    Args:
      name: Name of the study.
      arms: Function that trains and evaluates the arms of one seed.
      report: Function that makes the tables from the figures by seed and arm.

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


def main(argv: Sequence[str]) -> None:
    """Runs the study and writes its table."""
    del argv
    results = run_seeds("digits", Study.run, document)
    print(document(results).removeprefix(HEADER))


def document(results: dict[int, dict[str, Figures]]) -> str:
    """The study's page."""
    small = report(results, SMALL_ARMS, "small: ")
    return (
        f"{HEADER}## The default variant\n\n{report(results, ARMS)}\n\n"
        f"## Small digits\n\n{small}\n\n{checks(results)}\n"
    )


HEADER = """# Scattered digits

Made by `make study` (studies/digits.py says what is trained): mean and standard deviation over
seeds, 2,000 validation images, every model after its last step. Tokens and MACs
(multiply-accumulates) are means over images; "content" regions have 5 % or more digit pixels,
"plain" ones less; agreement is the share of positions at which two different images' decisions
agree (1 would be a fixed pattern). Small digits (scattered_digits/small_digits) are 10 to 20 px
instead of 24 to 32: the default ones, scans of 8 x 8 pixels, are as legible at 48 px as at 64, so
that they cannot tell mixed scale from a lower resolution.

"""

if __name__ == "__main__":
    errors.run(main)
