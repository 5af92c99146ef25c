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
