import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msvit_jax import config
from msvit_jax.errors import UserError
from msvit_jax.train import optimizer

OPTIONS = {
    **config.base().optimizer.to_dict(),
    "learning_rate": 0.1,
    "min_learning_rate": 0.01,
    "warmup_epochs": 0.0,
    "cooldown_epochs": 0.0,
    "weight_decay": 0.0,
    "b1": 0.9,
    "b2": 0.999,
    "layer_decay": 1.0,
    "clip_norm": 0.0,
    "gate_learning_rate": None,
    "freeze": (),
}


def _params(stacked=False):
    one = lambda *shape: jnp.ones(shape, jnp.float32)  # noqa: E731
    block = {"attn": {"qkv": {"kernel": one(2, 6), "bias": one(6)}}, "norm1": {"scale": one(2)}}
    vit = {
        "patch_embed": {"proj": {"kernel": one(3, 2), "bias": one(2)}},
        "cls_token": one(1, 2),
        "pos_embed": one(5, 2),
        "norm": {"scale": one(2), "bias": one(2)},
        "head": {"kernel": one(2, 3), "bias": one(3)},
    }
    if stacked:
        vit["blocks"] = jax.tree.map(lambda x: jnp.stack([x] * 3), block)
    else:
        vit |= {f"blocks_{i}": block for i in range(3)}
    gate = {"fc1": {"kernel": one(4, 2), "bias": one(2)}, "pos_embed": one(2, 2, 2)}
    model = {"backbone": vit, "gate_mlp": gate}
    return {"model": model, "gate_loss": {"logit_mean": one(4)}}


def _updates(params, grads=None, rate=lambda step: 0.1, **options):
    """Updates of the first step by name; Adam's first step is the gradient's sign."""
    made = optimizer.make_optimizer({**OPTIONS, **options}, params, rate)
    grads = grads or jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(made.update)(grads, made.init(params), params)
    return optimizer.flat_names(updates)


def test_first_step_of_adam_is_the_sign_of_the_gradient():
    for name, update in _updates(_params()).items():
        np.testing.assert_allclose(update, -0.1, rtol=1e-5, err_msg=name)


def test_two_steps_of_adamw_by_hand():
    params = {"model": {"head": {"kernel": jnp.full((1, 1), 2.0)}}, "gate_loss": {}}
    made = optimizer.make_optimizer({**OPTIONS, "weight_decay": 0.5}, params, lambda step: 0.1)
    state, value, m, v = made.init(params), 2.0, 0.0, 0.0
    for step, gradient in enumerate((0.3, -0.7), 1):
        grads = jax.tree.map(lambda x, g=gradient: jnp.full_like(x, g), params)
        updates, state = made.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        adam = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        value -= 0.1 * (adam + 0.5 * value)
    np.testing.assert_allclose(params["model"]["head"]["kernel"][0, 0], value, rtol=1e-5)


@pytest.mark.parametrize("large", ["backbone", "gate", "priors"])
def test_each_group_is_clipped_by_its_own_norm(large):
    params = _params()
    flat = optimizer.flat_names(params)
    groups = {name: optimizer.group(name) for name in flat}
    assert set(groups.values()) == {"backbone", "gate", "priors"}
    grads = optimizer.map_names(lambda n, x: x * (1e6 if groups[n] == large else 1e-3), params)
    norms = {k: float(v) for k, v in optimizer.group_norms(grads).items()}
    clip = optimizer.clip_groups(2.0)
    clipped = optimizer.flat_names(clip.update(grads, clip.init(params))[0])
    for group in norms:
        before = np.concatenate(
            [np.ravel(x) for n, x in optimizer.flat_names(grads).items() if groups[n] == group]
        )
        after = np.concatenate([np.ravel(x) for n, x in clipped.items() if groups[n] == group])
        assert norms[group] == pytest.approx(np.linalg.norm(before), rel=1e-5)
        np.testing.assert_allclose(after, before * min(1, 2 / np.linalg.norm(before)), rtol=1e-5)


def test_only_kernels_decay():
    plain = _updates(_params())
    decayed = {
        name
        for name, update in _updates(_params(), weight_decay=0.5).items()
        if not np.allclose(update, plain[name])
    }
    assert decayed == {name for name in plain if name.endswith("kernel")}
    assert len(decayed) == 6


@pytest.mark.parametrize("stacked", [False, True])
def test_layer_decay_by_hand(stacked):
    updates = _updates(_params(stacked), layer_decay=0.5)
    rate = {name: -np.asarray(u) / 0.1 for name, u in updates.items()}
    base = "model/backbone/"
    np.testing.assert_allclose(rate[base + "head/kernel"], 1, rtol=1e-5)
    np.testing.assert_allclose(rate[base + "norm/scale"], 1, rtol=1e-5)
    for name in ("patch_embed/proj/kernel", "cls_token", "pos_embed"):
        np.testing.assert_allclose(rate[base + name], 0.5**4, rtol=1e-5)
    for layer in range(3):
        tail = "attn/qkv/kernel"
        if stacked:
            block = rate[f"{base}blocks/{tail}"][layer]
        else:
            block = rate[f"{base}blocks_{layer}/{tail}"]
        np.testing.assert_allclose(block, 0.5 ** (3 - layer), rtol=1e-5)
    np.testing.assert_allclose(rate["model/gate_mlp/pos_embed"], 1, rtol=1e-5)


