"""The study on photographs: the three systems over a pretrained ViT-S/14.

    python studies/photos.py --weights=DINOV2 --data_dir=DATA --workdir=runs/photos
        [--scale=laptop|gpu] [--seeds=0,1,2] [--arms=msvit,entropy] [--jobs=2]

DINOV2 is a pretrained ViT-S/14 in any format that the library reads, DATA a folder in which
`msvit prepare` made a data set "photos" (train and val). From configs/photos/, for every seed and
all from the same dense model (photos/vit_small.py), for equally many steps:

* longer, lower_98, lower_84, lower_70: the dense model, at 112 px and at lower resolutions
* msvit, msvit_24, msvit_narrow, gate_alone, msvit_light, msvit_free, msvit_mean, msvit_fast:
  learned gates, evaluated at several thresholds; gate_alone over a frozen backbone, the last four
  with less batch shaping, more freedom between places, another coarse embedding, and a gate that
  learns faster
* entropy, random, center, entropy_24: gates that learn nothing, at equal tokens
* mergence, tome, topk, evit: at two thirds of dense's MACs; mergence_half, tome_half: at half
* both: mixed scale, then merged, at half
* dvt_2, dvt_3: cascades, with exits chosen per image
* untrained: dense's weights as they are, in mixed scale or merged, at 112 and 168 px; among its
  gates is that of msvit_narrow and the first seed, beside the backbones of all seeds
* speed: images/s of the main arms through the Predictor, in turns, when all else has ended; random
  weights at the arms' tokens

Thresholds are fitted on training images. Everything is judged after its last step, on the whole
validation split. Each arm is a process of its own; what is done already is not done again, so the
study can be interrupted. Writes photos.json after every arm, photos.md and photos.png at the end.

Cost: --scale=laptop trains for 178 steps of 32 images, some 6 minutes an arm on two CPU cores;
--scale=gpu for five epochs in batches of 128 (the dense model for two before) with the training
split on the device, about a minute an arm, most of it compilation.
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
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from photos_page import SPEED, TARGETS, UNTRAINED, Figures, write_page

from msvit_jax import checkpoint, data, errors, evaluate, pixels, sharding, tree
from msvit_jax import config as configs
from msvit_jax.exits import budget_curve
from msvit_jax.inference import Predictor, calibrate
from msvit_jax.train import loop
from msvit_jax.weights import adapt

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "photos"
FITTED = 1024  # training images that thresholds are fitted on
SAVED = (1.3, 1.6, 2.0)  # dense's MACs over the budgets that exits are chosen for

_WEIGHTS = flags.DEFINE_string(
    "weights", "", "Pretrained ViT-S/14 that the dense model starts from."
)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder with the prepared data set 'photos'.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/photos", "Folder of the runs.")
_OUT = flags.DEFINE_string("out", "", "Folder of photos.json and the gates; default: the workdir.")
_SCALE = flags.DEFINE_enum("scale", "laptop", ["laptop", "gpu"], "Amount of training.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of the runs.")
_ARMS = flags.DEFINE_list("arms", [], "Names of arms to run; default: all.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Number of arms that run at a time.")
_NICE = flags.DEFINE_integer("nice", 10, "Niceness of --warm processes, so that dense is first.")
_WARM = flags.DEFINE_bool(
    "warm", False, "Whether to fill the compilation cache while the dense model trains."
)
_MINUTES = flags.DEFINE_float("minutes", None, "Minutes after which no further arm is begun.")
_ARM = flags.DEFINE_string("arm", "", "Name of the one arm to run in this process.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of --arm.")
_SET = flags.DEFINE_multi_string(
    "set", [], "Config key of all arms, e.g. --set=data.workers=2; may be repeated."
)

# Some epochs in large batches, or as many steps as two cores do in some minutes.
SCALES: dict[str, dict[str, Any]] = {
    "gpu": {
        "batch_size": 128,
        "eval_batch_size": 256,
        "epochs": 5.0,
        "dtype": "bfloat16",
        "data.on_device": True,
    },
    "laptop": {"batch_size": 32, "eval_batch_size": 64, "epochs": 0.6},
}
DENSE_EPOCHS = {"gpu": 2.0, "laptop": 0.6}
SPEED_IMAGES = {"gpu": 2048, "laptop": 256}
RATE = {"gpu": 2.0, "laptop": 1.0}  # the configs' learning rates are for batches of 32


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of the study.

    Attributes:
      config: Name of its config.
      overrides: Keys of the config that differ.
      tokens: Mean number of tokens that an untrained gate's threshold is fitted to before training;
        0 leaves the threshold.
    """

    config: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokens: float = 0.0


