"""Earlier names of config keys and values, so that files, command lines and runs keep working."""

import re
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "model.budget": "model.token_capacity",
    "model.grid": "model.fixed_grid_size",
    "model.grids": "model.grid_sizes",
    "optimizer.accumulation": "optimizer.accum_steps",
    "trim.parts": "capacity.num_buckets",
    "trim.room": "capacity.alternatives",
    "trim.alternatives_every": "capacity.alternatives_every",
    "trim.every_steps": "capacity.every_steps",
    "trim.shrink": "capacity.min_saving",
    "trim.unfit": "capacity.max_overflow",
    "trim.changes": "capacity.max_recompiles",
    "fall.hold_epochs": "keep_rate.hold_epochs",
    "fall.epochs": "keep_rate.epochs",
    "fall.programs": "keep_rate.num_rates",
}

# Earlier values, by the current name of their key.
RENAMED_VALUES = {
    "loss.gate.start": {"centre": "center"},
    "model.gate": {"centre": "center"},
}


def current_key(key: str) -> str:
    """Returns the current name of a dotted config key."""
    return RENAMED.get(key, key)


def current_value(key: str, value: Any) -> Any:
    """Returns the current form of a value, given the current name of its key."""
    renamed = RENAMED_VALUES.get(key, {})
    return renamed.get(value, value) if isinstance(value, str) else value


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """Brings the keys and values of a nested config, as JSON has it, to their current names."""
    renamed: dict[str, Any] = {}
    for key, value in _leaves(config):
        key = current_key(key)
        *parents, leaf = key.split(".")
        section = renamed
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = current_value(key, value)
    return renamed


def hint(message: str) -> str:
    """Returns a hint for an error that names an earlier section or key; empty if none does."""
    sections = {name.split(".")[0] for name in RENAMED.values()}
    words = re.findall(r"\w+", message)
    for old, new in RENAMED.items():
        section, leaf = old.split(".")
        if (leaf if section in sections else section) in words:
            return f" (config.{section} is config.{new.split('.')[0]} now; e.g. {old} is {new})"
    return ""


def _leaves(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Lists dotted keys and values; an empty section is a value."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found
