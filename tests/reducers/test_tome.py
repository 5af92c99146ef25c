"""ToMe, layer after layer, against the published method on one image at a time."""

import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msvit_jax import reducers
from msvit_jax.reducers import base

ROWS, PLACES, WIDTH = 4, 28, 6
MOST = 4  # images in a row
LAYERS = ({"remove": 4}, {"keep": 0.8}, {"remove": 4}, {"remove": 4})
PREFIXES = {"none": 0, "class": 1, "class, distillation": 2, "class, registers": 3}


def published(keys, prefix, remove):
    """What becomes of one image in one layer (Bolya et al. 2023, section 3 and appendix).

    Every other token, the first one first, goes to a set A, the others to a set B. From each of A
    an edge is drawn to its most similar one of B; the `remove` most similar edges are merged. What
    is left of A comes before B. Prefix tokens are on no edge and come first. A is sorted for the
    class token's sake: without one its rest lies as the edges do, the most similar first.

    Args:
      keys: [n, d].
      prefix: tokens.
      remove: tokens, at most half of the patches.

    Returns:
      For every token that is left the positions that it is made of, its own first; and the least
      difference of similarities by which this was decided.
    """
    count = len(keys)
    if remove == 0:
        return [[i] for i in range(count)], math.inf
    similar = lambda i, j: keys[i] @ keys[j] / np.linalg.norm(keys[i]) / np.linalg.norm(keys[j])  # noqa: E731
    set_a = [i for i in range(0, count, 2) if i >= prefix]
    set_b = [i for i in range(1, count, 2) if i >= prefix]
    edges, margins = [], []
    for a in set_a:
        *_, second, best = sorted([(-2.0, -1), *((similar(a, b), b) for b in set_b)])
        edges.append((best[0], a, best[1]))
        margins.append(best[0] - second[0])
    edges.sort(reverse=True)
    margins += [high[0] - low[0] for high, low in itertools.pairwise(edges)]
    rest = [a for _, a, _ in edges[remove:]]
    if prefix:
        rest = sorted(rest)
    groups = [[i] for i in [*range(prefix), *rest]]
    groups += [[b, *(a for _, a, to in edges[:remove] if to == b)] for b in set_b]
    return groups, min(margins)


def several_layers(x, projections, prefix):
    """The published layers in a row: groups of the first tokens, what they hold, least margin."""
    groups, held, margin = [[i] for i in range(len(x))], x.astype(np.float64), math.inf
    for layer, projection in zip(LAYERS, projections, strict=True):
        patches = len(groups) - prefix
        stay = math.ceil(round(layer.get("keep", 1) * patches, 6))
        remove = min(layer.get("remove", patches - stay), patches // 2)
        merged, nearest = published(held @ projection, prefix, remove)
        margin = min(margin, nearest)
        size = np.array([len(group) for group in groups])
        held = np.stack([np.average(held[g], axis=0, weights=size[g]) for g in merged])
        groups = [[i for g in group for i in groups[g]] for group in merged]
    return groups, held, margin


def whose(kind, prefix, rng):
    """Images of a few rows, one or several in each: which token is whose, [ROWS, PLACES, M]."""
    member = np.zeros((ROWS, PLACES, MOST if kind == "several in a row" else 1), bool)
    for row in member:
        if kind == "several in a row":
            ends = np.cumsum(prefix + rng.integers(1, PLACES // 2, MOST))
            for image, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                row[start:end, image] = end <= PLACES
        elif kind == "empty places behind":
            row[: rng.integers(prefix + 1, PLACES)] = True
        else:
            row[:, 0] = kind == "plain" or rng.random(PLACES) < rng.random()
            row[: prefix + 1] = True
    return member


@functools.cache
def compiled(**layer):
    reducer = reducers.ToMe(**layer)
    table = reducer.keep_table(PLACES)

    @jax.jit
    def run(tokens, where, projection):
        keys = jnp.einsum("bnd,dc->bnc", tokens.x, projection, precision="highest")
        merge = reducer.apply({}, tokens.replace(keys=keys), table, (PLACES, PLACES))
        tokens = reducers.Tokens(
            x=merge.tokens(tokens.x),
            member=base.take(tokens.member, merge.kept, fill=False),
            prefix=base.take(tokens.prefix, merge.kept, fill=False),
            size=merge.sizes(tokens.size),
        )
        return tokens, base.compose(where, merge.positions(PLACES))

    return run


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "kind", ["plain", "hidden places between", "empty places behind", "several in a row"]
)
@hypothesis.given(seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=10)
def test_layer_after_layer_groups_and_their_order_are_the_published_ones(kind, prefix, seed):
    prefix = PREFIXES[prefix]
    rng = np.random.default_rng(seed)
    member = whose(kind, prefix, rng)
    x = rng.normal(size=(ROWS, PLACES, WIDTH)).astype(np.float32)
    x[~member.any(axis=2)] = np.nan
    projections = rng.normal(size=(len(LAYERS), WIDTH, WIDTH)).astype(np.float32)
    images = [(row, mine) for row in range(ROWS) for mine in member[row].T if mine.any()]
    references = [several_layers(x[row, mine], projections, prefix) for row, mine in images]
    hypothesis.assume(min(margin for *_, margin in references) > 1e-5)

    before = (member & (np.cumsum(member, axis=1) <= prefix)).any(axis=2)
    tokens = reducers.Tokens(x, member, before, np.ones((ROWS, PLACES), np.float32))
    place = np.tile(np.arange(PLACES, dtype=np.int32), (ROWS, 1))
    for layer, projection in zip(LAYERS, projections, strict=True):
        tokens, place = compiled(**layer)(tokens, place, projection)
    tokens, place = jax.device_get((tokens, place))

    start = dict.fromkeys(range(ROWS), 0)  # images lie one behind the other
    for (row, mine), (groups, held, _) in zip(images, references, strict=True):
        expected = np.empty(mine.sum(), int)
        for position, group in enumerate(groups):
            expected[group] = start[row] + position
        np.testing.assert_array_equal(place[row, mine], expected)
        here = row, slice(start[row], start[row] + len(groups))
        np.testing.assert_array_equal(tokens.size[here], [len(group) for group in groups])
        np.testing.assert_allclose(tokens.x[here], held, atol=1e-5)
        image = member[row, mine].any(axis=0)
        np.testing.assert_array_equal(tokens.member[here], np.tile(image, (len(groups), 1)))
        np.testing.assert_array_equal(tokens.prefix[here], np.arange(len(groups)) < prefix)
        start[row] += len(groups)
    for row, end in start.items():
        assert not tokens.member[row, end:].any()
