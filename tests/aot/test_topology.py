import importlib.util

import pytest

from msvit_jax.aot import topology
from msvit_jax.errors import UserError


@pytest.mark.parametrize(
    "name", ["v9:2x2", "v5e", "v5e:", "v5e:2", "v5e:2x2x1", "v4:2x2", "v5p:2xx2", "v6e:0x1", ""]
)
def test_unknown_topology_names_the_forms(name):
    with pytest.raises(UserError, match=r"v5e:16x16, v5e:1x1, v4:2x2x1, .* v5p three") as caught:
        topology.find(name)
    assert repr(name) in str(caught.value)


def test_libtpu_absent(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]==\d"):
        topology.without_a_tpu()
