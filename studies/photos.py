"""The study on photographs: the three systems over a pretrained ViT-S/14.

    python studies/photos.py --weights=DINOV2 --data_dir=DATA --workdir=runs/photos
        [--scale=laptop|gpu] [--seeds=0,1,2] [--arms=msvit,entropy] [--jobs=2]

DINOV2 is a pretrained ViT-S/14 in any format that the library reads, DATA a folder in which
`msvit prepare` made a data set "photos" (train and val). From configs/photos/, for every seed and
all from the same dense model (photos/vit_small.py), for equally many steps:

* longer, lower_98, lower_84, lower_70: the dense model, at 112 px and at lower resolutions
* msvit, msvit_38, msvit_24, msvit_light, gate_alone: learned gates with other targets, less batch
  shaping, or a frozen backbone; evaluated at several thresholds
* moved: the gate of msvit and the first seed, frozen, over the dense models of the other seeds
* entropy, random, center, entropy_24: gates that learn nothing, at equal tokens
* mergence, tome, topk, evit: at two thirds of dense's MACs; mergence_half, tome_half: at half
* both: mixed scale, then merged, at half
* dvt_2, dvt_3: cascades, with exits chosen per image
* at 168 px, 144 tokens, first seed: longer_168, lower_126, msvit_168, entropy_168, moved_168
* untrained: dense's weights as they are, in mixed scale or merged, at 112 and 168 px; among its
  gates is that of msvit and the first seed, beside the backbones of all seeds
* speed: images/s of the main arms through the Predictor, in turns, when all else has ended; random
  weights at the arms' tokens

Some of these are run with the first seed alone. Thresholds are fitted on training images.
Everything is judged after its last step, on the whole validation split. Each arm is a process of
its own; what is done already is not done again, so the study can be interrupted. Writes photos.json
after every arm, photos.md and photos.png at the end.

Cost: --scale=laptop trains for 178 steps of 32 images, some 6 minutes an arm on two CPU cores;
--scale=gpu for eight epochs in batches of 128 (the dense model for two before) with the training
split on the device, about a minute an arm, most of it compilation.
"""

import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import arms
import jax
import numpy as np
from arms import FITTED, SCALE, WARM, Arm, Figures, Judge
from arms_page import SPEED
from photos_page import TARGETS, UNTRAINED, write_page

from msvit_jax import checkpoint, drawing, errors, sharding, tree
from msvit_jax import config as configs
from msvit_jax.exits import budget_curve
from msvit_jax.weights import adapt

SAVED = (1.3, 1.6, 2.0)  # dense's MACs over the budgets that exits are chosen for

# Some epochs in large batches, or as many steps as two cores do in some minutes.
SCALES: dict[str, dict[str, Any]] = {
    "gpu": {
        "batch_size": 128,
        "eval_batch_size": 256,
        "epochs": 8.0,
        "dtype": "bfloat16",
        "data.on_device": True,
    },
    "laptop": {"batch_size": 32, "eval_batch_size": 64, "epochs": 0.6},
}
DENSE_EPOCHS = {"gpu": 2.0, "laptop": 0.6}
SPEED_IMAGES = {"gpu": 2048, "laptop": 256}
RATE = {"gpu": 2.0, "laptop": 1.0}  # the configs' learning rates are for batches of 32


def fixed_gate(kind: str, **overrides: Any) -> dict[str, Any]:
    """Keys of a gate that learns nothing."""
    return {"model.gate": kind, "loss.gate.kind": "none", **overrides}


def reduced(reducer: str, **options: Any) -> Arm:
    """An arm with another reducer."""
    given = {f"model.{key}": value for key, value in options.items()}
    return Arm("reduced_small", {"model.reducer": reducer, "model.remove": 0, **given})


