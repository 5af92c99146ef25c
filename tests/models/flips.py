"""True flips of a gate's decisions, and estimates of them written out apart from the library.

On random weights and on trained ones (trained_gate.npz, made by tools/make_trained_gate.py), whose
hidden keys score far above the active ones. For tests and for studies/gate_gradient.py.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from msvit_jax import config as configs
from msvit_jax.data import scattered_digits
from msvit_jax.models import gate as gates
from msvit_jax.pixels import normalize
from msvit_jax.tree import map_names
from tests import jitted
from tests.models.test_vit import rough

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {"model.width": 32, "model.depth": 3, "model.heads": 4, "model.gate_hidden": 16}
IMAGES, REGIONS, FINE = 16, 16, 4
KINDS = ("samples", "halves", "fine", "coarse")


@functools.cache
def model():
    config = configs.load(str(ROOT / "configs/digits_msvit.py"), SIZES)
    return configs.build_model(configs.resolve(config, 10)).clone(layout="slots")


@functools.cache
def examples():
    """Normalized canvases of validation digits, and their labels."""
    variant = scattered_digits.ScatteredDigits.BUILDER_CONFIGS[0]
    digits, sources = scattered_digits._digits(), scattered_digits.digit_indices("validation")
    rng = np.random.default_rng(0)
    chosen = rng.choice(sources, IMAGES)
    drawn = [scattered_digits.draw_canvas(digits.images[i], variant, rng).image for i in chosen]
    images = normalize(jnp.asarray(np.stack(drawn)), model().mean, model().std)
    return images, jnp.asarray(digits.target[chosen])


@functools.cache
def variables(weights):
    shapes = jax.eval_shape(model().init, jax.random.key(0), examples()[0])
    if weights == "random":
        return rough(shapes)
    arrays = np.load(pathlib.Path(__file__).with_name("trained_gate.npz"))
    params = map_names(lambda name, _: jnp.asarray(arrays[name], jnp.float32), shapes["params"])
    return {"params": params}


@functools.cache
def decisions(weights, kind):
    logits = jitted.apply(model(), variables(weights), examples()[0], method="gate_logits")
    if kind == "samples":
        return gates.sample(logits, jax.random.key(1), 2 / 3).coarse
    if kind == "halves":
        return jax.random.bernoulli(jax.random.key(2), 0.5, logits.shape).astype(jnp.float32)
    return jnp.full(logits.shape, kind == "coarse", jnp.float32)


def losses(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


# Weights, images, labels and decisions are arguments of what is compiled: one program for all.


@jax.jit
def _losses(variables, images, labels, coarse):
    return losses(model().apply(variables, images, coarse=coarse).logits, labels)


@functools.cache
def true(weights, kind):
    """The loss with a region coarse less that with it fine, each region by itself: [B, R]."""
    coarse = decisions(weights, kind)
    loss = functools.partial(_losses, variables(weights), *examples())
    pairs = [(coarse.at[:, r].set(1.0), coarse.at[:, r].set(0.0)) for r in range(REGIONS)]
    return np.stack([loss(on) - loss(off) for on, off in pairs], axis=1)


def passed_back(run, weights, coarse):
    """Gradient of the summed losses to the decisions: [B, R]."""
    return np.asarray(_gradient(run)(coarse, variables(weights), *examples()))


@functools.cache
def _gradient(run):
    def loss(coarse, variables, images, labels):
        rngs = {"gate": jax.random.key(0)}
        output = run.apply(variables, images, train=True, coarse=coarse, rngs=rngs)
        each = losses(output.logits, labels)
        return (
            each.sum()
            if output.within_capacity is None
            else jnp.where(output.within_capacity, each, 0).sum()
        )

    return jax.jit(jax.grad(loss))


def derivative(ratio, active):
    """The derivative of the paper's formula, which has no bound at weight 0 (cut at e^30)."""
    del active
    return ratio


def bounded(ratio, active):
    """As `derivative`, but a hidden key's share is the one that it has when it is switched on."""
    return jnp.where(active, ratio, ratio / (1 + ratio))


def switched(ratio, active):
    """As `bounded`, and an active key's is that by which the others' grow when it goes."""
    return jnp.where(active, ratio / jnp.maximum(1 - ratio, 0.01), ratio / (1 + ratio))


