"""Comparison of a model's classes with those of a data set: how many, and which.

Class 3 of one is not class 3 of another. Where both have names and these differ, the answers mean
something else than the labels, however good the figures look. The config's `data.match_classes`
decides what to do then.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msvit_jax.errors import UserError
from msvit_jax.tree import map_names

EXACTLY, BY_NAME, BY_NUMBER = "exactly", "by_name", "by_number"
# Parameters by class, last axis; and those of a mask transformer, first axis.
_HEAD = re.compile(r"(^|/)((head|head_dist)/(kernel|bias)|mask_norm/(scale|bias))$")
_FIRST_AXIS = re.compile(r"(^|/)decoder/class_embed$")
# Names that transformers writes for classes without names.
_PLACEHOLDER = re.compile(r"LABEL_\d+")
_SHOWN = 4


def check_count(model: int, data: int, *, of: str = "The model", remedy: str = "") -> None:
    """Compares numbers of classes.

    Args:
      model: Number of the model's classes.
      data: Number of the data set's classes.
      of: Name of the answering thing, for the message.
      remedy: Advice in place of the usual one; empty for the usual one.

    Raises:
      UserError: The numbers differ.
    """
    if model != data:
        raise UserError(
            f"{of} has {model} classes but the data set has {data}: its answers would mean "
            "nothing. "
            + (remedy or "Use the data set that it was trained on, or a model of the data's.")
        )


def order(
    answers: Sequence[str], data: Sequence[str], how: str, *, of: str = "The model"
) -> np.ndarray | None:
    """Finds the index, among a model's classes, of each class of a data set.

    Args:
      answers: Names of the model's classes; empty if not known.
      data: Names of the data set's classes; empty if not known.
      how: Way of matching, "exactly", "by_name" or "by_number".
      of: Name of the answering thing, for messages.

    Returns:
      For each class of the data the model's, or None if they are the same or assumed to be.

    Raises:
      UserError: The names differ, and `how` does not resolve it.
    """
    answers, data = list(answers), list(data)
    if how == BY_NUMBER or answers == data or not (_known(answers) and _known(data)):
        return None
    same = sorted(answers) == sorted(data)
    if how == BY_NAME and same:
        indices = {name: index for index, name in enumerate(answers)}
        return np.asarray([indices[name] for name in data])
    raise UserError(_difference(answers, data, same, of))


def _known(names: Sequence[str]) -> bool:
    return bool(names) and not all(_PLACEHOLDER.fullmatch(name) for name in names)


def _difference(answers: Sequence[str], data: Sequence[str], same: bool, of: str) -> str:
    by_number = f"--config.data.match_classes={BY_NUMBER} takes class 0 for class 0 and so on"
    if same:
        return (
            f"{of} has the data set's classes in another order: {_shown(answers)} against "
            f"{_shown(data)}. --config.data.match_classes={BY_NAME} brings them together; "
            f"{by_number}."
        )
    theirs = [name for name in answers if name not in set(data)]
    ours = [name for name in data if name not in set(answers)]
    return (
        f"{of} has classes of other names than the data set: {_shown(theirs)} against "
        f"{_shown(ours)}. If they are the same things under other names, {by_number}; otherwise "
        "use the data set that it was trained on."
    )


def _shown(names: Sequence[str]) -> str:
    more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def in_order(params: Any, indices: np.ndarray | None) -> Any:
    """Reorders the heads of a model's parameters.

    Args:
      params: Parameters of a model, a tree or a flat dict by name.
      indices: Indices of the model's classes in the new order, from `order`; None to leave them as
        they are.
    """
    if indices is None:
        return params

    def ordered(name: str, leaf: Any) -> Any:
        if _FIRST_AXIS.search(name):
            return leaf[indices]
        return leaf[..., indices] if _HEAD.search(name) else leaf

    return map_names(ordered, params)


def without_heads(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns weights without the heads, which answer other classes than the data's."""
    heads = (_HEAD, _FIRST_AXIS)
    return {name: leaf for name, leaf in flat.items() if not any(h.search(name) for h in heads)}
