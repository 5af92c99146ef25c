"""Time of a training step: MSViT in slots beside its dense backbone, in one process, in turns.

    python benchmarks/train_step.py --model=deit_small_patch16_224 --batch=16

Weights, images and labels are random: what is measured is the compiled step that train.py runs
(forward, backward, optimiser, gate loss), warm, without input pipeline. Prints the medians, their
spread and the ratio of the pairs, then one JSON object.
"""

import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import optax
from absl import flags

from msvit_jax import config as configs
from msvit_jax import errors
from msvit_jax.models.registry import MIXED_SCALE
from msvit_jax.train import optimizer, step
from msvit_jax.train.state import state_maker

_MODEL = flags.DEFINE_string("model", "deit_small_patch16_224", "The dense model's name.")
_BATCH = flags.DEFINE_integer("batch", 16, "Images per step.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Steps of each, in turns, after two to warm up.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Compute dtype.")
_OVERRIDES = flags.DEFINE_multi_string("set", [], "Model attributes: --set=width=64 --set=depth=4.")


def stepper(name: str, overrides: Sequence[str]) -> Callable[[], float]:
    """Returns a function that runs one step of a model and returns its seconds."""
    config = configs.base()
    config.model = {"name": name}
    config.dtype = _DTYPE.value
    for override in overrides:
        configs.set_key(config, *configs.split_override(f"model.{override}"))
    config.data.image_size = config.model.get("image_size", 224)
    config.loss.gate.kind = "gbas"
    config = configs.resolve(config, num_classes=1000)
    model = configs.build_model(config)
    gate_loss = configs.build_gate_loss(config, model)
    params = jax.eval_shape(state_maker(model, gate_loss, _NO_UPDATE, with_ema=False), _KEY, {})
    schedule = optimizer.schedule(config.optimizer, 1000, 100.0)
    update = optimizer.make_optimizer(config.optimizer, params.params, schedule)
    state = jax.jit(state_maker(model, gate_loss, update, with_ema=False))(_KEY, {})
    rng = np.random.default_rng(0)
    side = model.image_size
    batch = {
        "image": rng.integers(0, 256, (_BATCH.value, side, side, 3), np.uint8),
        "label": rng.integers(0, 1000, _BATCH.value).astype(np.int32),
    }
    batch = jax.device_put(batch)
    run = jax.jit(step.make_train_step(model, gate_loss, update, config), donate_argnums=0)

    def once() -> float:
        nonlocal state
        start = time.perf_counter()
        state, reported = run(state, batch)
        jax.block_until_ready((state, reported))
        return time.perf_counter() - start

    return once


_KEY = jax.random.key(0)
_NO_UPDATE = optax.identity()


def main(argv: Sequence[str]) -> None:
    """Measures."""
    del argv
    mixed = next((n for n, dense in MIXED_SCALE.items() if dense == _MODEL.value), None)
    if mixed is None:
        raise errors.UserError(f"No mixed-scale model is built over {_MODEL.value!r}.")
    names = (_MODEL.value, mixed)
    steps = [stepper(name, _OVERRIDES.value) for name in names]
    times = np.asarray([[once() for once in steps] for _ in range(_ROUNDS.value + 2)])[2:]
    for name, column in zip(names, times.T, strict=True):
        low, middle, high = np.percentile(column, [0, 50, 100]) * 1000
        print(f"{name:36s} {middle:9.1f} ms a step ({low:.1f} to {high:.1f})")
    ratio = times[:, 1] / times[:, 0]
    print(f"MSViT / dense: {np.median(ratio):.3f} ({ratio.min():.3f} to {ratio.max():.3f})")
    record = {
        "models": names,
        "batch": _BATCH.value,
        "dtype": _DTYPE.value,
        "overrides": _OVERRIDES.value,
        "seconds_median": np.median(times, axis=0).tolist(),
        "ratio_median": float(np.median(ratio)),
        "ratio_range": [float(ratio.min()), float(ratio.max())],
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": f"{os.cpu_count()} x {processor()}",
    }
    print(json.dumps(record))


def processor() -> str:
    """The processor's name where the system tells it."""
    about = pathlib.Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


if __name__ == "__main__":
    errors.run(main)
