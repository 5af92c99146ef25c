"""Names that were given up occur nowhere: in no definition, config or page.

Old config keys are the exception, and live in one table: msvit_jax/config_aliases.py.
"""

import ast
import pathlib
import re

import pytest

from msvit_jax import config_aliases

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
CONFIGS = sorted(ROOT.glob("configs/**/*.py"))
# Each was one word for several ideas, or a private word for one that has a name.
IDENTIFIERS = {
    "Backboned",  # BackboneMixin
    "Carried",  # ReductionState
    "Fall",  # KeepRateSchedule
    "Handed",  # StageCarry
    "Marks",  # BiasFactors
    "Side",  # Case
    "Trim",  # CapacitySchedule
    "by_luck",
    "embed_norms",  # embed_norm_elements
    "in_slots",  # with_dense_layout
    "luck",  # random_score
    "luck_of",
    "shelves",  # length_buckets
    "shelves_apart",
    "shelves_together",
    "take_turns",  # time_interleaved
    "takes_threshold",  # has_threshold
    "who_asks",  # importance_query
}


def defined(path):
    """Names of a module's functions, classes, arguments and fields."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_no_definition_has_one():
    modules = [*ROOT.glob("msvit_jax/**/*.py"), *ROOT.glob("studies/*.py")]
    found = {(m.name, n) for m in modules for n in defined(m) if n in IDENTIFIERS}
    assert not found


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=lambda path: path.name)
def test_no_page_or_config_has_one(path):
    words = sorted(IDENTIFIERS - {"Side", "Fall", "Trim", "Marks", "Carried", "Handed", "luck"})
    keys = [re.escape(key) for key in config_aliases.RENAMED]
    pattern = rf"(?<![\w.])(config\.)?({'|'.join(keys)})\b|\b({'|'.join(words)})\b"
    assert not re.search(pattern, path.read_text())