def fixed_gate(kind: str, **overrides: Any) -> dict[str, Any]:
    """Keys of a gate that learns nothing."""
    return {"model.gate": kind, "loss.gate.kind": "none", **overrides}


def reduced(reducer: str, **options: Any) -> Arm:
    """An arm with another reducer."""
    given = {f"model.{key}": value for key, value in options.items()}
    return Arm("reduced_small", {"model.reducer": reducer, "model.remove": 0, **given})


SHARE = 0.375  # 34 tokens: the next above 32 that a fixed share of 16 regions can give
NARROW = 96  # channels of a gate of half a megabyte
ARMS = {
    "msvit": Arm("msvit_small"),
    "longer": Arm("vit_small_longer"),
    "lower_84": Arm("vit_small_longer", {"data.image_size": 84}),
    "entropy": Arm("msvit_small", fixed_gate("entropy"), tokens=32),
    "tome_half": reduced("tome", remove=5, reduce_layers=tuple(range(1, 12))),
    "mergence": Arm("mergence_small", {"model.keep": 0.68}),
    "tome": reduced("tome", remove=4, reduce_layers=tuple(range(1, 9))),
    "topk": reduced("topk", keep=0.7),
    "evit": reduced("evit", keep=0.68),
    "both": Arm("msvit_mergence_small", {"loss.gate.target": 2 / 3}),
    "mergence_half": Arm("mergence_small", {"model.keep": 0.5}),
    "msvit_24": Arm("msvit_small", {"loss.gate.target": 1 / 6}),
    "entropy_24": Arm("msvit_small", fixed_gate("entropy"), tokens=24),
    "center": Arm("msvit_small", fixed_gate("center", **{"model.fine_share": SHARE})),
    "random": Arm("msvit_small", fixed_gate("random", **{"model.fine_share": SHARE})),
    "dvt_3": Arm("dvt_small"),
    "dvt_2": Arm("dvt_small", {"model.grid_sizes": (5, 8)}),
    "lower_98": Arm("vit_small_longer", {"data.image_size": 98}),
    "lower_70": Arm("vit_small_longer", {"data.image_size": 70}),
    "msvit_narrow": Arm("msvit_small", {"model.gate_hidden": NARROW}),
    "gate_alone": Arm("msvit_small_gate", {"model.gate_hidden": NARROW}),
    "msvit_light": Arm("msvit_small", {"model.gate_hidden": NARROW, "loss.gate.weight": 0.5}),
    "msvit_free": Arm("msvit_small", {"loss.gate.sigma": 0.3}),
    "msvit_mean": Arm("msvit_small", {"model.coarse_embedding": "mean"}),
    "msvit_fast": Arm(
        "msvit_small", {"loss.gate.sigma": 0.3, "optimizer.gate_learning_rate": 1e-2}
    ),
}
LAST = (UNTRAINED, SPEED)  # what needs trained arms
# Arms whose speed is measured, and the share of images that leave at a cascade's first exit.
TIMED = (
    *("dense", "lower_98", "lower_84", "lower_70", "msvit", "msvit_24", "entropy", "mergence"),
    *("tome", "mergence_half", "tome_half", "both", "dvt_2"),
)
LEAVE = {"dvt_2": 0.81}


# --- one arm, in a process of its own -------------------------------------------------------------


def make_config(arm: Arm, seed: int, start: str, **overrides: Any) -> Any:
    """The config of an arm at the study's scale."""
    file = str(CONFIGS / f"{arm.config}.py")
    optimizer, scale = configs.load(file).optimizer, SCALES[_SCALE.value]
    rates = ("learning_rate", "gate_learning_rate")
    faster = {
        f"optimizer.{rate}": optimizer[rate] * RATE[_SCALE.value]
        for rate in rates
        if optimizer[rate]
    }
    given = {
        **scale,
        **faster,
        "eval_every_epochs": 1000.0,  # after the last step
        "checkpoint.keep_latest": 1,
        "log_images": 0,
        "data.data_dir": _DATA_DIR.value,
        "seed": seed,
        "init_from": start,
        **arm.overrides,
        **dict(map(configs.split_override, _SET.value)),
        **overrides,
    }
    return configs.load(file, given)


