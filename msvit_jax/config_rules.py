"""Rules for the values of config keys: one for each key of `config.base`, besides its type.

A rule tells whether its key may be None. Attributes of models have types and ranges, too; whether
they fit together is checked by the model itself (`check`).
"""

import dataclasses
import math
import numbers
import types
import typing
from typing import Any

from msvit_jax import image_size
from msvit_jax.errors import UserError, short

Rule = typing.Union["Number", "OneOf", "Text", "Flag", "Numbers", "Texts", "Size"]


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number in a range.

    Attributes:
      least: Smallest value; None for no limit.
      most: Largest value; None for no limit.
      above: Whether `least` itself is too small.
      below: Whether `most` itself is too large.
      optional: Whether None is a value.
      besides: Value outside of the range that has a meaning; None if there is none.
    """

    least: float | None = None
    most: float | None = None
    above: bool = False
    below: bool = False
    optional: bool = False
    besides: float | None = None

    def wanted(self) -> str:
        """Describes the expected values, for messages."""
        parts = []
        if self.least is not None:
            parts.append(f"more than {self.least:g}" if self.above else f"at least {self.least:g}")
        if self.most is not None:
            parts.append(f"less than {self.most:g}" if self.below else f"at most {self.most:g}")
        text = "a finite number" + (f" of {' and '.join(parts)}" if parts else "")
        if self.besides is not None:
            text += f", or {self.besides:g}"
        return text + (", or None" if self.optional else "")

    def fits(self, value: Any) -> bool:
        """Tells whether a value follows the rule."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return False
        if self.besides is not None and value == self.besides:
            return True
        value = float(value)
        if not math.isfinite(value):
            return False
        large = self.least is None or (value > self.least if self.above else value >= self.least)
        return large and (
            self.most is None or (value < self.most if self.below else value <= self.most)
        )


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Several finite numbers in a range.

    Attributes:
      each: Rule of each number.
      count: Number of numbers; None for any but none at all.
      rising: Whether no number may be smaller than the one before.
      optional: Whether None is a value.
    """

    each: Number
    count: int | None = 2
    rising: bool = False
    optional: bool = False

    def wanted(self) -> str:
        """Describes the expected values, for messages."""
        order = " in rising order" if self.rising else ""
        count = "one or several" if self.count is None else self.count
        text = f"{count} numbers{order}, each {self.each.wanted()}"
        return text + (", or None" if self.optional else "")

    def fits(self, value: Any) -> bool:
        """Tells whether a value follows the rule."""
        if value is None:
            return self.optional
        if not isinstance(value, tuple | list) or len(value) != (self.count or max(len(value), 1)):
            return False
        good = all(map(self.each.fits, value))
        return good and (not self.rising or list(value) == sorted(value))


@dataclasses.dataclass(frozen=True)
class Size:
    """A size in px, one number or (height, width); `optional` tells whether None is a value."""

    optional: bool = False

    def wanted(self) -> str:
        """Describes the expected values, for messages."""
        return image_size.WANTED + (", or None" if self.optional else "")

    def fits(self, value: Any) -> bool:
        """Tells whether a value follows the rule."""
        return self.optional if value is None else image_size.fits(value)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of a few texts."""

    values: tuple[str, ...]

    def wanted(self) -> str:
        """Describes the expected values, for messages."""
        return "one of " + ", ".join(map(repr, self.values))

    def fits(self, value: Any) -> bool:
        """Tells whether a value follows the rule."""
        return value in self.values


@dataclasses.dataclass(frozen=True)
class Text:
    """A text; `empty` tells whether it may be empty."""

    empty: bool = True

    def wanted(self) -> str:
        """Describes the expected values, for messages."""
        return "a text" if self.empty else "a text that is not empty"

    def fits(self, value: Any) -> bool:
        """Tells whether a value follows the rule."""
        return isinstance(value, str) and (self.empty or bool(value.strip()))


