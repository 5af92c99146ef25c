"""What studies of many arms share: each arm is a process, judged and written down as it ends.

A study is a script that gives `main` a `Study`. All its arms start from the same dense model, are
trained for equally many steps and judged after the last one. What is done already is not done
again.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from msvit_jax import config as configs
from msvit_jax import data, drawing, errors, evaluate, pixels, sharding, tree
from msvit_jax.inference import Predictor, calibrate
from msvit_jax.train import loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
FITTED = 1024  # training images that thresholds are fitted on, at most
ROUNDS = 7  # of measurements of speed
Figures = dict[str, Any]

WEIGHTS = flags.DEFINE_string(
    "weights", "", "Pretrained ViT-S/14 that the dense model starts from."
)
DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder with the study's prepared data set.")
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the runs; default: runs/ and the study.")
OUT = flags.DEFINE_string("out", "", "Folder of figures, page and gates; default: the workdir.")
SCALE = flags.DEFINE_enum("scale", "laptop", ["laptop", "gpu"], "Amount of training.")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of the runs.")
ARMS = flags.DEFINE_list("arms", [], "Names of arms to run; default: all.")
JOBS = flags.DEFINE_integer("jobs", 1, "Number of arms that run at a time.")
NICE = flags.DEFINE_integer("nice", 10, "Niceness of --warm processes, so that dense is first.")
WARM = flags.DEFINE_bool(
    "warm", False, "Whether to fill the compilation cache while the dense model trains."
)
MINUTES = flags.DEFINE_float("minutes", None, "Minutes after which no further arm is begun.")
ARM = flags.DEFINE_string("arm", "", "Name of the one arm to run in this process.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of --arm.")
SET = flags.DEFINE_multi_string(
    "set", [], "Config key of all arms, e.g. --set=data.workers=2; may be repeated."
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of a study.

    Attributes:
      config: Name of its config.
      overrides: Keys of the config that differ.
      tokens: Mean number of tokens that an untrained gate's threshold is fitted to before training;
        0 leaves the threshold.
      gate_of: Name of the arm whose gate, of the first seed, this one starts with and keeps.
      once: Whether the first seed is enough.
    """

    config: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokens: float = 0.0
    gate_of: str = ""
    once: bool = False

    def wanted(self, *, first: bool) -> bool:
        """Tells whether the arm is run with the first seed, or with another."""
        own = self.gate_of and "data.image_size" not in self.overrides  # nothing would be moved
        return not own if first else not self.once


