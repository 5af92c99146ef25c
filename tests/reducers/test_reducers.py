"""Merging against plain loops over the tokens of one image at a time."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msvit_jax import reducers
from msvit_jax.reducers import base
from tests.reducers.test_tome import published

ROWS, PLACES, WIDTH = 3, 14, 5
PREFIX = {"one image": 1, "several": 2}  # tokens before the patches of an image in each kind of row
MOST = 4  # images in a row of several: a prefix and one patch each, at least

CASES = {
    "mergence": ("mergence", {"keep": 0.6}),
    "mergence, by size": ("mergence", {"keep": 0.35, "merge_weights": "size"}),
    "topk": ("topk", {"keep": 0.5}),
    "evit": ("evit", {"keep": 0.5}),
    "tome": ("tome", {"keep": 0.6}),
    "tome, a fixed number": ("tome", {"remove": 3}),
    "random": ("random", {"keep": 0.5}),
}
MERGING = [name for name in CASES if name not in ("topk", "random")]
BY_SCORE = [name for name in CASES if not name.startswith("tome")]


def batch(seed, kind="one image"):
    """Rows of tokens; NaN and the highest scores in their inactive places."""
    rng = np.random.default_rng(seed)
    member = np.zeros((ROWS, PLACES, 1 if kind == "one image" else MOST + 1), bool)
    prefix = np.zeros((ROWS, PLACES), bool)
    for row in range(ROWS):
        if kind == "one image":
            member[row, :, 0] = rng.random(PLACES) < rng.choice([0.3, 0.8, 1.0])
            member[row, : PREFIX[kind] + 1] = True
            prefix[row, : PREFIX[kind]] = True
            continue
        lengths = PREFIX[kind] + rng.integers(1, PLACES - 1, rng.integers(1, MOST + 1))
        start = 0
        for image, length in enumerate(lengths):
            end = start + min(length, PLACES - start)
            if end - start > PREFIX[kind]:
                member[row, start:end, image] = True
                prefix[row, start : start + PREFIX[kind]] = True
                start = end
    empty = ~member.any(axis=2)
    x, keys = rng.normal(size=(2, ROWS, PLACES, WIDTH)).astype(np.float32)
    x[empty], keys[empty] = np.nan, np.nan
    importance = rng.random((ROWS, PLACES)).astype(np.float32)
    return reducers.Tokens(
        x=x,
        member=member,
        prefix=prefix,
        size=np.where(empty, 1, rng.integers(1, 5, (ROWS, PLACES))).astype(np.float32),
        importance=np.where(empty, 9, importance).astype(np.float32),
        keys=keys,
        random_score=rng.integers(0, 2**32, (ROWS, PLACES), dtype=np.uint32),
    )


@functools.cache
def compiled(reducer, kind, **options):
    reducer = reducers.REDUCERS[reducer](**options)
    table = reducer.keep_table(PLACES - PREFIX[kind])
    capacity = table.capacity(PLACES, PREFIX[kind], 1 if kind == "one image" else MOST)

    @jax.jit
    def run(tokens):
        merge = reducer.apply({}, tokens, table, capacity)
        return merge, merge.tokens(tokens.x), merge.sizes(tokens.size), merge.positions(PLACES)

    return run


def reduced(case, tokens, kind="one image"):
    reducer, options = CASES[case]
    return jax.device_get(compiled(reducer, kind, **options)(tokens))


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def softened(tokens, host, guests):
    """Weights that TPS gives: each token's similarity to its host, whose own is 1."""
    return {host: math.e} | {g: math.exp(cosine(tokens[g], tokens[host])) for g in guests}


