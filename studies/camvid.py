"""The study of segmentation on CamVid: mixed scale, merging and lower resolutions, one start.

    python studies/camvid.py --weights=DINOV2 --data_dir=DATA --workdir=runs/camvid [--gate=GATE]
        [--scale=laptop|gpu] [--arms=msvit,algm] [--jobs=8] [--warm] [--minutes=2.5]

DINOV2 is a pretrained ViT-S/14 in any format that the library reads, DATA a folder in which
`msvit prepare` made a data set "camvid" (train, val and test), GATE a gate that
studies/photos.py saved (gate_*.npz). From configs/camvid/, all from the same dense segmenter
(camvid/seg_small_dinov2.py: ViT-S/14, mask transformer, windows of 26 x 26 tokens), for equally
many steps:

* longer, lower_280, lower_252: the dense segmenter, at 364 px and at lower resolutions
* msvit, msvit_338: gates trained here, for 397 and 338 of 676 tokens, evaluated at several
  thresholds
* msvit_frozen: GATE, which learned to classify, kept as it is; its last bias is moved once, so that
  training images have 397 tokens. Without --gate this arm is left out
* entropy: a gate that learns nothing, at 397 tokens
* algm, mergence, tome: merging, at about as many MACs as 397 tokens have, 0.55 of dense's
* speed: images/s of the arms through the Predictor, in turns, when all else has ended; random
  weights at the arms' tokens

Thresholds are fitted on training images. Everything is judged after its last step, on the whole
test split, and once on val. Each arm is a process of its own; what is done already is not done
again, so the study can be interrupted. Writes camvid.json after every arm, camvid.md and camvid.png
at the end. Twelve test images with their masks, answers and tokens, of any arm:

    python -m msvit_jax.visualize --workdir=runs/camvid/msvit/msvit_0 --checkpoint=latest \
        --examples=12 --out=pictures

Cost: --scale=gpu trains the dense model for 30 epochs in batches of 16, and the others for 12, with
the training split on the device; --scale=laptop for half an epoch each, some minutes an arm, which
shows that it runs and nothing more.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import arms
import numpy as np
from absl import flags
from arms import WARM, Arm, Figures, Judge
from arms_page import SPEED
from camvid_page import TARGETS, write_page

from msvit_jax import checkpoint, errors, tree
from msvit_jax import config as configs
from msvit_jax.inference import calibrate
from msvit_jax.weights import adapt, ours

_GATE = flags.DEFINE_string(
    "gate", "", "File gate_*.npz of studies/photos.py, for the arm with a frozen gate."
)

TOKENS = 397.0  # of 676: 0.55 of dense's MACs
FROZEN = "msvit_frozen"
# What the processor would have to do for every image is left out, so that it never waits.
_DATA = {
    "data.on_device": True,
    "data.photometric": False,
    "data.max_class_share": 1.0,
    "data.eval_split": "test",
}
SCALES: dict[str, dict[str, Any]] = {
    "gpu": {**_DATA, "eval_batch_size": 32, "dtype": "bfloat16"},
    "laptop": {
        **_DATA,
        "batch_size": 8,
        "eval_batch_size": 8,
        "epochs": 0.5,
        "optimizer.warmup_epochs": 0.1,
    },
}
WINDOWS = {"gpu": 464, "laptop": 32}  # that speed is measured with
TIMED = ("dense", "lower_280", "lower_252", "msvit", "entropy", "algm", "mergence", "tome")
LONGER = "seg_small_dinov2_longer"
MSVIT = "msvit_seg_small_dinov2"


def lower(size: int) -> Arm:
    """The dense segmenter for images whose short side is a window of `size` px."""
    return Arm(LONGER, {"data.image_size": size, "data.short_side": size})


def merging(reducer: str, **options: Any) -> Arm:
    """An arm that merges tokens."""
    given = {f"model.{key}": value for key, value in options.items()}
    return Arm(LONGER, {"model.reducer": reducer, "model.decode": "mixed", **given})


FIXED = {"loss.gate.kind": "none"}
ARMS = {
    "msvit": Arm(MSVIT),
    "longer": Arm(LONGER),
    FROZEN: Arm(MSVIT, {**FIXED, "optimizer.freeze": ("gate",)}),
    "entropy": Arm(MSVIT, {**FIXED, "model.gate": "entropy"}, tokens=TOKENS),
    "algm": merging("algm", keep=(0.7, 0.75)),
    "lower_280": lower(280),
    "mergence": merging("mergence", keep=0.65),
    "tome": merging("tome", remove=60, reduce_layers=tuple(range(1, 7))),
    "msvit_338": Arm(MSVIT, {"loss.gate.target": 1 / 3}),
    "lower_252": lower(252),
}
STUDY = arms.Study(
    name="camvid",
    script=__file__,
    dense=Arm("seg_small_dinov2"),
    dense_epochs={"gpu": 30.0, "laptop": 0.5},
    arms=ARMS,
    last=(),
    alone=(SPEED,),
    scales=SCALES,
    rate={"gpu": 1.0, "laptop": 1.0},
    classes=11,
    best_by="miou",
    warm_split="test[:8]",
    write_page=write_page,
)


def gate_of(file: str) -> dict[str, np.ndarray]:
    """Reads a gate's parameters by name.

    Raises:
      UserError: The file cannot be read, or holds no gate.
    """
    try:
        gate = arms.load_gate(pathlib.Path(file))
    except (OSError, ValueError) as error:
        raise errors.UserError(f"--gate={file} cannot be read: {error}.") from error
    if "gate_mlp/fc1/kernel" not in gate:
        raise errors.UserError(f"--gate={file} holds no gate; studies/photos.py saves gate_*.npz.")
    return gate


def with_gate(arm: Arm) -> Arm:
    """The arm for a gate of the given file's width."""
    hidden = gate_of(_GATE.value)["gate_mlp/fc1/kernel"].shape[-1]
    return dataclasses.replace(arm, overrides={**arm.overrides, "model.gate_hidden": int(hidden)})


