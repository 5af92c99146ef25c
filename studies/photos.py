"""The study on photographs: the three systems over a pretrained ViT-S/14.

    python studies/photos.py --weights=DINOV2 --data_dir=DATA --workdir=runs/photos
        [--scale=laptop|gpu] [--seeds=0,1,2] [--arms=msvit,entropy] [--jobs=2]

DINOV2 is a pretrained ViT-S/14 in any format that the library reads, DATA a folder in which
`msvit prepare` made a data set "photos" (train and val). From configs/photos/, for every seed and
all from the same dense model (photos/vit_small.py), for equally many steps:

* longer, lower_98, lower_84, lower_70: the dense model, at 112 px and at lower resolutions
* msvit, msvit_24, msvit_narrow, gate_frozen: learned gates, evaluated at several thresholds
* entropy, random, center, entropy_24: gates that learn nothing, at equal tokens
* mergence, tome, topk, evit: at two thirds of dense's MACs; mergence_half, tome_half: at half
* both: mixed scale, then merged, at half
* dvt_2, dvt_3: cascades, with exits chosen per image
* untrained: dense's weights as they are, in mixed scale or merged

Thresholds are fitted on training images. Everything is judged after its last step, on the whole
validation split. Each arm is a process of its own; what is done already is not done again, so the
study can be interrupted. Writes photos.json after every arm, photos.md and photos.png at the end.

Cost: --scale=laptop trains for 178 steps of 32 images, some 6 minutes an arm on two CPU cores;
--scale=gpu for two epochs in batches of 128, a minute or two an arm, most of it compilation.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib import pyplot
from tables import markdown, with_spread

from msvit_jax import checkpoint, data, errors, evaluate, sharding, tree
from msvit_jax import config as configs
from msvit_jax.exits import budget_curve
from msvit_jax.inference import calibrate
from msvit_jax.train import loop
from msvit_jax.weights import adapt

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "photos"
FITTED = 1024  # training images that thresholds are fitted on
TARGETS = (24.0, 25.0, 32.0, 34.0, 38.4, 40.0, 48.0)  # mean tokens of 64
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
_WARM = flags.DEFINE_bool(
    "warm", False, "Whether to fill the compilation cache while the dense model trains."
)
_MINUTES = flags.DEFINE_float("minutes", None, "Minutes after which no further arm is begun.")
_ARM = flags.DEFINE_string("arm", "", "Name of the one arm to run in this process.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of --arm.")
_SET = flags.DEFINE_multi_string(
    "set", [], "Config key of all arms, e.g. --set=data.workers=2; may be repeated."
)

Figures = dict[str, Any]
# Two epochs in large batches, or as many steps as two cores do in some minutes.
SCALES: dict[str, dict[str, Any]] = {
    "gpu": {"batch_size": 128, "eval_batch_size": 256, "epochs": 2.0, "dtype": "bfloat16"},
    "laptop": {"batch_size": 32, "eval_batch_size": 64, "epochs": 0.6},
}
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
    "gate_frozen": Arm("msvit_small_gate", {"model.gate_hidden": NARROW}),
}
UNTRAINED = "untrained"


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
        "eval_every_epochs": scale["epochs"],
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
        images = evaluate.normalize(images, model.mean, model.std)
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
        overrides = {"steps": 1, "data.eval_split": "val[:64]"}
    config = make_config(arm, seed, start, **overrides)
    if arm.tokens:
        model = configs.build_model(configs.resolve(config, 10))
        found = probabilities(model, {}, config)
        fitted = calibrate.threshold_for(found, arm.tokens).threshold
        config = make_config(arm, seed, start, **overrides, **{"model.threshold": fitted})
    return {"figures": loop.train(config, workdir(name, seed))}


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
    folder = workdir("dense", seed)
    source = tree.flat_names(checkpoint.load_params(folder, "latest"))
    found: Figures = {}

    def judged(arm: Arm) -> Judge:
        config = make_config(arm, seed, "")
        config = configs.resolve(config, 10)
        model = configs.build_model(config)
        fresh = model.init(
            jax.random.key(0), np.zeros((1, *(model.image_size,) * 2, 3), np.float32)
        )
        taken, _ = adapt.adapt_weights(source, fresh["params"])
        params = tree.map_names(lambda name, leaf: taken.get(name, leaf), fresh["params"])
        return Judge(model, params, config)

    tokens = (32.0, 38.4, 48.0)
    for embedding in ("shared", "mean"):
        arm = Arm("msvit_small", fixed_gate("entropy", **{"model.coarse_embedding": embedding}))
        found[f"entropy, {embedding}"] = judged(arm).at_tokens(tokens)
    for kind in ("random", "center"):
        shares = {"model.fine_share": 0.0}
        rows = []
        for count in tokens:
            shares["model.fine_share"] = round((count - 16) / 3) / 16
            rows.append(judged(Arm("msvit_small", fixed_gate(kind, **shares)))())
        found[kind] = rows
    for size in (98, 84, 70):
        found[f"lower_{size}"] = [judged(Arm("vit_small", {"data.image_size": size}))()]
    for name in ("tome", "tome_half", "topk", "evit"):
        found[name] = [judged(ARMS[name])()]
    return {"figures": found}


def run_one() -> None:
    """Runs the arm of this process and writes its result."""
    name, seed = _ARM.value, _SEED.value
    begun = time.perf_counter()
    if name == UNTRAINED:
        figures = judge_untrained(seed)
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


# --- the page -------------------------------------------------------------------------------------


def points(results: Mapping[str, Mapping[str, Figures]]) -> dict[str, list[tuple[float, ...]]]:
    """(tokens, GMACs, top-1 of each seed ...) of each arm as it was trained."""
    found = {}
    for name, by_seed in results.items():
        rows = [f["figures"] for f in by_seed.values() if "top1" in f["figures"]]
        if rows:
            tokens, macs = (
                float(np.mean([r[k] for r in rows])) for k in ("tokens_mean", "gmacs_mean")
            )
            found[name] = [(tokens, macs, *(r["top1"] for r in rows))]
    return found


def write_page(results: Mapping[str, Mapping[str, Figures]]) -> None:
    """Writes photos.md and photos.png from the figures of all arms."""
    trained = points(results)
    dense = trained["dense"][0][1]
    rows = [
        [name, f"{tokens:.1f}", f"{macs / dense:.3f}", with_spread(top1), str(len(top1))]
        for name, ((tokens, macs, *top1),) in trained.items()
    ]
    head = ["arm", "tokens", "MACs over dense's", "top-1 (%)", "seeds"]
    parts = [HEADER, markdown(head, rows)]
    if learned := [n for n, f in results.items() if any("at_tokens" in x for x in f.values())]:
        head = ["tokens asked for", *learned]
        cells = [[f"{target:g}", *(_at(results[n], target) for n in learned)] for target in TARGETS]
        parts += [THRESHOLDS, markdown(head, cells)]
    if cascades := [n for n, f in results.items() if any("curve" in x for x in f.values())]:
        parts += [EXITS, markdown(["cascade", "", "GMACs", "top-1 (%)"], _exits(results, cascades))]
    if found := results.get(UNTRAINED):
        figures = next(iter(found.values()))["figures"]
        cells = [
            [name, f"{r['tokens_mean']:.1f}", f"{r['gmacs_mean'] / dense:.3f}", f"{r['top1']:.2f}"]
            for name, judged in figures.items()
            for r in judged
        ]
        parts += [
            AS_IT_IS,
            markdown(["dense's weights", "tokens", "MACs over dense's", "top-1 (%)"], cells),
        ]
    (out() / "photos.md").write_text("\n\n".join(parts) + "\n")
    draw(trained, dense)


def _at(by_seed: Mapping[str, Figures], target: float) -> str:
    rows = [r for f in by_seed.values() for r in f.get("at_tokens", []) if r["asked"] == target]
    if not rows:
        return ""
    tokens = np.mean([r["tokens_mean"] for r in rows])
    return f"{with_spread([r['top1'] for r in rows])} at {tokens:.1f}"


def _exits(results: Mapping[str, Mapping[str, Figures]], names: Sequence[str]) -> list[list[str]]:
    rows = []
    for name in names:
        curves = [f["curve"] for f in results[name].values() if "curve" in f]
        for row in curves[0]:
            if row["kind"] != "geometric":
                kind = row["kind"] if row["budget"] is None else f"at most {row['budget']:.3f}"
                same = [
                    r
                    for c in curves
                    for r in c
                    if (r["kind"], r["budget"]) == (row["kind"], row["budget"])
                ]
                macs = np.mean([r["gmacs_mean"] for r in same])
                rows.append([name, kind, f"{macs:.3f}", with_spread([r["top1"] for r in same])])
    return rows


def draw(trained: Mapping[str, list[tuple[float, ...]]], dense: float) -> None:
    """Draws top-1 over MACs."""
    figure, axes = pyplot.subplots(figsize=(8, 5.5), constrained_layout=True)
    for name, ((_, macs, *top1),) in trained.items():
        kind = "o" if "msvit" in name or name == "both" else "s"
        axes.plot(macs / dense, np.mean(top1), kind)
        axes.annotate(
            name,
            (macs / dense, np.mean(top1)),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(xlabel="MACs of an image, over the dense model's", ylabel="top-1 (%)")
    axes.grid(alpha=0.3)
    figure.savefig(out() / "photos.png", dpi=120)
    pyplot.close(figure)


HEADER = """# Photographs