def probabilities(model: Any, params: Any, config: Any) -> np.ndarray:
    """The gate's probabilities of staying coarse on training images: [FITTED, R]."""

    def run(params: Any, images: jax.Array) -> jax.Array:
        images = pixels.normalize(images, model.mean, model.std)
        return jax.nn.sigmoid(model.apply({"params": params}, images, method="gate_logits"))

    step = jax.jit(run)
    split = f"train[:{FITTED}]"
    batches = data.eval_batches(config.data, batch_size=config.eval_batch_size, split=split)
    return np.concatenate([np.asarray(step(params, b["image"]))[b["valid"]] for b in batches])


class Judge:
    """Evaluates one model's parameters at thresholds fitted to numbers of tokens."""

    def __init__(self, model: Any, params: Any, config: Any) -> None:
        mesh = sharding.make_mesh()
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._model, self._config = model, config
        size = config.eval_batch_size
        self._evaluate = evaluate.Evaluator(model, config.data, batch_size=size, mesh=mesh)

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


def train_arm(name: str, arm: Arm, seed: int) -> Figures:
    """Trains and judges one arm; returns its figures."""
    start = _WEIGHTS.value if _WARM.value or name == "dense" else str(workdir("dense", seed))
    overrides: dict[str, Any] = {}
    if _WARM.value:
        os.nice(_NICE.value)
        overrides = {"steps": 1, "data.eval_split": "val[:64]"}
    if name == "dense":
        overrides["epochs"] = DENSE_EPOCHS[_SCALE.value]
    config = make_config(arm, seed, start, **overrides)
    if arm.tokens:
        model = configs.build_model(configs.resolve(config, 10))
        found = probabilities(model, {}, config)
        fitted = calibrate.threshold_for(found, arm.tokens).threshold
        config = make_config(arm, seed, start, **overrides, **{"model.threshold": fitted})
    figures = loop.train(config, workdir(name, seed))
    if "top1" not in figures:
        raise errors.UserError(f"{name} was stopped; the same command goes on with it.")
    return {"figures": figures}


def after_training(name: str, arm: Arm, seed: int) -> Figures:
    """What is asked of a trained arm besides its evaluation: thresholds, exits; saves the gate."""
    folder = workdir(name, seed)
    config = checkpoint.read_config(folder)
    model = configs.build_model(config)
    params, _ = adapt.params_for(model, checkpoint.load_params(folder, "latest"))
    figures: Figures = {}
    if arm.config.startswith("dvt"):
        dense = configs.build_model(checkpoint.read_config(workdir("dense", seed)))
        macs = float(dense.macs(dense.grid_size**2)) / 1e9
        mesh = sharding.make_mesh()
        figures["curve"] = budget_curve.curve_of_run(
            model,
            jax.device_put(params, sharding.replicated(mesh)),
            folder,
            split=None,
            batch_size=config.eval_batch_size,
            mesh=mesh,
            data_config=config.data,
            gmacs_budgets=[macs / saved for saved in SAVED],
            fit_examples=FITTED,
        )
    elif name == "dense":
        save_half(f"dense_{seed}.npz", params)
    elif "gate_mlp" in params:
        save_half(f"gate_{name}_{seed}.npz", params["gate_mlp"])
        figures["at_tokens"] = Judge(model, params, config).at_tokens(TARGETS)
    return figures


def save_half(file: str, params: Any) -> None:
    """Saves parameters in float16, to be used elsewhere."""
    flat = tree.flat_names(params)
    np.savez(out() / file, **{name: np.asarray(x, np.float16) for name, x in flat.items()})


