"""Reducers: which tokens of a sequence stay in a layer, and which of them the others go into.

Token Mergence ("mergence") is this library's own; the others are what it is compared with. A
reducer of your own is a file with a subclass of `Reducer` and a line in `REDUCERS`:
docs/extending.md.
"""

import dataclasses
from typing import Any

from msvit_jax.reducers import tome
from msvit_jax.reducers.algm import ALGM
from msvit_jax.reducers.base import KeepTable, Merge, Reducer, Tokens
from msvit_jax.reducers.evit import EViT
from msvit_jax.reducers.mergence import Mergence
from msvit_jax.reducers.random import Random
from msvit_jax.reducers.tome import ToMe
from msvit_jax.reducers.topk import TopK

REDUCERS: dict[str, type[Reducer]] = {
    "mergence": Mergence,
    "topk": TopK,
    "evit": EViT,
    "tome": ToMe,
    "algm": ALGM,
    "random": Random,
}
NAMES = ("none", *REDUCERS)

__all__ = [
    "ALGM", "NAMES", "REDUCERS", "EViT", "KeepTable", "Merge", "Mergence", "Random", "Reducer",
    "ToMe", "Tokens", "TopK", "option_types", "tome",
]  # fmt: skip


def option_types() -> dict[str, Any]:
    """Returns options of all reducers with their types, except for those every reducer has."""
    common = {field.name for field in dataclasses.fields(Reducer)}
    return {
        field.name: field.type
        for reducer in REDUCERS.values()
        for field in dataclasses.fields(reducer)
        if field.name not in common
    }