Made by `python studies/photos.py`, whose docstring says what each arm is: mean and standard
deviation over seeds, the whole validation split, every model after its last step; tokens and MACs
are means over images."""
THRESHOLDS = """## One gate at several thresholds

Top-1 and tokens, with thresholds fitted to a mean number of tokens on training images."""
EXITS = """## Cascades

Every exit alone, and exits chosen per image by thresholds fitted on training images."""
AS_IT_IS = """## Without training"""


def run_all() -> None:
    """Runs the dense models, then the arms, seed by seed."""
    names = _ARMS.value or [*ARMS, UNTRAINED]
    seeds = [int(seed) for seed in _SEEDS.value]
    runner = Runner()
    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
        dense = {seed: pool.submit(runner.run, "dense", seed) for seed in seeds}
        if _WARM.value:
            warm = [pool.submit(runner.run, n, 0, warm=True) for n in names if n != UNTRAINED]
            concurrent.futures.wait(warm)
        waited = []
        for seed in seeds:
            if dense[seed].result():
                waited += [pool.submit(runner.run, name, seed) for name in names]
        concurrent.futures.wait(waited)
    if "dense" in runner.results:
        write_page(runner.results)
    print(f"written: {out() / 'photos.json'}, photos.md, photos.png")


def main(argv: Sequence[str]) -> None:
    """The command."""
    errors.refuse_arguments(argv)
    if unknown := set(_ARMS.value) - {*ARMS, UNTRAINED}:
        raise errors.UserError(f"--arms={','.join(sorted(unknown))}: there are {', '.join(ARMS)}.")
    if not _DATA_DIR.value or not _WEIGHTS.value:
        raise errors.UserError("Give --weights=DINOV2 and --data_dir=DATA; see the docstring.")
    run_one() if _ARM.value else run_all()


if __name__ == "__main__":
    errors.run(main)