@dataclasses.dataclass(frozen=True)
class Study:
    """A study's arms, and what it does with them.

    Attributes:
      name: Name of its folder of configs, of its figures and of its page.
      script: Path of the script, which runs an arm with --arm.
      dense: Arm that all others start from.
      dense_epochs: Epochs of that arm at each scale.
      arms: Arms by name.
      last: Names of what needs trained arms and runs beside its kind.
      alone: Names of what runs when all else has ended, such as measurements of speed.
      scales: Config keys of all arms at each scale.
      rate: Factor of the configs' learning rates at each scale.
      classes: Number of classes.
      best_by: Figure that arms are judged by, in percent.
      warm_split: Split that --warm processes evaluate.
      write_page: Function that writes page and plot from the figures of all arms into a folder.
    """

    name: str
    script: str
    dense: Arm
    dense_epochs: Mapping[str, float]
    arms: Mapping[str, Arm]
    last: Sequence[str]
    alone: Sequence[str]
    scales: Mapping[str, Mapping[str, Any]]
    rate: Mapping[str, float]
    classes: int
    best_by: str
    warm_split: str
    write_page: Callable[[Mapping[str, Mapping[str, Figures]], pathlib.Path], None]

    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return [int(seed) for seed in SEEDS.value]

    @property
    def root(self) -> pathlib.Path:
        """Folder of the runs."""
        return pathlib.Path(WORKDIR.value or f"runs/{self.name}")

    def workdir(self, name: str, seed: int, *, warm: bool | None = None) -> pathlib.Path:
        """Folder of a run; `warm` None for this process's kind."""
        warm = WARM.value if warm is None else warm
        return self.root / ("warm" if warm else name) / f"{name}_{seed}"

    def out(self) -> pathlib.Path:
        """Folder of the study's files."""
        folder = pathlib.Path(OUT.value or self.root)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def arm(self, name: str) -> Arm:
        """An arm by name, the dense model among them."""
        return self.dense if name == "dense" else self.arms[name]

    def config(self, arm: Arm, seed: int, start: str, **overrides: Any) -> Any:
        """The config of an arm at the study's scale."""
        file = str(ROOT / "configs" / self.name / f"{arm.config}.py")
        optimizer = configs.load(file).optimizer
        rates = ("learning_rate", "encoder_learning_rate", "gate_learning_rate")
        given = {
            **self.scales[SCALE.value],
            **{
                f"optimizer.{rate}": optimizer[rate] * self.rate[SCALE.value]
                for rate in rates
                if optimizer[rate]
            },
            "eval_every_epochs": 1000.0,  # after the last step
            "checkpoint.keep_latest": 1,
            "log_images": 0,
            "data.data_dir": DATA_DIR.value,
            "seed": seed,
            "init_from": start,
            **arm.overrides,
            **dict(map(configs.split_override, SET.value)),
            **overrides,
        }
        return configs.load(file, given)

    def resolved(self, arm: Arm, seed: int, **overrides: Any) -> Any:
        """The config of an arm with the sizes that the data decide, and no start."""
        return configs.resolve(self.config(arm, seed, "", **overrides), self.classes)

    def start(self, name: str, seed: int) -> str:
        """What an arm starts from: the dense run, or the pretrained weights."""
        fresh = WARM.value or name == "dense"
        return WEIGHTS.value if fresh else str(self.workdir("dense", seed))

    def train(
        self, name: str, arm: Arm, seed: int, start: str, **overrides: Any
    ) -> tuple[Any, Figures]:
        """Trains and judges one arm; returns its config and figures.

        Raises:
          UserError: The run was stopped before its end.
        """
        if WARM.value:
            os.nice(NICE.value)
            overrides |= {"steps": 1, "data.eval_split": self.warm_split}
        if name == "dense":
            overrides["epochs"] = self.dense_epochs[SCALE.value]
        if arm.tokens and "model.threshold" not in overrides:
            config = self.resolved(arm, seed, **overrides)
            found = probabilities(configs.build_model(config), {}, config)
            fitted = calibrate.threshold_for(found, arm.tokens).threshold
            overrides["model.threshold"] = fitted
        config = self.config(arm, seed, start, **overrides)
        figures = loop.train(config, self.workdir(name, seed))
        if self.best_by not in figures:
            raise errors.UserError(f"{name} was stopped; the same command goes on with it.")
        return config, {"figures": figures}


def probabilities(model: Any, params: Any, config: Any) -> np.ndarray:
    """The gate's probabilities of staying coarse on training images: [images or windows, R]."""

    def run(params: Any, images: jax.Array) -> jax.Array:
        images = pixels.normalize(images, model.mean, model.std)
        decided = model.apply({"params": params}, images, method="gate_only")
        return jax.nn.sigmoid(decided.logits)

    step = jax.jit(run)
    how = {"batch_size": config.eval_batch_size, "patch_size": model.patch_size}
    count = min(FITTED, data.dataset_info(config.data).train_examples)
    batches = data.eval_batches(config.data, split=f"train[:{count}]", **how)
    return np.concatenate([np.asarray(step(params, b["image"]))[b["valid"]] for b in batches])