def start_with_gate(arm: Arm, seed: int) -> str:
    """Puts the given gate beside the dense segmenter's weights; returns the file of both.

    The gate's last bias is moved so that training images have `TOKENS` on average at probability
    1/2, in training, where decisions are drawn, as in evaluation.

    Raises:
      UserError: Weights would be dropped, or are missing.
    """
    config = STUDY.resolved(arm, seed)
    model = configs.build_model(config)
    dense = STUDY.workdir("dense", seed)
    plain = tree.flat_names(checkpoint.load_params(dense, "latest"))
    both = {**plain, **gate_of(_GATE.value)}
    params, report = adapt.params_for(model, both)  # refuses to start any part fresh
    if report.unused:
        raise errors.UserError(f"The model has no place for {', '.join(report.unused)}.")
    print(f"{_GATE.value} beside {dense}: {report}", flush=True)
    found = arms.probabilities(model, params, config)
    fitted = calibrate.threshold_for(found, TOKENS).threshold
    move = np.float32(np.log(fitted / (1 - fitted)))
    flat = {name: np.asarray(leaf) for name, leaf in tree.flat_names(params).items()}
    flat["gate_mlp/fc4/bias"] = flat["gate_mlp/fc4/bias"] - move
    file = STUDY.workdir(FROZEN, seed).with_suffix(".safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    names = checkpoint.read_about(dense, "latest").get("class_names") or []
    ours.save(file, flat, {"model": config.model.to_dict(), "class_names": list(names)})
    return str(file)


def after_training(name: str, seed: int) -> Figures:
    """What is asked of a trained arm besides its evaluation: val, and several thresholds."""
    folder = STUDY.workdir(name, seed)
    config = checkpoint.read_config(folder)
    model = configs.build_model(config)
    params, _ = adapt.params_for(model, checkpoint.load_params(folder, "latest"))
    val = config.data.eval_split.replace("test", "val")
    figures: Figures = {"val": Judge(model, params, config, val)()}
    if name.startswith("msvit"):
        figures["at_tokens"] = Judge(model, params, config).at_tokens(TARGETS)
    return figures


def measure_speed(seed: int) -> Figures:
    """Measures images/s of the arms through a Predictor, in turns, warm.

    The weights are random, see `arms.untrained`. Windows are in memory, and answers are logits of
    patches: what the processor does to put windows together is the same for all arms.
    """
    runs, images = {}, {}
    for name in TIMED:
        arm = ARMS.get(name, STUDY.dense)
        predictor, windows = arms.untrained(STUDY, arm, seed, WINDOWS[arms.SCALE.value])
        runs[name] = functools.partial(predictor.answer_windows, windows)
        images[name] = len(windows) // 2  # two windows cover an image
    batch = SCALES[arms.SCALE.value]["eval_batch_size"]
    found = arms.rates(runs, images)
    return {"figures": {name: {**figures, "batch": batch} for name, figures in found.items()}}


def run_arm(name: str, seed: int) -> Figures:
    """Runs what has a name; returns its figures."""
    if name == SPEED:
        return measure_speed(seed)
    arm = STUDY.arm(name)
    start = STUDY.start(name, seed)
    if name == FROZEN:
        arm = with_gate(arm)
        start = start if WARM.value else start_with_gate(arm, seed)
    begun = time.perf_counter()
    _, figures = STUDY.train(name, arm, seed, start)
    figures["train_seconds"] = time.perf_counter() - begun
    if WARM.value:
        return figures
    more = after_training(name, seed)
    figures["figures"]["val_miou"] = more["val"]["miou"]
    return figures | more


def main(argv: Sequence[str]) -> None:
    """The command."""
    study = STUDY
    if not _GATE.value:
        print(f"{FROZEN} is left out: it needs --gate.", flush=True)
        study = dataclasses.replace(
            study, arms={name: arm for name, arm in ARMS.items() if name != FROZEN}
        )
    elif not pathlib.Path(_GATE.value).exists():
        raise errors.UserError(f"There is no file --gate={_GATE.value}.")
    arms.main(argv, study, run_arm)


if __name__ == "__main__":
    errors.run(main)