def judge_untrained(seed: int) -> Figures:
    """Evaluates dense's weights in mixed scale, merged, and at lower resolutions."""
    source = tree.flat_names(checkpoint.load_params(workdir("dense", seed), "latest"))
    found: Figures = {}

    def judged(arm: Arm, gate: Mapping[str, np.ndarray] | None = None) -> Judge:
        config = configs.resolve(make_config(arm, seed, ""), 10)
        model = configs.build_model(config)
        image = np.zeros((1, model.image_size, model.image_size, 3), np.float32)
        fresh = jax.jit(model.init)(jax.random.key(0), image)["params"]
        weights: dict[str, np.ndarray] = dict(source)
        if gate:  # names beside a backbone; a plain model's alone would be moved below it
            weights = {f"backbone/{name}": x for name, x in source.items()} | dict(gate)
        taken, report = adapt.adapt_weights(weights, fresh)
        assert not report.unused, report.unused
        params = tree.map_names(lambda name, leaf: taken.get(name, leaf), fresh)
        return Judge(model, params, config)

    tokens = (32.0, 38.4, 48.0)
    for embedding in ("shared", "mean"):
        given = fixed_gate("entropy", **{"model.coarse_embedding": embedding})
        found[f"entropy, {embedding}"] = judged(Arm("msvit_small", given)).at_tokens(tokens)
    for kind in ("random", "center"):
        rows = []
        for count in tokens:
            share = round((count - 16) / 3) / 16
            rows.append(
                judged(Arm("msvit_small", fixed_gate(kind, **{"model.fine_share": share})))()
            )
        found[kind] = rows
    for size in (98, 84, 70):
        found[f"lower_{size}"] = [judged(Arm("vit_small", {"data.image_size": size}))()]
    for name in ("tome", "tome_half", "topk", "evit"):
        found[name] = [judged(ARMS[name])()]
    # A gate that learned beside one backbone, beside another, and at a resolution it never saw.
    file = out() / "gate_msvit_narrow_0.npz"
    larger = {"data.image_size": 168}
    found["dense, 168 px"] = [judged(Arm("vit_small", larger))()]
    given = fixed_gate("entropy", **larger)
    found["entropy, 168 px"] = judged(Arm("msvit_small", given)).at_tokens((72.0, 90.0))
    if file.exists():
        gate = {f"gate_mlp/{k}": np.asarray(v, np.float32) for k, v in np.load(file).items()}
        narrow = {"model.gate_hidden": NARROW}
        found["gate of msvit_narrow 0"] = judged(Arm("msvit_small", narrow), gate).at_tokens(tokens)
        wide = judged(Arm("msvit_small", narrow | larger), gate)
        found["gate of msvit_narrow 0, 168 px"] = wide.at_tokens((72.0, 90.0))
    return {"figures": found}


