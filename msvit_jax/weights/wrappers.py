"""Finds the model among the arrays of a file and removes its wrapper.

Training programs prefix a model's names (`module.`, `_orig_mod.`, `model.`) or save it under a key
next to an optimizer, an average of itself, a teacher, and so on. Names of nested mappings are
joined first, so keys and prefixes are treated alike, and one rule works for every kind of file: a
model is found by the names typical of its format, and the prefix of these names is its wrapper.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from msvit_jax.errors import UserError

# Parts that PyTorch's own wrappers (compilation, several devices, saving memory) insert anywhere in
# names. They carry no information about the model.
_TRANSPARENT = re.compile(
    r"(?<![^./])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[./]"
)
# A name typical of each format; the first group is the wrapper.
_ROOTS = {
    "segmenter": re.compile(r"^(|.*[./])encoder\.patch_embed\.proj\.weight$"),
    "dvt": re.compile(r"^(|.*?[./])less_less_token\.pos_embed$"),
    "timm": re.compile(r"^(|.*[./])patch_embed\.proj\.weight$"),
    "huggingface": re.compile(
        r"^(|.*?[./])(?:(?:vit|deit|dinov2|dinov2_with_registers)\.)?"
        r"embeddings\.patch_embeddings\.projection\.weight$"
    ),
    "big_vision": re.compile(r"^(|.*[./])embedding/kernel$"),
    "ours": re.compile(
        r"^(|.*?[./])(?:backbone[./]|stage_\d+[./])?patch_embed[./](?:.*[./])?kernel$"
    ),
}
# A second name that must be there as well; nested modules have only one of the two.
_BESIDE = {
    "segmenter": ("decoder.head.weight", "decoder.proj_dec.weight"),
    "timm": ("blocks.0.norm1.weight",),
    "big_vision": ("Transformer/",),
}
_SEGMENTER_ENCODER = "encoder."
_DVT_STAGES = ("less_less_token.", "less_token.", "normal_token.")
_OPTIMIZERS = {"opt", "opt_state", "optimizer", "optimizer_states", "mu", "nu", "exp_avg"}
# timm prefers the first two to anything else (`load_state_dict`, use_ema=True).
AVERAGES = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "model_state_dict_ema",
    "ema_model",
    "ema",
    "params_ema",
    "ema_params",
)
# Of several models the one whose wrapper comes first here is taken; DINO evaluates its teacher.
_ORDER = (*AVERAGES, "teacher", "state_dict", "model", "model_state_dict", "net", "params")
_KNOWN = {*_ORDER, "student", "backbone", "encoder", "trunk", "network", "target"}
_TRUNKS = ("backbone", "encoder", "trunk", "model", "net", "vit")
_HEAD = re.compile(r"head\.(weight|bias)")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model among the arrays of a file.

    Attributes:
      arrays: Arrays by the names of its format, without the wrapper.
      format: One of `formats.FORMATS` or 'ours'.
      wrapper: Prefix that its names had; empty if none.
      beside: Names of the other contents of the file, in groups with numbers of arrays.
      notes: Remarks on which of several models was chosen.
    """

    arrays: dict[str, Any]
    format: str
    wrapper: str = ""
    beside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def undo(arrays: Mapping[str, Any]) -> Model | None:
    """Finds the model among arrays and removes its wrapper; None if no format is recognized.

    Of several models, an average is preferred, as in timm, and a teacher to its student; the notes
    report the choice.

    Args:
      arrays: Arrays by name; names of nested mappings are joined with '.' or '/'.

    Raises:
      UserError: There are several models and no rule to choose one.
    """
    plain = _without_transparent(arrays)
    roots = _roots(plain)
    if not roots:
        return None
    wrapper = _choose(roots, plain)
    inner = {n.removeprefix(wrapper): x for n, x in plain.items() if n.startswith(wrapper)}
    outer = {n: x for n, x in plain.items() if not n.startswith(wrapper)}
    for name in _heads_beside(outer, wrapper, inner):
        inner[name[len(_parent(wrapper)) :]] = outer.pop(name)
    others = [root for root in roots if root != wrapper and root.startswith(wrapper)]
    for name in [n for n in inner if (wrapper + n).startswith(tuple(others))] if others else []:
        outer[wrapper + name] = inner.pop(name)
    return Model(inner, roots[wrapper], wrapper, tuple(groups(outer)), _notes(roots, wrapper))


