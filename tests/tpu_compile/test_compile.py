"""Against the real TPU compiler, which needs no TPU."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from msvit_jax import config as configs
from msvit_jax import sharding
from msvit_jax.aot import compiling, hlo, topology
from msvit_jax.models.attention import Mask, attention
from msvit_jax.models.block import Block

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'jax[tpu]'",
    ),
]
ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from msvit_jax.config import base

def get_config():
    config = base()
    config.model = {"name": "msvit_tiny_patch16_224", "depth": 1, "width": 128, "heads": 2}
    config.dtype = "bfloat16"
    config.data.name = "not_there"
    config.data.image_size = 64
    config.batch_size = 32
    config.loss.gate.kind = "gbas"
    return config
"""


@pytest.fixture(scope="module")
def chips():
    topology.without_a_tpu()
    compilation_cache.reset_cache()  # JAX looks once whether there is one
    quick = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)  # a TPU's program is as users get it
    yield topology.find("v5e:2x2")
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def _compile(chips, function, shape, spec, out=None):
    mesh = sharding.make_mesh(devices=chips.devices)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    place = None if out is None else NamedSharding(mesh, out)
    return jax.jit(function, out_shardings=place).lower(x).compile()


def test_a_small_models_train_step(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    command = [sys.executable, "-m", "msvit_jax.aot", f"--config={path}", "--topology=v5e:2x2"]
    command += ["--layouts=trimmed", "--tokens=10", "--config.model.num_classes=10"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    (record,) = shown["records"]
    assert (shown["chips"], record["batch"], record["fits"]) == (4, 32, True)

    config = configs.resolve(configs.load(str(path)), 10)
    model = configs.build_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    weights = sum(x.size for x in jax.tree.leaves(shapes)) * 4
    # Parameters and Adam's two moments on every chip, and its eight images; padding on top.
    arguments = 3 * weights + 8 * 64 * 64 * 3
    assert arguments < record["memory_bytes"]["arguments"] < 1.5 * arguments
    # Gradients, some in bfloat16, are summed over the chips; tokens stay where they are.
    # Batch shaping sorts the gate's probabilities over the whole batch.
    moved = {kind: c["bytes"] for kind, c in record["collectives"].items()}
    assert moved.pop("all-reduce") > 0.4 * weights
    tokens_of_a_chip = 8 * 11 * 128 * 2
    assert sum(moved.values()) < tokens_of_a_chip
    # Three times the forward pass; element-wise operations count in XLA, and not in ours.
    assert 0.9 < record["gmacs_per_image"] * 1e9 / (3 * float(model.macs([10])[0])) < 1.6
    assert record["mcycles"] > 0


def test_macs_and_cycles_of_a_product(chips):
    small, large = (
        compiling.figures(_compile(chips, lambda x: x @ x, (n, n), P()), 1) for n in (1024, 2048)
    )
    assert small["gmacs"] == pytest.approx(1024**3 / 1e9, rel=0.01)
    assert large["gmacs"] == pytest.approx(2048**3 / 1e9, rel=0.01)
    # Three passes of bfloat16 at most, 128 x 128 x 4 products a cycle at best.
    for figures, n in ((small, 1024), (large, 2048)):
        assert n**3 / (128 * 128 * 4) < figures["mcycles"] * 1e6 < 12 * n**3 / (128 * 128 * 4)
    assert not large["collectives"]


def test_a_loop_takes_its_trips(chips):
    def loop(trips):
        step = lambda x, _: (jnp.sin(x @ x), None)  # noqa: E731
        return lambda x: jax.lax.scan(step, x, None, length=trips)[0]

    one, seven, thirteen = (
        hlo.cycles(hlo.parse(_compile(chips, loop(n), (512, 512), P()).as_text()))
        for n in (1, 7, 13)
    )
    assert (one.loops, seven.loops, thirteen.loops) == (0, 1, 1)
    assert seven.unknown == 0
    assert (thirteen.total - seven.total) / 6 == pytest.approx(one.total, rel=0.25)


def test_collectives_have_the_bytes_they_move(chips):
    axes = sharding.BATCH_AXES
    total = _compile(chips, lambda x: x.sum(axis=0), (64, 4096), P(axes), P())
    (summed,) = hlo.collectives(hlo.parse(total.as_text())).items()
    assert summed == ("all-reduce", hlo.Collective(1, 4096 * 4))
    whole = _compile(chips, jnp.sin, (64, 4096), P(axes), P())
    (gathered,) = hlo.collectives(hlo.parse(whole.as_text())).items()
    assert gathered == ("all-gather", hlo.Collective(1, 64 * 4096 * 4))


def _of_eight_images(mesh, dtype, *shape):
    """An array [8, ...], its images on the chips of a mesh."""
    return jax.ShapeDtypeStruct((8, *shape), dtype, sharding=sharding.batch_sharding(mesh))


def _masks(mesh, tokens, heads, parts):
    """The named parts of a mask of eight images."""
    made = {
        "weights": (jnp.float32, tokens),
        "sizes": (jnp.float32, tokens),
        "segments": (jnp.int32, tokens),
        "bias": (jnp.bfloat16, heads, tokens, tokens),
    }
    return {part: _of_eight_images(mesh, *made[part]) for part in parts}


@pytest.mark.parametrize(
    ("tokens", "heads", "channels", "parts"),
    [
        (197, 6, 64, ()),
        (245, 3, 64, ("weights", "sizes")),
        (256, 6, 64, ("segments",)),
        (65, 4, 96, ("bias",)),
        (1024, 2, 64, ("weights",)),
    ],
)
def test_attention_of_short_sequences_is_one_kernel_each_way(chips, tokens, heads, channels, parts):
    mesh = sharding.make_mesh(devices=chips.devices)
    array = functools.partial(_of_eight_images, mesh)
    masks = _masks(mesh, tokens, heads, parts)
    given = [array(jnp.bfloat16, tokens, heads, channels)] * 3

    def loss(arrays, masks):
        out = attention(*arrays, Mask(**masks), implementation="pallas")
        return out.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(given, masks).compile()
    figures = compiling.figures(compiled, 2)
    assert figures["kernels"]["calls"] == 2
    # On a chip: two images, two products forward and five backward.
    assert figures["kernels"]["flops"] == 2 * 7 * 2 * heads * channels * tokens**2
    assert 0 < figures["kernels"]["vmem"] < 64 * 2**20
    assert not figures["collectives"]


def _block(devices, monkeypatch, tokens, width, heads, parts=()):
    """A block compiled for inference on tokens of eight images, and its number of parameters."""
    mesh = sharding.make_mesh(fsdp=2, devices=devices)
    array = functools.partial(_of_eight_images, mesh)
    masks = _masks(mesh, tokens, heads, parts)
    block = Block(width, heads, 4 * width, layer_scale=0.1, dtype=jnp.bfloat16)
    x = array(jnp.bfloat16, tokens, width)
    params = jax.eval_shape(block.init, jax.random.key(0), x)
    params = jax.tree.map(
        lambda leaf, cut: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cut),
        params,
        sharding.tree_sharding(mesh, params),
    )
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    with jax.set_mesh(mesh):
        run = jax.jit(lambda params, x, masks: block.apply(params, x, None, Mask(**masks)))
        compiled = run.lower(params, x, masks).compile()
    return compiling.figures(compiled, 2), sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("tokens", "width", "heads", "parts"),
    [
        (197, 384, 6, ("weights",)),
        (49, 192, 3, ("sizes",)),
        (256, 384, 6, ("segments",)),
        (640, 384, 6, ()),
    ],
)
def test_halves_of_a_block_are_one_kernel_each(chips, tokens, width, heads, parts, monkeypatch):
    figures, count = _block(chips.devices, monkeypatch, tokens, width, heads, parts)
    assert figures["kernels"]["calls"] == 2
    # On a chip: two images; attention's six products and the MLP's two.
    products = 12 * tokens * width**2 + 2 * tokens**2 * width
    assert figures["kernels"]["flops"] == 2 * 2 * products
    assert 0 < figures["kernels"]["vmem"] < 64 * 2**20
    # Parameters, which are cut, come together; tokens stay where they are.
    assert sum(kind["bytes"] for kind in figures["collectives"].values()) <= 4 * count