def measure_speed(seed: int) -> Figures:
    """Measures images/s of the main arms through a Predictor, in turns, warm.

    Random weights: the speed depends on them through tokens and exits alone, which are set as the
    arms have them.
    """
    batch = SCALES[_SCALE.value]["eval_batch_size"]
    pixels_of: dict[int, np.ndarray] = {}

    def ready(name: str) -> Predictor:
        arm = ARMS.get(name, Arm("vit_small"))
        config = configs.resolve(make_config(arm, seed, ""), 10)
        model = configs.build_model(config)
        size = model.image_size
        if size not in pixels_of:
            batches = data.eval_batches(config.data, batch_size=64)
            enough = itertools.islice(batches, SPEED_IMAGES[_SCALE.value] // 64)
            pixels_of[size] = np.concatenate([b["image"] for b in enough])
        variables = jax.jit(model.init)(jax.random.key(seed), np.zeros((1, size, size, 3)))
        predictor = Predictor(model, variables, batch_size=batch)
        if model.has_threshold:
            regions = model.num_regions
            tokens = arm.tokens or regions * (1 + 3 * config.loss.gate.target)
            predictor.calibrate(pixels_of[size], tokens)
        if name in LEAVE:
            certain = predictor.certainty(pixels_of[size])[:, 0]
            predictor.thresholds = (float(np.quantile(certain, 1 - LEAVE[name])),)
        return predictor

    predictors = {name: ready(name) for name in TIMED}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # compiles, side by side
        run = lambda p: p(pixels_of[p.model.image_size])  # noqa: E731
        list(pool.map(run, predictors.values()))
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(7):
        for name, predictor in predictors.items():
            begun = time.perf_counter()
            predictor(pixels_of[predictor.model.image_size])
            seconds[name].append(time.perf_counter() - begun)
    found: Figures = {}
    for name, predictor in predictors.items():
        rates = len(pixels_of[predictor.model.image_size]) / np.asarray(seconds[name])
        low, middle, high = np.quantile(rates, (0.25, 0.5, 0.75))
        found[name] = {"images_per_second": middle, "quartiles": [low, high], "batch": batch}
    return {"figures": found}


def run_one() -> None:
    """Runs the arm of this process and writes its result."""
    name, seed = _ARM.value, _SEED.value
    begun = time.perf_counter()
    if name == UNTRAINED:
        figures = judge_untrained(seed)
    elif name == SPEED:
        figures = measure_speed(seed)
    else:
        arm = Arm("vit_small") if name == "dense" else ARMS[name]
        figures = train_arm(name, arm, seed)
        figures["train_seconds"] = time.perf_counter() - begun
        if not _WARM.value:
            figures |= after_training(name, arm, seed)
    figures["seconds"] = time.perf_counter() - begun
    result_file(name, seed).write_text(json.dumps(figures))


# --- the study ------------------------------------------------------------------------------------


def workdir(name: str, seed: int) -> pathlib.Path:
    """Folder of a run."""
    return pathlib.Path(_WORKDIR.value) / ("warm" if _WARM.value else name) / f"{name}_{seed}"


def result_file(name: str, seed: int) -> pathlib.Path:
    """File of an arm's figures."""
    return workdir(name, seed).with_suffix(".json")


def out() -> pathlib.Path:
    """Folder of the study's files."""
    folder = pathlib.Path(_OUT.value or _WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Runner:
    """Runs arms as processes and collects their figures."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self.results: dict[str, dict[str, Figures]] = {}

    def run(self, name: str, seed: int, *, warm: bool = False) -> bool:
        """Runs one arm unless that is done; tells whether it has figures."""
        flag = ["--warm"] if warm else []
        result = pathlib.Path(_WORKDIR.value) / ("warm" if warm else name) / f"{name}_{seed}.json"
        if not result.exists():
            if _MINUTES.value and time.perf_counter() - self._begun > 60 * _MINUTES.value:
                return False
            result.parent.mkdir(parents=True, exist_ok=True)
            own = [f"--arm={name}", f"--seed={seed}", *flag]
            given = [a for a in sys.argv[1:] if not a.startswith(("--arm", "--seed", "--warm"))]
            with result.with_suffix(".log").open("w") as log:
                command = [sys.executable, __file__, *given, *own]
                subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if not result.exists():
            print(f"{name}, seed {seed} failed; see {result.with_suffix('.log')}", flush=True)
            return False
        if not warm:
            found = json.loads(result.read_text())
            self.results.setdefault(name, {})[str(seed)] = found
            self._show(name, seed, found)
            (out() / "photos.json").write_text(json.dumps(self.results, indent=1) + "\n")
        return True

    def _show(self, name: str, seed: int, found: Figures) -> None:
        passed = time.perf_counter() - self._begun
        figures = found["figures"]
        text = (
            f"top-1 {figures['top1']:.2f} at {figures['tokens_mean']:.1f} tokens"
            if "top1" in figures
            else ""
        )
        print(
            f"{passed:5.0f} s  {name}, seed {seed}: {text} ({found['seconds']:.0f} s)", flush=True
        )


def run_all() -> None:
    """Runs the dense models, then the arms, seed by seed."""
    names = _ARMS.value or [*ARMS, *LAST]
    seeds = [int(seed) for seed in _SEEDS.value]
    runner = Runner()
    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
        dense = {seed: pool.submit(runner.run, "dense", seed) for seed in seeds}
        trained = [name for name in names if name not in LAST]
        if _WARM.value:
            concurrent.futures.wait([pool.submit(runner.run, n, 0, warm=True) for n in trained])
        for last in ([], [UNTRAINED]):
            waited = [
                pool.submit(runner.run, name, seed)
                for seed in seeds
                if dense[seed].result()
                for name in (last or trained)
                if name in names
            ]
            concurrent.futures.wait(waited)
    if SPEED in names:
        runner.run(SPEED, seeds[0])  # alone
    if "dense" in runner.results:
        write_page(runner.results, out())
    print(f"written: {out() / 'photos.json'}, photos.md, photos.png")


def main(argv: Sequence[str]) -> None:
    """The command."""
    errors.refuse_arguments(argv)
    if unknown := set(_ARMS.value) - {*ARMS, *LAST}:
        known = ", ".join([*ARMS, *LAST])
        raise errors.UserError(f"--arms={','.join(sorted(unknown))}: there are {known}.")
    if not _DATA_DIR.value or not _WEIGHTS.value:
        raise errors.UserError("Give --weights=DINOV2 and --data_dir=DATA; see the docstring.")
    run_one() if _ARM.value else run_all()


if __name__ == "__main__":
    errors.run(main)
