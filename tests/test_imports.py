"""The package's import graph: nothing imports upwards, and no module is imported by a string."""

import ast
import functools
import pathlib

import pytest

import msvit_jax

ROOT = pathlib.Path(msvit_jax.__file__).parents[1]
# Most imports on the way from a package (a folder of msvit_jax, or a module of its top level) to
# one that imports nothing.
DEEPEST = 8


def modules():
    """Paths of all modules by dotted name."""
    found = {}
    for path in (ROOT / "msvit_jax").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def statements(node):
    """Import statements at any level, but for those that only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from statements(child)


def imported(path):
    """Dotted names of the package's modules that a module imports."""
    for statement in statements(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names if alias.name in MODULES)
        elif statement.module in MODULES:
            inner = [f"{statement.module}.{alias.name}" for alias in statement.names]
            yield from (name if name in MODULES else statement.module for name in inner)


def package(module):
    """The folder of msvit_jax that a module is in, or the module itself at the top level."""
    return ".".join(module.split(".")[:2])


def package_graph():
    """Packages that each package imports; msvit_jax itself hands out names of those below it."""
    graph = {package(module): set() for module in MODULES if module != "msvit_jax"}
    for module, path in MODULES.items():
        if module != "msvit_jax":
            graph[package(module)] |= {package(name) for name in imported(path)}
    return {name: others - {name, "msvit_jax"} for name, others in graph.items()}


def chains(graph):
    """The longest chain of imports from each package; fails on a cycle, which it shows."""

    @functools.cache
    def chain(name):
        return (name, *max((chain(other) for other in graph[name]), key=len, default=()))

    open_ = []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        open_.append(name)
        for other in sorted(graph[name]):
            visit(other)
        open_.pop()

    for name in graph:
        visit(name)
    return {name: chain(name) for name in graph}


def test_packages_import_downwards_only_and_are_not_deep():
    longest = max(chains(package_graph()).values(), key=len)
    assert len(longest) - 1 <= DEEPEST, " -> ".join(longest)


def test_a_cycle_is_shown():
    with pytest.raises(AssertionError, match="b -> c -> b"):
        chains({"a": {"b"}, "b": {"c"}, "c": {"b"}})


def test_no_module_is_imported_by_a_string():
    by_string = {
        str(path.relative_to(ROOT))
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
        and getattr(node, "attr", getattr(node, "id", "")) in ("import_module", "__import__")
    }
    # A script that is copied beside exported functions, where there is no package.
    assert by_string <= {"msvit_jax/export/run.py"}
