"""Every case and fault that docs/reliability.md lists is a test, and every such test is listed."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def _listed(title):
    """(number, file::test) of the table in one of the page's sections, in its order."""
    _, section = (ROOT / "docs" / "reliability.md").read_text().split(f"### {title}\n")
    section = section.split("\n### ")[0]
    return [
        (int(number), test)
        for number, tests in re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", section, re.M)
        for test in re.findall(r"`(\S+)`", tests)
    ]


def _marked(mark):
    """The same of the markers in the tests, whether of a test or of one of its parameters."""
    found = []
    for file in (ROOT / "tests").rglob("test_*.py"):
        for test in ast.walk(ast.parse(file.read_text())):
            if not isinstance(test, ast.FunctionDef):
                continue
            for call in (node for mark in test.decorator_list for node in ast.walk(mark)):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == f"pytest.mark.{mark}":
                    name = f"{file.relative_to(ROOT).as_posix()}::{test.name}"
                    found += [(row.value, name) for row in call.args]
    return found


@pytest.mark.parametrize(
    ("title", "mark", "least"), [("Cases from the field", "field", 40), ("Faults", "fault", 17)]
)
def test_the_cases_of_the_page_are_those_of_the_tests(title, mark, least):
    listed, marked = _listed(title), _marked(mark)
    assert {number for number, _ in listed} == {row for row, _ in marked}
    assert sorted(listed) == sorted(marked)
    assert len({number for number, _ in listed}) >= least
