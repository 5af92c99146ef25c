import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from msvit_jax import sharding
from msvit_jax.errors import UserError


def _spec(shape, mesh):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    return sharding.tree_sharding(mesh, [leaf])[0].spec


def test_mesh_takes_all_devices():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(sharding.make_mesh(-1, 4).shape) == {"data": 2, "fsdp": 4}
    assert dict(sharding.make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4}


@pytest.mark.parametrize("axes", [(3, 1), (-1, 3), (16, 1), (0, 8), (-1, 0)])
def test_mesh_that_does_not_fit_the_devices(axes):
    with pytest.raises(UserError, match="8 devices"):
        sharding.make_mesh(*axes)


def test_fsdp_cuts_the_largest_axis_that_divides():
    mesh = sharding.make_mesh(-1, 4)
    assert _spec((8, 16), mesh) == P(None, "fsdp")
    assert _spec((8, 18), mesh) == P("fsdp")
    assert _spec((3, 5), mesh) == P()
    assert _spec((), mesh) == P()
    assert _spec((8, 16), sharding.make_mesh()) == P()


def _device(index, slice_index):
    kind = {"platform": "x", "device_kind": "x"}
    return types.SimpleNamespace(id=index, slice_index=slice_index, process_index=index, **kind)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2), (2, 4)])
def test_parameters_are_cut_within_a_slice(data, fsdp):
    devices = [_device(i, (i * 5) % 8 // 4) for i in range(8)]
    mesh = sharding.across_slices(devices, 2, data, fsdp)
    assert mesh.shape == (data, fsdp)
    assert sorted(device.id for device in mesh.ravel()) == list(range(8))
    of = np.vectorize(lambda device: device.slice_index)(mesh)
    assert (of == of[:, :1]).all()
    np.testing.assert_array_equal(of[:, 0], np.repeat([0, 1], data // 2))


def test_parameters_are_not_cut_across_slices():
    with pytest.raises(UserError, match=r"mesh\.fsdp=8 .* 2 slices .* divisor of the 4 devices"):
        sharding.across_slices([_device(i, i // 4) for i in range(8)], 2, 1, 8)


def test_description_counts_the_bytes_on_a_device():
    shapes = {
        "blocks_0": {"kernel": jax.ShapeDtypeStruct((6, 8), np.float32)},
        "blocks_1": {"kernel": jax.ShapeDtypeStruct((6, 8), np.float32)},
        "scale": jax.ShapeDtypeStruct((3,), np.float32),
    }
    tree = _sharded(shapes, sharding.make_mesh(-1, 4))
    arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    placed = jax.device_put(arrays, jax.tree.map(lambda x: x.sharding, tree))
    device = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(placed)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    lines = sharding.describe(tree, tree)
    assert lines == [
        f"state: {held / 1e6:.3g} MB on each device; parameters:",
        "  blocks_*/kernel: 2 x [6, 8], axis 1 cut, 9.6e-05 MB on each device",
        "  scale: 1 x [3], copied, 1.2e-05 MB on each device",
    ]
    whole = _sharded(shapes, sharding.make_mesh())
    assert sharding.describe(whole, whole) == ["state: 0.000396 MB on each device, copied"]


def _sharded(shapes, mesh):
    return jax.tree.map(
        lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split),
        shapes,
        sharding.tree_sharding(mesh, shapes),
    )


def test_batch_lies_on_every_device_once():
    mesh = sharding.make_mesh(-1, 4)
    rows = np.arange(16, dtype=np.int32)
    array = sharding.shard_batch(mesh, {"label": rows})["label"]
    np.testing.assert_array_equal(array, rows)
    assert [s.data.shape for s in array.addressable_shards] == [(2,)] * 8


def test_batch_size_that_cannot_be_cut_names_those_that_can():
    mesh = sharding.make_mesh()
    sharding.check_batch(32, mesh, microbatches=4)
    with pytest.raises(UserError, match=r"batch_size=20 .* use 16 or 24"):
        sharding.check_batch(20, mesh)
    with pytest.raises(UserError, match="use 16"):
        sharding.check_batch(8, mesh, microbatches=2)
