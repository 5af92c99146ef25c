"""Drawings of what a model did with an image; `python -m msvit_jax.visualize` writes them."""

from msvit_jax.visualize.maps import (
    GATE_COLUMNS,
    enlarge,
    gate_heat_map,
    gate_strip,
    token_map,
)
from msvit_jax.visualize.sheet import Column, Picture, Strip, panel, save

__all__ = [
    "GATE_COLUMNS",
    "Column",
    "Picture",
    "Strip",
    "enlarge",
    "gate_heat_map",
    "gate_strip",
    "panel",
    "save",
    "token_map",
]
