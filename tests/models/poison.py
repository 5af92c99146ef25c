"""Poison in places that hold no token."""

import jax
import jax.numpy as jnp

from msvit_jax.tokens.packing import Packing


def poisonable(model, monkeypatch):
    """Compiles a model's answer (variables, images, coarse, poison), for either value of `poison`.

    True makes every place without a token NaN; False changes nothing. One program answers both.
    """
    gather = Packing.gather

    @jax.jit
    def run(variables, images, coarse, poison):
        def poisoned(self, tokens, *, fill=0.0):
            filled = gather(self, tokens, fill=fill)
            return jnp.where(poison, gather(self, tokens, fill=jnp.nan), filled)

        with monkeypatch.context() as patched:
            patched.setattr(Packing, "gather", poisoned)
            return model.apply(variables, images, coarse=coarse)

    return run