SHARE = 0.375  # 34 tokens: the next above 32 that a fixed share of 16 regions can give
LARGER = {"data.image_size": 168}  # 144 tokens
KEPT = {"loss.gate.kind": "none", "optimizer.freeze": ("gate_mlp/",)}
ARMS = {
    "dvt_2": Arm("dvt_small", {"model.grid_sizes": (5, 8)}),
    "dvt_3": Arm("dvt_small"),
    "msvit": Arm("msvit_small"),
    "longer": Arm("vit_small_longer"),
    "lower_84": Arm("vit_small_longer", {"data.image_size": 84}),
    "lower_98": Arm("vit_small_longer", {"data.image_size": 98}),
    "lower_70": Arm("vit_small_longer", {"data.image_size": 70}),
    "msvit_38": Arm("msvit_small", {"loss.gate.target": (0.6 - 0.25) / 0.75}),
    "entropy": Arm("msvit_small", fixed_gate("entropy"), tokens=32),
    "center": Arm("msvit_small", fixed_gate("center", **{"model.fine_share": SHARE})),
    "tome": reduced("tome", remove=4, reduce_layers=tuple(range(1, 9))),
    "mergence": Arm("mergence_small", {"model.keep": 0.68}),
    "topk": reduced("topk", keep=0.7),
    "evit": reduced("evit", keep=0.68),
    "tome_half": reduced("tome", remove=5, reduce_layers=tuple(range(1, 12))),
    "both": Arm("msvit_mergence_small", {"loss.gate.target": 2 / 3}),
    "msvit_24": Arm("msvit_small", {"loss.gate.target": 1 / 6}),
    "entropy_24": Arm("msvit_small", fixed_gate("entropy"), tokens=24),
    "mergence_half": Arm("mergence_small", {"model.keep": 0.5}, once=True),
    "random": Arm("msvit_small", fixed_gate("random", **{"model.fine_share": SHARE}), once=True),
    "msvit_light": Arm("msvit_small", {"loss.gate.weight": 0.5}, once=True),
    "gate_alone": Arm("msvit_small_gate", once=True),
    "longer_168": Arm("vit_small_longer", LARGER, once=True),
    "lower_126": Arm("vit_small_longer", {"data.image_size": 126}, once=True),
    "msvit_168": Arm("msvit_small", {**LARGER, "loss.gate.target": 0.45}, once=True),
    "entropy_168": Arm("msvit_small", fixed_gate("entropy", **LARGER), tokens=84, once=True),
    "moved": Arm("msvit_small", KEPT, gate_of="msvit"),
    "moved_168": Arm("msvit_small", {**LARGER, **KEPT}, gate_of="msvit", once=True),
}
# Arms whose speed is measured, and the share of images that leave at a cascade's first exit.
TIMED = (
    *("dense", "lower_98", "lower_84", "lower_70", "msvit", "msvit_38", "entropy", "mergence"),
    *("tome", "tome_half", "both", "dvt_2"),
)
LEAVE = {"dvt_2": 0.81}


STUDY = arms.Study(
    name="photos",
    script=__file__,
    dense=Arm("vit_small"),
    dense_epochs=DENSE_EPOCHS,
    arms=ARMS,
    last=(UNTRAINED,),
    alone=(SPEED,),
    scales=SCALES,
    rate=RATE,
    classes=10,
    best_by="top1",
    warm_split="val[:64]",
    write_page=write_page,
)


def with_gate(dense: str, arm: str, file: pathlib.Path) -> pathlib.Path:
    """Writes a dense model's weights and the gate of another arm's first seed to one file."""
    plain = tree.flat_names(checkpoint.load_params(dense, "latest"))
    np.savez(file, **plain, **arms.load_gate(gate_file(arm, STUDY.seeds()[0])))
    return file


def gate_file(arm: str, seed: int) -> pathlib.Path:
    """File of an arm's gate."""
    return STUDY.out() / f"gate_{arm}_{seed}.npz"