def decided(ratio, active):
    """The exact change of one layer's output when all keys of a region change together."""
    member = jnp.concatenate([jnp.eye(REGIONS), jnp.repeat(jnp.eye(REGIONS), FINE, axis=0)])
    member = jnp.pad(member, ((1, 0), (0, 0)))  # the class token is of no region
    of_region = jnp.einsum("bhqk,kr->bhqr", jnp.where(active, -ratio, ratio), member)
    return ratio / jnp.maximum(1 + jnp.einsum("bhqr,kr->bhqk", of_region, member), 0.01)


@functools.cache
def literal(weights, kind, share_of=bounded):
    """The paper's sequence, both scales of all regions, with a rule for the shares: [B, R].

    Written out apart from the library: hard masked attention, to which every key adds a term of
    value 0 whose gradient to the key's weight is its share times (v - out).
    """
    fine, region = jitted.apply(model(), variables(weights), examples()[0], method="embed_scales")
    params, vit = variables(weights)["params"]["backbone"], model().backbone
    tokens = jnp.concatenate([region, fine.reshape(IMAGES, -1, vit.width)], axis=1)
    first = params["cls_token"] + params["pos_embed"][:1]
    start = jnp.concatenate([jnp.broadcast_to(first[None], (IMAGES, 1, vit.width)), tokens], axis=1)
    return np.asarray(_literal(share_of)(decisions(weights, kind), params, start, examples()[1]))


@functools.cache
def _literal(share_of):
    vit = model().backbone

    def attend(x, weight, p):
        qkv = x @ p["qkv"]["kernel"] + p["qkv"]["bias"][None, None]
        q, k, v = (t.reshape(*t.shape[:2], vit.heads, -1) for t in jnp.split(qkv, 3, axis=-1))
        score = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1], dtype=np.float32)
        active = jax.lax.stop_gradient(weight)[:, None, None] > 0.5
        shown = jnp.where(active, score, -jnp.inf)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(shown, axis=-1), v)
        ratio = score - jax.nn.logsumexp(shown, axis=-1, keepdims=True)
        ratio = jnp.exp(jnp.minimum(ratio, 30.0))
        share = jax.lax.stop_gradient(share_of(ratio, active))
        moved = jnp.einsum("bk,bhqk,bkhd->bqhd", weight, share, jax.lax.stop_gradient(v))
        total = jnp.einsum("bk,bhqk->bqh", weight, share)[..., None]
        added = moved - total * jax.lax.stop_gradient(out)
        out = (out + added - jax.lax.stop_gradient(added)).reshape(x.shape)
        return out @ p["proj"]["kernel"] + p["proj"]["bias"][None, None]

    def norm(x, p):
        centered = x - x.mean(-1, keepdims=True)
        scale = jnp.sqrt((centered**2).mean(-1, keepdims=True) + np.float32(1e-6))
        return centered / scale * p["scale"][None, None] + p["bias"][None, None]

    def mlp(x, p):
        hidden = x @ p["fc1"]["kernel"] + p["fc1"]["bias"][None, None]
        return (
            jax.nn.gelu(hidden, approximate=False) @ p["fc2"]["kernel"]
            + p["fc2"]["bias"][None, None]
        )

    def loss(coarse, params, start, labels):
        parts = [jnp.ones((IMAGES, 1)), coarse, jnp.repeat(1 - coarse, FINE, axis=1)]
        weight, x = jnp.concatenate(parts, axis=1), start
        for layer in range(vit.depth):
            p = params[f"blocks_{layer}"]
            x = x + attend(norm(x, p["norm1"]), weight, p["attn"])
            x = x + mlp(norm(x, p["norm2"]), p["mlp"])
        x = norm(x, params["norm"])[:, 0]
        return losses(x @ params["head"]["kernel"] + params["head"]["bias"][None], labels).sum()

    return jax.jit(jax.grad(loss))


def quality(found, true):
    """Rank correlation, and the share of the same signs among changes that matter."""
    matter = np.abs(true) > 1e-3
    return spearmanr(found, true, axis=None)[0], (np.sign(found) == np.sign(true))[matter].mean()