def test_gate_and_its_priors_have_their_own_rate():
    for name, update in _updates(_params(), gate_learning_rate=0.02, layer_decay=0.5).items():
        if "gate" in name:
            np.testing.assert_allclose(update, -0.02, rtol=1e-5, err_msg=name)
        elif "head" in name:
            np.testing.assert_allclose(update, -0.1, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("patterns", "is_frozen"),
    [
        (("backbone/",), lambda n: n.startswith("model/backbone/")),
        (("gate",), lambda n: "gate" in n),
        ((r"backbone/blocks_[01]/",), lambda n: "blocks_0" in n or "blocks_1" in n),
    ],
)
def test_frozen_parameters_stay_and_have_no_state(patterns, is_frozen):
    params = _params()
    updates = _updates(params, freeze=patterns, weight_decay=0.5, layer_decay=0.5)
    assert {n for n, u in updates.items() if not np.any(u)} == set(filter(is_frozen, updates))
    made = optimizer.make_optimizer({**OPTIONS, "freeze": patterns}, params, lambda step: 0.1)
    moments = [n for n in optimizer.flat_names(made.init(params)) if "/mu/" in n]
    assert len(moments) == sum(not is_frozen(n) for n in updates)


def test_freezing_stops_the_gradient():
    params = _params()
    stopped = lambda p: optimizer.stop_frozen(p, ("backbone/",))  # noqa: E731
    total = lambda p: sum(x.sum() for x in jax.tree.leaves(stopped(p)))  # noqa: E731
    for name, gradient in optimizer.flat_names(jax.grad(total)(params)).items():
        np.testing.assert_array_equal(gradient, 0 if "backbone" in name else 1)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("backbon/",), "'backbon/' matches no parameter.*backbone/head"),
        ((".*",), "nothing to train"),
        (("[",), "not a regex"),
    ],
)
def test_freezing_what_is_not_there(patterns, message):
    with pytest.raises(UserError, match=message):
        optimizer.make_optimizer({**OPTIONS, "freeze": patterns}, _params(), lambda step: 0.1)


def test_clipping_is_of_the_whole_gradient():
    params = {"model": {"a": jnp.zeros(1), "b": jnp.zeros(1)}, "gate_loss": {}}
    grads = {"model": {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, "gate_loss": {}}
    made = optimizer.make_optimizer({**OPTIONS, "clip_norm": 1.0}, params, lambda step: 0.1)
    _, state = made.update(grads, made.init(params), params)
    moments = {n: x for n, x in optimizer.flat_names(state).items() if "/mu/" in n}
    assert sorted(float(m[0]) for m in moments.values()) == pytest.approx([0.06, 0.08])


def test_schedule_by_hand():
    rate = optimizer.schedule({**OPTIONS, "warmup_epochs": 2.0}, 30, 5.0)
    assert [float(rate(s)) for s in (0, 5, 10)] == pytest.approx([0.0, 0.05, 0.1])
    half = 0.01 + 0.09 * (1 + np.cos(np.pi * 0.5)) / 2
    assert [float(rate(s)) for s in (20, 30)] == pytest.approx([half, 0.01])
    assert float(optimizer.schedule(OPTIONS, 30, 5.0)(0)) == pytest.approx(0.1)


def test_cooldown_stays_at_the_minimum():
    options = {**OPTIONS, "warmup_epochs": 2.0, "min_learning_rate": 1e-5}
    longer = optimizer.schedule({**options, "cooldown_epochs": 4.0}, 50, 5.0)
    shorter = optimizer.schedule(options, 30, 5.0)
    np.testing.assert_allclose([longer(i) for i in range(31)], [shorter(i) for i in range(31)])
    np.testing.assert_allclose([longer(i) for i in range(30, 50)], 1e-5, rtol=1e-6)


def test_warmup_longer_than_the_run():
    with pytest.raises(UserError, match=r"warmup_epochs=6\.0 .* \(30 \+ 0 steps\)"):
        optimizer.schedule({**OPTIONS, "warmup_epochs": 6.0}, 30, 5.0)
    late = {**OPTIONS, "warmup_epochs": 4.0, "cooldown_epochs": 3.0}
    with pytest.raises(UserError, match=r"cooldown_epochs=3\.0 \(20 \+ 15 steps\)"):
        optimizer.schedule(late, 30, 5.0)


def test_moving_average_by_hand():
    ema, expected = {"x": jnp.zeros(())}, 0.0
    for step in range(20):
        ema = optimizer.update_ema(ema, {"x": jnp.float32(step)}, 0.5, jnp.int32(step))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(ema["x"]) == pytest.approx(expected, rel=1e-6)
