"""How well a gate's gradient follows what its decisions do, and what estimates of it are worth.

    python studies/gate_gradient.py

Against the true change of the loss when one region is flipped, on random weights and on a small
trained model (tests/models/trained_gate.npz), 16 canvases of 16 regions, for the gate's own
samples, random halves, all fine and all coarse. Then what the trimmed layout passes to the gate's
parameters beside all regions, for several capacities. Writes docs/results/gate_gradient.md.
Cost: about three minutes on one CPU core.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import digits
import jax
import jax.numpy as jnp
import numpy as np

from msvit_jax import errors
from msvit_jax.models.msvit import MSViT
from msvit_jax.tokens import grid
from msvit_jax.tree import flat_names

sys.path.insert(0, str(digits.ROOT))
from tests.models import flips

CAPACITIES = (32, 40, 48, 56, 64)
DRAWS = 24


def by_chance(coarse: jax.Array, key: jax.Array, room: jax.Array) -> jax.Array:
    """Carries regions by chance, each with a known probability, whose inverse is its factor.

    First coarse tokens of fine regions, which take one place each, then fours for coarse regions.
    """
    is_coarse, draw = coarse > 0.5, jax.random.uniform(key, coarse.shape)
    of_fine, of_coarse = (~is_coarse).sum(axis=1), is_coarse.sum(axis=1)
    singles = jnp.clip(room, 0, of_fine)
    fours = jnp.clip((room - singles) // grid.REGION**2, 0, of_coarse)
    factor = jnp.zeros(coarse.shape)
    for mine, total, taken in ((~is_coarse, of_fine, singles), (is_coarse, of_coarse, fours)):
        rank = jnp.argsort(jnp.argsort(jnp.where(mine, draw, 2.0), axis=1), axis=1)
        chosen = mine & (rank < taken[:, None])
        factor = jnp.where(chosen, (total / jnp.maximum(taken, 1))[:, None], factor)
    return factor


def followed(weights: str) -> str:
    """The table of estimates against true flips."""
    estimates: dict[str, Callable[[str], np.ndarray]] = {
        "derivative at the weights (no bound)": lambda k: flips.literal(
            weights, k, flips.derivative
        ),
        "paper's sequence, bounded": lambda k: flips.literal(weights, k, flips.bounded),
        "each key switched by itself": lambda k: flips.literal(weights, k, flips.switched),
        "each region decided the other way": lambda k: flips.literal(weights, k, flips.decided),
        "the library": lambda k: flips.passed_back(
            flips.model(), weights, flips.decisions(weights, k)
        ),
    }
    rows = []
    for name, estimate in estimates.items():
        cells, largest = [name], 0.0
        for kind in flips.KINDS:
            found, true = estimate(kind), flips.true(weights, kind)
            rank, signs = flips.quality(found, true)
            cells.append(f"{rank:.3f} / {signs:.2f}")
            largest = max(largest, float(np.abs(found).max()))
        rows.append([*cells, f"{largest:.3g}"])
    return digits.markdown(["estimate", *flips.KINDS, "largest"], rows)


def gate_gradients(model: MSViT) -> np.ndarray:
    """The task's gradient to the gate's parameters for several samples of decisions: [draws, P]."""
    variables, (images, labels) = flips.variables("trained"), flips.examples()

    def loss(variables: Any, key: jax.Array) -> jax.Array:
        output = model.apply(variables, images, train=True, rngs={"gate": key})
        fits = True if output.within_capacity is None else output.within_capacity
        return jnp.where(fits, flips.losses(output.logits, labels), 0).sum()

    gradient = jax.jit(jax.grad(loss))

    def one(draw: int) -> np.ndarray:
        found = flat_names(gradient(variables, jax.random.key(draw))["params"])
        return np.concatenate([np.ravel(g) for n, g in found.items() if n.startswith("gate")])

    return np.stack([one(draw) for draw in range(DRAWS)])


@contextlib.contextmanager
def drawing_by_chance() -> Iterator[None]:
    """Has the trimmed layout draw the regions whose alternatives it carries."""
    kept = MSViT._alternatives
    MSViT._alternatives = lambda self, decisions, room: by_chance(
        decisions.coarse, self.make_rng("gate"), room
    )
    try:
        yield
    finally:
        MSViT._alternatives = kept


def carried() -> str:
    """The table of what the trimmed layout passes to the gate, beside all regions."""
    rows, whole = [], gate_gradients(flips.model())
    size = np.linalg.norm(whole.mean(axis=0))
    for capacity in CAPACITIES:
        for name, how in (("nearest", contextlib.nullcontext), ("by chance", drawing_by_chance)):
            with how():
                found = gate_gradients(
                    flips.model().clone(layout="trimmed", token_capacity=capacity)
                )
            bias = np.linalg.norm((found - whole).mean(axis=0)) / size
            error = np.sqrt(((found - whole) ** 2).sum(axis=1).mean()) / size
            norms = np.linalg.norm(found, axis=1) * np.linalg.norm(whole, axis=1)
            cosine = float(((found * whole).sum(axis=1) / norms).mean())
            rows.append([f"{capacity}, {name}", f"{cosine:.3f}", f"{bias:.2f}", f"{error:.2f}"])
    head = ["positions of 80, regions", "cosine to all regions'", "bias", "root mean square error"]
    return digits.markdown(head, rows)


PAGE = """# The gate's gradient

Made by `python studies/gate_gradient.py`. What each region's decision is passed back, against the
true change of the loss when that region alone is flipped: rank correlation / share of equal signs
among changes above 0.001, by how the other regions are decided; and the largest value of any.

## Random weights

{random}

## Trained weights

A model of three layers, 32 wide, 82 % top-1 at 31.7 tokens.

{trained}

## With less capacity

The same trained model: the task's gradient to the gate's parameters in the trimmed layout beside
that of all regions, over {draws} samples of decisions, {images} images. Bias and error are in units
of the mean gradient's norm. "nearest" carries the regions whose relaxed decision moves most; "by
chance" draws regions and weights them so that the mean is right.

{carried}
"""


def main(argv: Sequence[str]) -> None:
    """Writes the page, without the accuracies that follow its tables."""
    del argv
    text = PAGE.format(
        random=followed("random"),
        trained=followed("trained"),
        draws=DRAWS,
        images=flips.IMAGES,
        carried=carried(),
    )
    digits.out("gate_gradient.md").write_text(text)
    print(text)


if __name__ == "__main__":
    errors.run(main)