@dataclasses.dataclass(frozen=True)
class Texts:
    """A tuple of texts."""

    def wanted(self) -> str:
        """Describes the expected values, for messages."""
        return "texts, separated by commas"

    def fits(self, value: Any) -> bool:
        """Tells whether a value follows the rule."""
        return isinstance(value, tuple | list) and all(isinstance(text, str) for text in value)


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or false."""

    def wanted(self) -> str:
        """Describes the expected values, for messages."""
        return "true or false"

    def fits(self, value: Any) -> bool:
        """Tells whether a value follows the rule."""
        return isinstance(value, bool)


_POSITIVE = Number(0, above=True)
_NOT_NEGATIVE = Number(0)
_COUNT = Number(1)
_OPTIONAL_COUNT = Number(1, optional=True)
_SHARE = Number(0, 1)
_SOME_SHARE = Number(0, 1, above=True)
_NOT_ALL = Number(0, 1, below=True)
_BETWEEN = Number(0, 1, above=True, below=True)
_DEVICES = Number(1, besides=-1)
_NAME = Text(empty=False)
_DTYPE = OneOf(("float32", "bfloat16", "float16"))

RULES: dict[str, Rule] = {
    "seed": Number(0, 2**32 - 1),
    "model.name": _NAME,
    "dtype": _DTYPE,
    "batch_size": _COUNT,
    "eval_batch_size": _OPTIONAL_COUNT,
    "epochs": _POSITIVE,
    "steps": _OPTIONAL_COUNT,
    "eval_every_epochs": _POSITIVE,
    "log_every_steps": _COUNT,
    "terminal": OneOf(("lines", "bar")),
    "log_images": _NOT_NEGATIVE,
    "init_from": Text(),
    "ema_decay": _NOT_ALL,
    "data.name": _NAME,
    "data.data_dir": Text(),
    "data.train_split": _NAME,
    "data.eval_split": _NAME,
    "data.match_classes": OneOf(("exactly", "by_name", "by_number")),
    "data.target": OneOf(("label", "segmentation_mask")),
    "data.mask_classes": Number(1, 255, optional=True),
    "data.ignore_label": Number(0, 65535, optional=True),
    "data.short_side": _OPTIONAL_COUNT,
    "data.scale_range": Numbers(_POSITIVE, rising=True, optional=True),
    "data.max_class_share": _SOME_SHARE,
    "data.photometric": Flag(),
    "data.window_stride": Size(optional=True),
    "data.eval_scales": Numbers(_POSITIVE, count=None),
    "data.eval_flip": Flag(),
    "data.image_size": Size(),
    "data.crop_scale": Numbers(_SOME_SHARE, rising=True, optional=True),
    "data.crop_ratio": Numbers(_POSITIVE, rising=True),
    "data.resize": _NAME,
    "data.flip": Flag(),
    "data.exif_orientation": Flag(),
    "data.pad_shift": _NOT_NEGATIVE,
    "data.randaugment.num_ops": _NOT_NEGATIVE,
    "data.randaugment.magnitude": _NOT_NEGATIVE,
    "data.randaugment.std": _NOT_NEGATIVE,
    "data.color_jitter": _NOT_NEGATIVE,
    "data.erasing": _SHARE,
    "data.eval_crop": _SOME_SHARE,
    "data.mixup": _NOT_NEGATIVE,
    "data.cutmix": _NOT_NEGATIVE,
    "data.mix_prob": _SHARE,
    "data.mix_switch_prob": _SHARE,
    "data.workers": _NOT_NEGATIVE,
    "data.prefetch": _NOT_NEGATIVE,
    "data.cache": Flag(),
    "data.on_device": Flag(),
    "optimizer.name": OneOf(("adamw", "sgd")),
    "optimizer.schedule": OneOf(("cosine", "poly")),
    "optimizer.power": _POSITIVE,
    "optimizer.momentum": _NOT_ALL,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.min_learning_rate": _NOT_NEGATIVE,
    "optimizer.warmup_epochs": _NOT_NEGATIVE,
    "optimizer.cooldown_epochs": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.b1": _NOT_ALL,
    "optimizer.b2": _NOT_ALL,
    "optimizer.layer_decay": _SOME_SHARE,
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "optimizer.accum_steps": _COUNT,
    "optimizer.gate_learning_rate": Number(0, optional=True),
    "optimizer.encoder_learning_rate": Number(0, optional=True),
    "optimizer.freeze": Texts(),
    "capacity.num_buckets": _COUNT,
    "capacity.alternatives": _NOT_NEGATIVE,
    "capacity.alternatives_every": _COUNT,
    "capacity.every_steps": _COUNT,
    "capacity.min_saving": _SHARE,
    "capacity.max_overflow": _SHARE,
    "capacity.max_recompiles": _NOT_NEGATIVE,
    "keep_rate.hold_epochs": _NOT_NEGATIVE,
    "keep_rate.epochs": _NOT_NEGATIVE,
    "keep_rate.num_rates": _COUNT,
    "loss.label_smoothing": _NOT_ALL,
    "loss.gate.weight": _NOT_NEGATIVE,
    "loss.gate.correction": _SHARE,
    "loss.gate.clip": Number(0, 0.5, below=True),
    "loss.gate.kind": OneOf(("none", "rate", "l0", "bas", "gbas")),
    "loss.gate.target": _BETWEEN,
    "loss.gate.sigma": _POSITIVE,
    "loss.gate.prior": OneOf(("relaxed_bernoulli", "beta")),
    "loss.gate.temperature": _POSITIVE,
    "loss.gate.beta": Numbers(_POSITIVE),
    "loss.gate.start": OneOf(("center", "uniform")),
    "loss.distillation.teacher": Text(),
    "loss.distillation.model": Text(),
    "loss.distillation.weight": _SHARE,
    "loss.distillation.temperature": _POSITIVE,
    "loss.distillation.kind": OneOf(("soft", "hard")),
    "loss.exits.distillation": _SHARE,
    "loss.exits.temperature": _POSITIVE,
    "mesh.data": _DEVICES,
    "mesh.fsdp": _DEVICES,
    "checkpoint.keep_latest": _COUNT,
    "checkpoint.every_steps": _NOT_NEGATIVE,
}
# Rules for attributes of models; their types are those of the fields.
MODEL_RULES: dict[str, Rule] = {
    "num_classes": _NOT_NEGATIVE,
    "image_size": Size(),
    "patch_size": _COUNT,
    "width": _COUNT,
    "depth": Number(1, 1000),  # one who wrote more made a mistake, and would wait for hours
    "heads": Number(1, 1000),
    "mlp_ratio": _POSITIVE,
    "register_tokens": _NOT_NEGATIVE,
    "layer_scale": Number(optional=True),
    "norm_epsilon": _POSITIVE,
    "drop_path": _NOT_ALL,
    "decoder_depth": _NOT_NEGATIVE,
    "decoder_heads": _OPTIONAL_COUNT,
    "decoder_drop_path": _NOT_ALL,
    "gate_hidden": _OPTIONAL_COUNT,
    "gate_bias": Number(),
    "temperature": _POSITIVE,
    "threshold": _SHARE,
    "fine_share": Number(0, 1, optional=True),
    "rows": _OPTIONAL_COUNT,
    "row_width": _OPTIONAL_COUNT,
    "row_groups": _COUNT,
    "mean": Numbers(Number(), 3),
    "std": Numbers(_POSITIVE, 3),
    "dtype": _DTYPE,
}
_MOST = 2**31 - 1  # whole numbers of any attribute: no array has a longer axis
# Types that fields of models have, with the types that values may have.
_PLAIN: dict[Any, Any] = {
    bool: bool,
    int: numbers.Integral,  # NumPy's as well
    float: numbers.Real,
    str: str,
    tuple: (tuple, list),
    types.NoneType: types.NoneType,
}


def rule_of(key: str) -> Rule | None:
    """Returns the rule of a dotted key; None if there is none."""
    return RULES.get(key) or MODEL_RULES.get(key.removeprefix("model."))


def check(key: str, value: Any, annotation: Any = None) -> None:
    """Checks one value.

    Args:
      key: Dotted key.
      value: Value of the key.
      annotation: Type of the field, for a model's attribute.

    Raises:
      UserError: The value is not valid; the message says which values are.
    """
    rule = rule_of(key)
    if key not in RULES and key.startswith("model.") and not isinstance(rule, Size):
        _check_type(key, value, annotation)
    if rule is not None and not rule.fits(value):
        raise UserError(f"{key}={short(value)} is not a valid value: {rule.wanted()} expected.")


def _check_type(key: str, value: Any, annotation: Any) -> None:
    """Checks a model's attribute against its field's type, if that is plain; skips others."""
    united = isinstance(annotation, types.UnionType)
    parts = typing.get_args(annotation) if united else (annotation,)
    kinds = [typing.get_origin(part) or part for part in parts]
    if annotation is None or any(kind not in _PLAIN for kind in kinds):
        return
    flag = isinstance(value, bool)
    if any(isinstance(value, _PLAIN[kind]) and (not flag or kind is bool) for kind in kinds):
        if isinstance(value, numbers.Integral) and abs(int(value)) > _MOST:
            raise UserError(f"{key}={short(value)} is not a valid value: at most {_MOST} expected.")
        return
    names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    raise UserError(f"{key}={short(value)} is not a valid value: {names} expected.")