@pytest.mark.parametrize(("tokens", "kernels"), [(197, 1), (1024, 0)])
def test_a_chip_with_little_fast_memory_gets_what_fits(chips, tokens, kernels, monkeypatch):
    devices = topology.find("v4:2x2x1").devices
    figures, _ = _block(devices, monkeypatch, tokens, 768, 12, ("weights",))
    assert figures["kernels"]["calls"] == kernels


def test_what_does_not_fit_is_recognized(chips):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        _compile(chips, lambda x: jnp.sin(x[::-1]).T + x.T, (2**18, 2**16), P())
    needs, has = compiling.too_large(str(caught.value))
    assert needs >= 2**36
    assert 0.9 * 16 < has / topology.GIB <= 16


@pytest.mark.parametrize("name", ["v4:2x2x2", "v5p:2x2x1", "v6e:1x1", "v5e:16x16", "v5e:1x2"])
def test_a_device_is_a_chip(name, chips):
    sides = [int(side) for side in name.partition(":")[2].split("x")]
    found = topology.find(name)
    assert len(found.devices) == np.prod(sides)
    assert sharding.make_mesh(devices=found.devices).size == np.prod(sides)


def test_a_topology_that_no_host_makes_up(chips):
    with pytest.raises(topology.UserError, match=r"no topology 'v5e:3x7'.*v5e:16x16"):
        topology.find("v5e:3x7")
