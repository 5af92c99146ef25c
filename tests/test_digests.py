import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msvit_jax import digests

DTYPES = ("float32", "bfloat16", "int32", "uint8", "bool")


def _array(dtype, shape=(6, 4, 8)):
    values = np.random.default_rng(0).normal(size=shape) * 10
    return np.asarray(jax.numpy.asarray(values > 0 if dtype == "bool" else values).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bit_of_any_element_counts(dtype):
    array = _array(dtype)
    (whole,) = digests.of_tree({"a": array}).values()
    rng = np.random.default_rng(1)
    for _ in range(50):
        changed = array.copy()
        raw = changed.view(np.uint8).reshape(-1)
        raw[rng.integers(raw.size)] ^= 1 if dtype == "bool" else 1 << rng.integers(8)
        assert digests.of_tree({"a": changed}) != {"a": whole}


def test_order_and_place_count():
    array = _array("float32")
    found = {
        digests.of_tree([x])["0"]
        for x in (array, array[::-1], array.swapaxes(0, 1), array * 0, np.roll(array, 1, axis=2))
    }
    assert len(found) == 5


@pytest.mark.parametrize("spec", [("data",), (None, "data"), ("data", None, "model"), ()])
def test_a_digest_does_not_depend_on_how_an_array_is_spread(spec):
    array = _array("float32", (8, 4, 8))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digests.of_tree({"a": {"b": spread}}) == digests.of_tree({"a": {"b": array}})


def test_scalars_and_arrays_of_nothing_have_digests():
    assert digests.of_tree([np.int32(3)]) != digests.of_tree([np.int32(4)])
    assert set(digests.of_tree({"none": np.zeros((0, 3), np.float32)})) == {"none"}
    assert digests.of_tree({"a": {"b": {}}}) == {"a/b": digests.EMPTY}


def test_a_sealed_record_comes_back_and_a_changed_one_does_not():
    sealed = digests.seal({"mean": (0.1, 0.2), "names": ["a"]})
    assert digests.unseal(sealed) == ({"mean": [0.1, 0.2], "names": ["a"]}, True)
    assert digests.unseal({"names": ["a"]}) == ({"names": ["a"]}, False)
    with pytest.raises(ValueError, match="changed"):
        digests.unseal({**sealed, "names": ["b"]})
