"""Pictures of token maps and merge maps, from arrays alone: no model runs."""

from msvit_jax import extras

with extras.needed("plots"):
    from msvit_jax.pictures.maps import (
        GATE_COLUMNS,
        MERGE_LEGEND,
        count_tokens,
        enlarge,
        gate_heat_map,
        gate_strip,
        mask_overlay,
        merge_map,
        token_map,
    )
    from msvit_jax.pictures.sheet import Column, Picture, Strip, panel, save

__all__ = [
    "GATE_COLUMNS",
    "MERGE_LEGEND",
    "Column",
    "Picture",
    "Strip",
    "count_tokens",
    "enlarge",
    "gate_heat_map",
    "gate_strip",
    "mask_overlay",
    "merge_map",
    "panel",
    "save",
    "token_map",
]
