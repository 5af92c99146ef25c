"""Every case that docs/reliability.md lists is a test, and every such test is listed."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def _listed():
    """(number, file::test) of the page's table, in its order."""
    _, section = (ROOT / "docs" / "reliability.md").read_text().split("### Cases from the field\n")
    return [
        (int(number), test)
        for number, tests in re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", section, re.M)
        for test in re.findall(r"`(\S+)`", tests)
    ]


def _marked():
    """The same of the markers in the tests, whether of a test or of one of its parameters."""
    found = []
    for file in (ROOT / "tests").rglob("test_*.py"):
        for test in ast.walk(ast.parse(file.read_text())):
            if not isinstance(test, ast.FunctionDef):
                continue
            for call in (node for mark in test.decorator_list for node in ast.walk(mark)):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.field":
                    name = f"{file.relative_to(ROOT).as_posix()}::{test.name}"
                    found += [(row.value, name) for row in call.args]
    return found


def test_the_cases_of_the_page_are_those_of_the_tests():
    listed, marked = _listed(), _marked()
    assert {number for number, _ in listed} == {row for row, _ in marked}
    assert sorted(listed) == sorted(marked)
    assert len(listed) > 40
