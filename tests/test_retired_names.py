"""Names that were given up occur nowhere: in no definition, config or page.

Old config keys are the exception, and live in one table: msvit_jax/config_aliases.py.
"""

import ast
import pathlib
import re
import sys

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
    "Plan",  # RunLength
    "Program",  # TrainProgram, CompiledFn
    "Programs",  # ExecutableCache
    "Side",  # Case
    "Source",  # ImageSource, ExportBundle, LoadedWeights
    "Trim",  # CapacitySchedule
    "budget",  # token_capacity, gmacs_budget
    "budgets",
    "by_luck",
    "cell",  # effective_patch_size
    "decide",  # decide_batches, run_gate, threshold_decisions
    "embed_norms",  # embed_norm_elements
    "gate_grid",  # region_grid
    "grids",  # grid_sizes
    "hosts",  # merge_targets
    "hosts_to_map",  # targets_to_map
    "in_slots",  # with_dense_layout
    "luck",  # random_score
    "luck_of",
    "most_places",  # max_capacity
    "pieces",  # microbatches
    "places",  # capacity, positions, indices, subpatches
    "shelves",  # length_buckets
    "shelves_apart",
    "shelves_together",
    "take_turns",  # time_interleaved
    "takes_threshold",  # has_threshold
    "unfit",  # overflow
    "who_asks",  # importance_query
}


# Names of fields and options, written as code in pages: with a dot before or an equals sign behind.
ATTRIBUTES = (
    r"\b[Oo]utput\.(exits|fits|merged|hosts)\b|`(fits|unfit|merged|hosts)`|\bbudget=|\bgrids?="
)
BRITISH = re.compile(
    r"(?i)centre|colour|grey|behaviour|favour|neighbour|judgement|labelled|modelled|programme\b"
    r"|(normal|optim|token|initial|random|real|summar|recogn|general|serial|organ)is(e|ed|es|er|ation)\b"
)
# They read configs of before.
SPELLED_AS_BEFORE = {"config_aliases.py", "test_config.py", "test_retired_names.py"}


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
    words = sorted(name for name in IDENTIFIERS if "_" in name or name in ("Backboned", "shelves"))
    keys = [re.escape(key) for key in config_aliases.RENAMED]
    pattern = rf"(?<![\w.])(config\.)?({'|'.join(keys)})\b|\b({'|'.join(words)})\b"
    assert not re.search(pattern, path.read_text())
    assert not re.search(ATTRIBUTES, path.read_text())


def test_spelling_is_american():
    files = [*PAGES, *CONFIGS, *ROOT.glob("notebooks/*.ipynb"), ROOT / "CHANGELOG.md"]
    for folder in ("msvit_jax", "studies", "tools", "tests"):
        files += ROOT.glob(f"{folder}/**/*.py")
    found = {
        (path.name, word.group())
        for path in files
        if path.name not in SPELLED_AS_BEFORE
        for word in BRITISH.finditer(path.read_text())
    }
    assert not found


def test_no_module_shadows_the_standard_library():
    names = {path.stem for path in ROOT.glob("msvit_jax/*.py")}
    assert not names & sys.stdlib_module_names