def loop(case, x, size, score, keys, random_score, prefix):
    """One image: where each token is, None: dropped; what those that stay hold, and their sizes.

    Those that stay are in the order in which they must lie.
    """
    reducer, options = case
    patches = list(range(prefix, len(x)))
    stay = math.ceil(round(options.get("keep", 1) * len(patches), 6))
    if reducer == "random":
        score = random_score >> 8
    order = sorted(patches, key=lambda i: (-float(score[i]), i))
    where = {i: i for i in range(len(x))}
    if reducer in ("topk", "random"):
        where |= dict.fromkeys(order[stay:])
    elif reducer == "mergence":
        for i in order[stay:]:
            where[i] = max(order[:stay], key=lambda host: cosine(x[i], x[host]))
    elif reducer == "evit":
        where |= dict.fromkeys(order[stay:], order[stay] if order[stay:] else None)
    else:
        goes = min(options.get("remove", len(patches) - stay), len(patches) // 2)
        groups, _ = published(keys, prefix, goes)
        where = {i: group[0] for group in groups for i in group}
    held, sizes = {}, {}
    stayed = sorted({h for h in where.values() if h is not None})
    for host in stayed if reducer != "tome" else [group[0] for group in groups]:
        inside = [i for i in where if where[i] == host]
        sizes[host] = sum(size[i] for i in inside)
        if reducer == "evit":
            share = {i: score[i] if host in order[stay:] else 1.0 for i in inside}
        elif reducer == "mergence" and options.get("merge_weights") != "size":
            share = softened(x, host, [i for i in inside if i != host])
            share = {i: s / sum(share.values()) for i, s in share.items()}
        else:
            share = {i: size[i] / sizes[host] for i in inside}
        held[host] = sum(share[i] * x[i] for i in inside)
    return where, held, sizes


def images_of(tokens, row):
    """Indices of the tokens of each image of a row."""
    return [np.flatnonzero(m) for m in tokens.member[row].T if m.any()]


@pytest.mark.parametrize("kind", PREFIX)
@pytest.mark.parametrize("case", CASES)
@hypothesis.given(seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=10)
def test_every_reducer_does_what_a_loop_over_an_images_tokens_does(case, kind, seed):
    tokens = batch(seed, kind)
    merge, x, sizes, place = reduced(case, tokens, kind)
    for row in range(ROWS):
        stayed = []
        for image in images_of(tokens, row):
            values = (tokens.x, tokens.size, tokens.importance, tokens.keys, tokens.random_score)
            where, held, size = loop(CASES[case], *(v[row, image] for v in values), PREFIX[kind])
            stayed += [image[i] for i in held]
            for token, host in where.items():
                at = place[row, image[token]]
                if host is None:
                    assert at == -1
                    continue
                assert merge.kept[row, at] == image[host]
                np.testing.assert_allclose(x[row, at], held[host], atol=1e-5)
                assert sizes[row, at] == size[host]
        # Those that stay are in order and come first; inactive tokens stay inactive.
        count = len(stayed)
        np.testing.assert_array_equal(merge.kept[row, :count], stayed)
        behind = merge.kept[row, count:]
        behind = behind[behind < PLACES]
        assert not tokens.member[row, behind].any()
        assert (place[row, behind] >= count).all()


@pytest.mark.parametrize("case", MERGING)
@hypothesis.given(seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=10)
def test_what_is_merged_covers_every_token_once(case, seed):
    tokens = batch(seed)
    tokens = tokens.replace(size=np.ones_like(tokens.size))
    _, x, sizes, place = reduced(case, tokens)
    back = jax.device_get(base.unmerge(x, place))
    for row in range(ROWS):
        active = tokens.member[row, :, 0]
        assert (place[row, active] >= 0).all()
        counts = np.bincount(place[row, active], minlength=x.shape[1])
        np.testing.assert_array_equal(counts[counts > 0], sizes[row, counts > 0])
        assert counts.sum() == active.sum()
        np.testing.assert_array_equal(back[row, active], x[row, place[row, active]])


@pytest.mark.parametrize("case", ["topk", "random"])
def test_what_is_dropped_is_counted_nowhere_and_comes_back_as_zeros(case):
    tokens = batch(0)
    _, x, sizes, place = reduced(case, tokens)
    back = jax.device_get(base.unmerge(x, place))
    for row in range(ROWS):
        active = tokens.member[row, :, 0]
        gone = active & (place[row] < 0)
        patches = active.sum() - 1
        assert gone.sum() == patches - math.ceil(patches / 2)
        np.testing.assert_array_equal(back[row, gone], 0)
        held = sizes[row, : (active & ~gone).sum()].sum()
        assert held == tokens.size[row, active & ~gone].sum()


@pytest.mark.parametrize("case", BY_SCORE)
@hypothesis.given(seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=10)
def test_the_order_of_the_tokens_does_not_matter(case, seed):
    # Nor can it for ToMe, which merges tokens at even places into tokens at odd ones.
    tokens = batch(seed)
    order = np.random.default_rng(seed).permutation(np.arange(1, PLACES))
    order = np.concatenate([[0], order])
    moved = jax.tree.map(lambda leaf: leaf[:, order], tokens)
    back = [
        jax.device_get(base.unmerge(x, place))
        for _, x, _, place in (reduced(case, tokens), reduced(case, moved))
    ]
    active = tokens.member[:, order, 0]
    np.testing.assert_allclose(back[1][active], back[0][:, order][active], atol=1e-6)


@pytest.mark.parametrize("kind", PREFIX)
@pytest.mark.parametrize("reducer", reducers.REDUCERS)
def test_a_keep_rate_of_one_changes_nothing(reducer, kind):
    tokens = batch(3, kind)
    _, x, sizes, place = jax.device_get(compiled(reducer, kind, keep=1.0)(tokens))
    active = tokens.member.any(axis=2)
    for row in range(ROWS):
        np.testing.assert_array_equal(place[row, active[row]], np.arange(active[row].sum()))
        np.testing.assert_array_equal(x[row, : active[row].sum()], tokens.x[row, active[row]])
        np.testing.assert_array_equal(
            sizes[row, : active[row].sum()], tokens.size[row, active[row]]
        )


def test_places_are_composed_merge_by_merge():
    rng = np.random.default_rng(0)
    first, then = rng.integers(-1, 6, (2, 9)), rng.integers(-1, 3, (2, 6))
    expected = [[-1 if p < 0 else then[row, p] for p in first[row]] for row in range(2)]
    np.testing.assert_array_equal(base.compose(jnp.asarray(first), jnp.asarray(then)), expected)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", PREFIX)
def test_importance_is_the_attention_of_the_class_token_or_the_mean_patch(kind, mean):
    tokens = batch(7, kind)
    heads, channels = 2, 3
    rng = np.random.default_rng(1)
    query, key = rng.normal(size=(2, ROWS, PLACES, heads, channels)).astype(np.float32)
    query[~tokens.member.any(axis=2)] = key[~tokens.member.any(axis=2)] = np.nan
    # Queries are a linear map of what is seen; here they are what is seen, cut into heads.
    seen = jnp.asarray(query.reshape(ROWS, PLACES, -1))
    asking = base.importance_query(seen, jax.tree.map(jnp.asarray, tokens), mean=mean)
    asking = asking.reshape(ROWS, -1, heads, channels) / math.sqrt(channels)
    scores = jnp.einsum("bmhd,bnhd->bhmn", asking, jnp.asarray(key))
    found = np.asarray(base.attention_received(scores, jnp.asarray(tokens.member)))
    expected = np.zeros((ROWS, PLACES))
    for row in range(ROWS):
        for image in images_of(tokens, row):
            patches, size = image[PREFIX[kind] :], tokens.size[row]
            for head in range(heads):
                asks = query[row, image[0], head]
                if mean:
                    asks = np.average(query[row, patches, head], axis=0, weights=size[patches])
                shares = np.exp(key[row, image, head] @ asks / math.sqrt(channels))
                expected[row, image] += shares / shares.sum() / heads
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_random_tokens_are_drawn_evenly_and_by_their_own_values_alone():
    x = jax.random.normal(jax.random.key(0), (1, 4000, 8))
    luck = np.asarray(base.random_score(x))[0]
    assert len(np.unique(luck)) == 4000
    np.testing.assert_array_equal(base.random_score(x[:, ::-1])[0, ::-1], luck)
    heights, _ = np.histogram(luck, bins=10, range=(0, 2**32))
    assert (np.abs(heights - 400) < 5 * math.sqrt(400)).all()


SCHEDULES = {
    "evit, fused": ("evit", {"keep": 0.7}, (4, 7, 10), [197, 140, 100, 72]),
    "evit, not fused": ("topk", {"keep": 0.7}, (4, 7, 10), [197, 139, 98, 69]),
    "tome": ("tome", {"remove": 13}, range(1, 13), [197, *range(184, 40, -13)]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_tokens_into_the_mlps_are_the_published_ones(name):
    reducer, options, layers, published = SCHEDULES[name]
    found = [197]
    for _ in layers:
        table = reducers.REDUCERS[reducer](**options).keep_table(found[-1] - 1)
        kept, removed = table.capacity(found[-1], 1, 1)
        assert kept + removed == found[-1]
        found.append(kept)
    assert found == published


@hypothesis.given(
    case=st.sampled_from(list(CASES)), most=st.integers(1, 60), keep=st.floats(1e-6, 1.0)
)
@hypothesis.settings(max_examples=60)
def test_a_table_keeps_at_least_one_token_and_never_more_than_there_are(case, most, keep):
    reducer, options = CASES[case]
    options = options if "remove" in options else {"keep": keep}
    kept = reducers.REDUCERS[reducer](**options).keep_table(most).kept
    n = np.arange(most + 1)
    assert (kept >= np.minimum(n, 1)).all()
    assert (kept <= n).all()
    if "keep" in options and reducer != "tome":
        important = np.ceil(np.round(keep * n, 9)).clip(n > 0)
        fused = (important < n) if reducer == "evit" else 0
        np.testing.assert_array_equal(kept, important + fused)


@hypothesis.given(
    case=st.sampled_from(list(CASES)), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5)
)
@hypothesis.settings(max_examples=60)
def test_a_row_has_places_for_whatever_images_it_holds(case, lengths):
    reducer, options = CASES[case]
    prefix, length = 2, 70
    table = reducers.REDUCERS[reducer](**options).keep_table(length - prefix)
    kept, removed = table.capacity(length, prefix, 5)
    assert sum(table.kept[n] + prefix for n in lengths) <= kept <= length
    assert sum(n - table.kept[n] for n in lengths) <= removed


@pytest.mark.parametrize("add", [base.add_by_product, base.add_by_scatter])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_removed_tokens_are_added_to_their_targets(add, dtype):
    rng = np.random.default_rng(0)
    onto = rng.normal(size=(3, 5, 4)).astype(np.float32)
    moved = jnp.asarray(rng.normal(size=(3, 8, 4)), dtype)
    host = rng.integers(0, 6, (3, 8)).astype(np.int32)  # 5: dropped
    expected = onto.copy()
    for b, r in np.ndindex(*host.shape):
        if host[b, r] < 5:
            expected[b, host[b, r]] += np.asarray(moved, np.float32)[b, r]
    found = add(jnp.asarray(onto), moved, jnp.asarray(host))
    np.testing.assert_allclose(found, expected, atol=1e-5)
