"""Files for services and for readers agree with what they describe."""

import pathlib
import re

import pytest
import yaml

import msvit_jax

ROOT = pathlib.Path(__file__).parents[1]


def load(name):
    return yaml.safe_load((ROOT / name).read_text())


def pinned(package):
    text = (ROOT / "requirements-dev.txt").read_text()
    return re.search(rf"^{package}==(\S+)", text, re.MULTILINE)[1]


def test_commits_are_checked_by_the_same_ruff():
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    assert repository["rev"] == f"v{pinned('ruff')}"


def test_the_newest_entry_of_the_changelog_is_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == msvit_jax.__version__


def test_the_version_is_written_once():
    for name in ("pyproject.toml", "CITATION.cff", "docs/conf.py"):
        assert not re.findall(r"^version\s*[=:]", (ROOT / name).read_text(), re.MULTILINE)


def test_the_papers_are_cited():
    citation = load("CITATION.cff")
    assert citation["title"] == "msvit_jax"
    cited = {reference["url"].rpartition("/")[2] for reference in citation["references"]}
    assert cited == {"2307.02321", "2306.04897", "2105.15075"}
    pages = "".join((ROOT / "docs" / f"{p}.md").read_text() for p in ("msvit", "mergence", "dvt"))
    assert all(f"arxiv.org/abs/{paper}" in pages for paper in cited)


def test_the_workflow_runs_what_ci_runs():
    jobs = load(".github/workflows/ci.yml")["jobs"]
    targets = {"lint", "test", *jobs["pages"]["strategy"]["matrix"]["target"]}
    local = re.findall(r'make ((?:[a-z]+ )+)"\$\{on_', (ROOT / ".ci" / "run").read_text())
    assert targets == {target for line in local for target in line.split()}
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert all(step.startswith("make ") for step in steps)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_that_pages_name_exist(page):
    named = re.findall(
        r"(?<![\w/])((?:docs|msvit_jax|tests)/[\w/]+\.\w+|\.ci/run)", (ROOT / page).read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_documentation_is_built_from_files_that_are_there():
    given = load(".readthedocs.yaml")
    names = [given["sphinx"]["configuration"], given["python"]["install"][0]["requirements"]]
    assert all((ROOT / name).is_file() for name in names)
