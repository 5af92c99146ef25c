"""The TPU kernels of a block's halves, in Pallas' interpreter, against the block by parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu

import msvit_jax
from msvit_jax import sharding
from msvit_jax.models import block_kernel
from msvit_jax.models.attention import Mask
from msvit_jax.models.block import GELUS, Block
from msvit_jax.tokens.packing import NOBODY
from tests.models.test_attention_kernel import random_case
from tests.models.test_vit import rough

# Each kind of mask once, with each form of a block: heads that fill tiles, parts of them, or lie in
# two; 48 tokens, and numbers that fill no tile.
CASES = [
    ((), {"heads": 2, "width": 128}, 48),
    (("weights",), {"heads": 4, "width": 256, "qkv_bias": False}, 50),
    (("segments",), {"heads": 3, "width": 192, "layer_scale": 0.5}, 57),
    (("alone", "sizes"), {"heads": 1, "width": 96, "gelu": "tanh", "norm_epsilon": 1e-3}, 49),
    (("weights", "sizes"), {"heads": 4, "width": 320, "layer_scale": 0.1}, 65),
]


def case(parts, options, length, batch=4, dtype=jnp.float32):
    """A block with rough parameters, tokens and a mask."""
    block = Block(hidden=300, dtype=dtype, **options)
    heads, width = options["heads"], options["width"]
    _, mask = random_case(1, batch, length, heads, width // heads, 1.0, parts)
    x = jax.random.normal(jax.random.key(0), (batch, length, width), dtype)
    params = rough(jax.eval_shape(block.init, jax.random.key(0), x))
    return block, params, x, mask


def tpu(*arrays, default, tpu=None, **others):
    """What `lax.platform_dependent` does on a TPU."""
    return (tpu or default)(*arrays)


@pytest.fixture
def with_kernels(monkeypatch):
    """Blocks take the kernels, whatever the platform and dtype."""
    monkeypatch.setattr(lax, "platform_dependent", tpu)
    monkeypatch.setattr(block_kernel, "may_be_used", lambda x, implementation: True)
    with pltpu.force_tpu_interpret_mode():
        yield


def answer(block, params, x, mask):
    """The block's answer for tokens of images, zero for others."""
    held = True if mask.segments is None else (mask.segments != NOBODY)[:, :, None]
    run = jax.jit(lambda *arrays: block.apply(*arrays))  # traced anew, with what is patched
    return jnp.where(held, run(params, x, None, mask), 0)


@pytest.mark.parametrize(("parts", "options", "length"), CASES, ids=str)
def test_answers_are_those_of_the_block_by_parts(parts, options, length, request):
    block, params, x, mask = case(parts, options, length)
    if mask.segments is not None:  # what lies in empty positions reaches no token
        x = jnp.where((mask.segments == NOBODY)[:, :, None], jnp.nan, x)
    wanted = answer(block, params, x, mask)
    request.getfixturevalue("with_kernels")
    found = answer(block, params, x, mask)
    assert np.abs(wanted - jnp.where(wanted != 0, x, 0)).max() > 0.1  # a block does something
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))


def test_bfloat16_is_as_near_to_float32_as_the_block_by_parts(request):
    block, params, x, mask = case(("weights",), {"heads": 2, "width": 128}, 50)
    narrow = block.clone(dtype=jnp.bfloat16), params, x.astype(jnp.bfloat16), mask
    exact = answer(block, params, narrow[2].astype(jnp.float32), mask)
    error = lambda found: float(jnp.abs(found.astype(jnp.float32) - exact).mean())  # noqa: E731
    by_parts = error(answer(*narrow))
    request.getfixturevalue("with_kernels")
    found = answer(*narrow)
    assert found.dtype == jnp.bfloat16
    assert 0 < error(found) <= by_parts


def test_a_gradient_is_that_of_the_block_by_parts(request):
    block, params, x, mask = case(("weights",), {"heads": 2, "width": 128}, 48)

    def gradient():
        def loss(params, x, weights):
            return (block.apply(params, x, None, Mask(weights=weights)) ** 2).mean()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(params, x, mask.weights)

    wanted = gradient()
    request.getfixturevalue("with_kernels")
    for a, b in zip(*map(jax.tree.leaves, (gradient(), wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_each_device_computes_its_own_images(request):
    block, params, x, mask = case(("segments",), {"heads": 2, "width": 64}, 48, batch=8)
    wanted = answer(block, params, x, mask)
    mesh = sharding.make_mesh(fsdp=2)
    cut = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))  # noqa: E731
    spread = jax.device_put(params, sharding.tree_sharding(mesh, params))
    request.getfixturevalue("with_kernels")
    with jax.set_mesh(mesh):
        found = answer(block, spread, *jax.tree.map(cut, (x, mask)))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("gelu", GELUS)
def test_the_kernels_gelus_are_those_of_the_block(gelu):
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -1e4, 1e4]]).astype(np.float32)
    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(block_kernel._GELUS[gelu])(x)
    exact = GELUS[gelu](jnp.asarray(x))
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=2e-6)


def test_models_take_them_on_tpus_for_inference_only(monkeypatch):
    def kernels(gradient=False, **options):
        given = {"depth": 1, "dtype": jnp.bfloat16, **options}
        model = msvit_jax.create_model("msvit_deit_tiny_patch16_224", **given)
        images = jax.ShapeDtypeStruct((16, 224, 224, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        run = lambda *args: model.apply(*args).logits.sum()  # noqa: E731
        with jax.set_mesh(sharding.make_mesh()):
            text = str(jax.make_jaxpr(jax.grad(run) if gradient else run)(variables, images))
        return text.count("name=attention_half"), text.count("name=mlp_half")

    assert kernels() == (0, 0)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert kernels() == (1, 1)
    assert kernels(gradient=True) == (0, 0)
    assert kernels(attention_impl="xla") == (0, 0)
    assert kernels(dtype=jnp.float32) == (0, 0)
    assert kernels(layout="budget", token_capacity=100, row_groups=8) == (1, 1)
    both = kernels(layout="budget", token_capacity=(60, 100), row_groups=8)
    assert both == (2, 1)  # attention for each length
    # Reducers need attention's keys.
    assert kernels(reducer="tome", remove=8) == (0, 1)


def test_rows_laid_end_to_end(request):
    """Two groups of 3 rows of 48 and 9 of 65 tokens: 729, more than the MLP takes at a time."""
    block, params, x, _ = case((), {"heads": 2, "width": 64}, 3 * 48 + 9 * 65, batch=2)
    buckets = ((3, 48), (9, 65))
    firsts = np.concatenate([48 * np.arange(3), 144 + 65 * np.arange(9)])
    shown = np.random.default_rng(0).random((2, 729)) < 0.7
    shown[:, firsts] = True
    mask = Mask(weights=jnp.asarray(shown, jnp.float32), length_buckets=buckets)
    wanted = answer(block, params, x, mask)
    request.getfixturevalue("with_kernels")
    found = answer(block, params, x, mask)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))


def test_what_does_not_fit_the_chip_is_done_by_parts(monkeypatch, request):
    block, params, x, mask = case((), {"heads": 4, "width": 512}, 48)
    wanted = answer(block, params, x, mask)
    request.getfixturevalue("with_kernels")
    monkeypatch.setattr(sharding, "vmem_bytes", lambda: 13 << 20)
    monkeypatch.setattr(block_kernel, "_call", None)
    np.testing.assert_allclose(answer(block, params, x, mask), wanted, atol=1e-5)