class Judge:
    """Evaluates one model's parameters at thresholds fitted to numbers of tokens."""

    def __init__(self, model: Any, params: Any, config: Any, split: str | None = None) -> None:
        mesh = sharding.make_mesh()
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._model, self._config = model, config
        how = {"batch_size": config.eval_batch_size, "mesh": mesh, "split": split}
        self._evaluate = evaluate.Evaluator(model, config.data, **how)

    def __call__(self, threshold: float | None = None) -> Figures:
        """Evaluates at a threshold; None for the model's own."""
        return self._evaluate(self._params, threshold).figures

    def at_tokens(self, targets: Sequence[float]) -> list[Figures]:
        """Evaluates at thresholds that are fitted to mean numbers of tokens."""
        found = probabilities(self._model, self._params, self._config)
        rows = []
        for tokens in targets:
            fitted = calibrate.threshold_for(found, tokens)
            rows.append({"asked": tokens, **dataclasses.asdict(fitted), **self(fitted.threshold)})
        return rows


def save_half(file: pathlib.Path, params: Any) -> None:
    """Saves parameters in float16, to be used elsewhere."""
    flat = tree.flat_names(params)
    np.savez(file, **{name: np.asarray(x, np.float16) for name, x in flat.items()})


def load_gate(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Loads a gate's parameters that `save_half` saved, by their names in a model."""
    with np.load(file) as arrays:
        return {f"gate_mlp/{name}": np.float32(arrays[name]) for name in arrays.files}


def untrained(study: Study, arm: Arm, seed: int, count: int) -> tuple[Predictor, np.ndarray]:
    """A Predictor with random weights and as many tokens as an arm has, to measure its speed.

    Weights change the speed through tokens and exits alone; a gate's threshold is set for the
    arm's tokens.

    Args:
      study: The study.
      arm: The arm.
      seed: Seed of the weights.
      count: Number of images, or of windows of a segmenter.

    Returns:
      The Predictor, and its images: uint8 [count, H, W, 3].
    """
    config = study.resolved(arm, seed)
    model = configs.build_model(config)
    batch = config.eval_batch_size
    made = data.eval_batches(config.data, batch_size=batch, patch_size=model.patch_size)
    images = (image for each in made for image in each["image"][each["valid"]])
    pixels = np.stack(list(itertools.islice(images, count)))
    image = np.zeros((1, *model.image_shape), np.float32)
    variables = drawing.variables(model, jax.random.key(seed), image)
    predictor = Predictor(model, variables, batch_size=batch)
    if model.has_threshold:
        shaped = model.num_regions * (1 + 3 * config.loss.gate.target)
        predictor.calibrate(pixels, arm.tokens or shaped, fit_buckets=True)
    return predictor, pixels


def rates(runs: Mapping[str, Callable[[], Any]], images: Mapping[str, int]) -> Figures:
    """Measures images/s of several runs in turns: medians and quartiles over rounds.

    Args:
      runs: Functions that answer all images of a run.
      images: Number of images of each.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:  # compiles, side by side
        list(pool.map(lambda run: run(), runs.values()))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    found: Figures = {}
    for name, taken in seconds.items():
        low, middle, high = np.quantile(images[name] / np.asarray(taken), (0.25, 0.5, 0.75))
        found[name] = {"images_per_second": middle, "quartiles": [low, high]}
    return found


class Runner:
    """Runs arms as processes and collects their figures."""

    def __init__(self, study: Study) -> None:
        self._study, self._begun = study, time.perf_counter()
        self.results: dict[str, dict[str, Figures]] = {}

    def run(self, name: str, seed: int, *, warm: bool = False) -> bool:
        """Runs one arm unless that is done; tells whether it has figures."""
        study, flag = self._study, ["--warm"] if warm else []
        result = _result_file(study, name, seed, warm=warm)
        if not result.exists():
            if MINUTES.value and time.perf_counter() - self._begun > 60 * MINUTES.value:
                return False
            result.parent.mkdir(parents=True, exist_ok=True)
            own = [f"--arm={name}", f"--seed={seed}", *flag]
            given = [a for a in sys.argv[1:] if not a.startswith(("--arm", "--seed", "--warm"))]
            with result.with_suffix(".log").open("w") as log:
                command = [sys.executable, study.script, *given, *own]
                subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if not result.exists():
            print(f"{name}, seed {seed} failed; see {result.with_suffix('.log')}", flush=True)
            return False
        if not warm:
            found = json.loads(result.read_text())
            self.results.setdefault(name, {})[str(seed)] = found
            self._show(name, seed, found)
            text = json.dumps(self.results, indent=1) + "\n"
            (study.out() / f"{study.name}.json").write_text(text)
        return True

    def _show(self, name: str, seed: int, found: Figures) -> None:
        passed, best_by = time.perf_counter() - self._begun, self._study.best_by
        figures, text = found["figures"], ""
        if best_by in figures:
            title = evaluate.QUALITY[best_by].removesuffix(" (%)")
            text = f"{title} {figures[best_by]:.2f} at {figures['tokens_mean']:.1f} tokens"
        print(
            f"{passed:5.0f} s  {name}, seed {seed}: {text} ({found['seconds']:.0f} s)", flush=True
        )


def _result_file(study: Study, name: str, seed: int, *, warm: bool | None = None) -> pathlib.Path:
    folder = study.workdir(name, seed, warm=warm)
    return folder.with_name(f"{folder.name}.json")


def _run_all(study: Study) -> None:
    """Runs the dense models, then the arms, seed by seed."""
    names = ARMS.value or [*study.arms, *study.last, *study.alone]
    seeds, runner = study.seeds(), Runner(study)
    with concurrent.futures.ThreadPoolExecutor(JOBS.value) as pool:
        dense = {seed: pool.submit(runner.run, "dense", seed) for seed in seeds}
        trained = [name for name in names if name in study.arms]
        beside = max(0, JOBS.value - len(seeds)) if WARM.value else 0  # what the dense ones leave
        warm = {n: pool.submit(runner.run, n, 0, warm=True) for n in trained[:beside]}
        began: dict[tuple[str, int], concurrent.futures.Future[None]] = {}

        def run(name: str, seed: int) -> None:
            gate_of = study.arms[name].gate_of if name in study.arms else ""
            for before in (warm.get(name), began.get((gate_of, seeds[0]))):
                if before:  # which the pool took up earlier
                    before.result()
            runner.run(name, seed)

        for group in (trained, [name for name in names if name in study.last]):
            for seed in seeds:
                for name in group if dense[seed].result() else ():
                    if name in study.last or study.arms[name].wanted(first=seed == seeds[0]):
                        began[name, seed] = pool.submit(run, name, seed)
            concurrent.futures.wait(began.values())
    if "dense" in runner.results:
        for name in study.alone:
            if name in names:
                runner.run(name, seeds[0])
        study.write_page(runner.results, study.out())
        print(f"written: {study.out() / study.name}.json, {study.name}.md, {study.name}.png")


def main(argv: Sequence[str], study: Study, run_arm: Callable[[str, int], Figures]) -> None:
    """The command: all arms, or with --arm the one of this process.

    Args:
      argv: Arguments that are no flags; there are none.
      study: The study.
      run_arm: Function that runs what has a name, for a seed, and returns its figures.
    """
    errors.refuse_arguments(argv)
    known = [*study.arms, *study.last, *study.alone]
    if unknown := set(ARMS.value) - set(known):
        raise errors.UserError(f"--arms={','.join(sorted(unknown))}: there are {', '.join(known)}.")
    if not DATA_DIR.value or not WEIGHTS.value:
        raise errors.UserError("Give --weights=DINOV2 and --data_dir=DATA; see the docstring.")
    if not ARM.value:
        _run_all(study)
        return
    begun, result = time.perf_counter(), _result_file(study, ARM.value, SEED.value)
    result.parent.mkdir(parents=True, exist_ok=True)  # before anything that takes long
    figures = run_arm(ARM.value, SEED.value)
    figures["seconds"] = time.perf_counter() - begun
    result.write_text(json.dumps(figures))