def groups(names: Iterable[str]) -> list[str]:
    """Groups names by their first parts, with the number of arrays of each."""
    names = list(names)
    first = {name: re.split(r"[./]", name)[0] for name in names}
    counts = Counter(first.values())
    whole = {part: name for name, part in first.items()}
    return [
        f"{part} ({count} arrays)" if count > 1 else whole[part] for part, count in counts.items()
    ]


def _without_transparent(arrays: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, x in arrays.items():
        short = _TRANSPARENT.sub("", name)
        if short in plain:
            raise UserError(
                f"{name} is there twice, with and without wrappers: the file holds several models; "
                "save the one you mean alone."
            )
        plain[short] = x
    return plain


def _roots(names: Mapping[str, Any]) -> dict[str, str]:
    """The format of each model, by the model's wrapper."""
    roots: dict[str, str] = {}
    for form, pattern in _ROOTS.items():
        for found in filter(None, map(pattern.match, names)):
            root = found[1]
            if root in roots or _of_optimizer(root) or root.endswith(_DVT_STAGES):
                continue
            beside = _BESIDE.get(form)
            if beside is not None and not _any_below(root, beside, names):
                continue
            if roots.get(root.removesuffix(_SEGMENTER_ENCODER)) != "segmenter":
                roots[root] = form
    return roots


def _any_below(root: str, beginnings: tuple[str, ...], names: Iterable[str]) -> bool:
    wanted = tuple(root + beginning for beginning in beginnings)
    return any(name.startswith(wanted) for name in names)


def _parts(root: str) -> list[str]:
    return [part for part in re.split(r"[./]", root) if part]


def _of_optimizer(root: str) -> bool:
    # Flax's first optimizers held the parameters themselves: opt/target/.
    return not root.startswith("opt/target/") and bool(_OPTIMIZERS & set(_parts(root)))


def _rank(root: str) -> tuple[int, ...]:
    ranks = [_ORDER.index(part) if part in _ORDER else len(_ORDER) for part in _parts(root)]
    return tuple(sorted(ranks))


def _is_average(root: str) -> bool:
    return bool(set(AVERAGES) & set(_parts(root)))


def _choose(roots: Mapping[str, str], names: Mapping[str, Any]) -> str:
    if len(roots) == 1:
        return next(iter(roots))
    averages = [root for root in roots if _is_average(root)]
    candidates = sorted(averages or roots, key=_rank)
    known = all(root and set(_parts(root)) <= _KNOWN for root in candidates)
    sure = _rank(candidates[0]) < _rank(candidates[1]) if len(candidates) > 1 else True
    if sure and (averages or known):
        return candidates[0]
    held = ", ".join(
        f"{root or 'the top'} ({sum(n.startswith(root) for n in names)} arrays)" for root in roots
    )
    raise UserError(f"The file holds several models: below {held}. Save the one you mean alone.")


def _parent(wrapper: str) -> str:
    return re.sub(r"[^./]+[./]$", "", wrapper)


def _heads_beside(outer: Mapping[str, Any], wrapper: str, inner: Mapping[str, Any]) -> list[str]:
    """Names of a head stored next to its trunk, such as `head.weight` next to `backbone.`."""
    parts = _parts(wrapper)
    if not parts or parts[-1] not in _TRUNKS or any(map(_HEAD.fullmatch, inner)):
        return []
    parent = _parent(wrapper)
    return [n for n in outer if n.startswith(parent) and _HEAD.fullmatch(n[len(parent) :])]


def _notes(roots: Mapping[str, str], wrapper: str) -> tuple[str, ...]:
    others = ", ".join(repr((root or "the top").rstrip("./")) for root in roots if root != wrapper)
    what = wrapper.rstrip("./")
    if _is_average(wrapper):
        return (f"the average {what!r} was taken" + (f", not {others}" if others else ""),)
    if others:
        return (f"{what!r} was taken, not {others}",)
    return ()