def after_training(name: str, arm: Arm, seed: int) -> Figures:
    """What is asked of a trained arm besides its evaluation: thresholds, exits; saves the gate."""
    folder = STUDY.workdir(name, seed)
    config = checkpoint.read_config(folder)
    model = configs.build_model(config)
    params, _ = adapt.params_for(model, checkpoint.load_params(folder, "latest"))
    figures: Figures = {}
    if arm.config.startswith("dvt"):
        dense = configs.build_model(checkpoint.read_config(STUDY.workdir("dense", seed)))
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
        arms.save_half(STUDY.out() / f"dense_{seed}.npz", params)
    elif "gate_mlp" in params:
        arms.save_half(gate_file(name, seed), params["gate_mlp"])
        times = model.num_regions / 16  # as many tokens as at 112 px
        figures["at_tokens"] = Judge(model, params, config).at_tokens([times * t for t in TARGETS])
    return figures


def judge_untrained(seed: int) -> Figures:
    """Evaluates dense's weights in mixed scale, merged, and at lower resolutions."""
    source = tree.flat_names(checkpoint.load_params(STUDY.workdir("dense", seed), "latest"))
    found: Figures = {}

    def judged(arm: Arm, gate: Mapping[str, np.ndarray] | None = None) -> Judge:
        config = STUDY.resolved(arm, seed)
        model = configs.build_model(config)
        image = np.zeros((1, *model.image_shape), np.float32)
        fresh = drawing.variables(model, jax.random.key(0), image)["params"]
        taken, report = adapt.adapt_weights({**source, **(gate or {})}, fresh)
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
    found["dense, 168 px"] = [judged(Arm("vit_small", LARGER))()]
    given = fixed_gate("entropy", **LARGER)
    found["entropy, 168 px"] = judged(Arm("msvit_small", given)).at_tokens((72.0, 90.0))
    if (file := gate_file("msvit", STUDY.seeds()[0])).exists():
        gate = arms.load_gate(file)
        found["gate of msvit"] = judged(Arm("msvit_small"), gate).at_tokens(tokens)
        wide = judged(Arm("msvit_small", LARGER), gate)
        found["gate of msvit, 168 px"] = wide.at_tokens((72.0, 90.0))
    return {"figures": found}


def measure_speed(seed: int) -> Figures:
    """Measures images/s of the main arms through a Predictor, in turns, warm.

    The weights are random, see `arms.untrained`; exits are set as the arms have them.
    """
    runs, images = {}, {}
    for name in TIMED:
        arm = ARMS.get(name, Arm("vit_small"))
        predictor, pixels = arms.untrained(STUDY, arm, seed, SPEED_IMAGES[SCALE.value])
        if name in LEAVE:
            certain = predictor.certainty(pixels)[:, 0]
            predictor.thresholds = (float(np.quantile(certain, 1 - LEAVE[name])),)
        runs[name], images[name] = functools.partial(predictor, pixels), len(pixels)
    batch = SCALES[SCALE.value]["eval_batch_size"]
    found = arms.rates(runs, images)
    return {"figures": {name: {**figures, "batch": batch} for name, figures in found.items()}}


def run_arm(name: str, seed: int) -> Figures:
    """Runs what has a name; returns its figures."""
    if name == UNTRAINED:
        return judge_untrained(seed)
    if name == SPEED:
        return measure_speed(seed)
    begun, arm = time.perf_counter(), STUDY.arm(name)
    start = STUDY.start(name, seed)
    if arm.gate_of and not WARM.value:
        start = str(with_gate(start, arm.gate_of, STUDY.workdir(name, seed).with_suffix(".npz")))
    _, figures = STUDY.train(name, arm, seed, start)
    figures["train_seconds"] = time.perf_counter() - begun
    return figures if WARM.value else figures | after_training(name, arm, seed)


def main(argv: Sequence[str]) -> None:
    """The command."""
    arms.main(argv, STUDY, run_arm)


if __name__ == "__main__":
    errors.run(main)
