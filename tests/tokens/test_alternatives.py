"""Alternatives: what is carried fits, whole regions at a time, by the slope of their decisions."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from msvit_jax.tokens import alternatives

REGIONS = 9


def decisions(seed):
    rng = np.random.default_rng(seed)
    coarse = (rng.random((4, REGIONS)) < rng.random((4, 1))).astype(np.float32)
    return coarse, rng.integers(-3, 40, 4), rng.normal(size=(4, REGIONS)).astype(np.float32)


@given(seed=st.integers(0, 2**31))
def test_the_nearest_regions_are_carried_while_there_is_room(seed):
    coarse, room, slope = decisions(seed)
    carried = alternatives.nearest(jnp.asarray(coarse), jnp.asarray(slope), jnp.asarray(room))
    for image in range(4):
        left, expected = room[image], set()
        for region in sorted(range(REGIONS), key=lambda r: -slope[image, r]):
            left -= 4 if coarse[image, region] else 1
            if left < 0:
                break
            expected.add(region)
        assert set(np.flatnonzero(carried[image])) == expected
