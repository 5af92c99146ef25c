"""Makes tests/models/trained_gate.npz: a small MSViT trained on scattered digits, in float16.

    python tools/make_trained_gate.py [--workdir=runs/trained_gate]

Random weights hide what goes wrong with a gate's gradient: their scores are all alike. Tests that
look at true flips of decisions take this model. About three minutes on one core.
"""

import pathlib

import numpy as np
from absl import app, flags

from msvit_jax import checkpoint, config
from msvit_jax.train import loop
from msvit_jax.tree import flat_names

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "models" / "trained_gate.npz"
SIZES = {"model.width": 32, "model.depth": 3, "model.heads": 4, "log_images": 0}

_WORKDIR = flags.DEFINE_string("workdir", "runs/trained_gate", "Folder of both runs.")


def main(argv: list[str]) -> None:
    """Trains a dense model, then MSViT from it, and writes MSViT's parameters."""
    del argv
    workdir = pathlib.Path(_WORKDIR.value)
    dense = {**SIZES, "epochs": 8.0, "eval_every_epochs": 4.0}
    loop.train(config.load(str(ROOT / "configs/digits_vit.py"), dense), workdir / "vit")
    tuned = {**SIZES, "epochs": 2.0, "model.gate_hidden": 16, "init_from": str(workdir / "vit")}
    loop.train(config.load(str(ROOT / "configs/digits_msvit.py"), tuned), workdir / "msvit")
    run = checkpoint.load_run(workdir / "msvit", which="latest")
    arrays = {n: np.asarray(x, np.float16) for n, x in flat_names(run.variables["params"]).items()}
    np.savez_compressed(OUT, **arrays)
    print(f"written: {OUT}, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    app.run(main)
