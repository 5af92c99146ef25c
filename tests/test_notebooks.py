"""Notebooks and pages as files: they parse, their links lead somewhere, their outputs are light.

Whether notebooks run is for `make notebooks` to say, whether docs/ is whole for `make docs`.
"""

import pathlib
import re
import tomllib

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/"
LARGEST = 300_000  # bytes
DEFINES = "def digits("


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def repository():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_colab_from_the_projects_own_repository(path):
    title, setup = read(path).cells[:2]
    where = repository().removeprefix("https://github.com/")
    assert f"({COLAB}{where}/blob/main/notebooks/{path.name})" in title.source
    assert f"%pip install --quiet 'msvit-jax[all] @ git+{repository()}'\n" in setup.source
    assert f"{COLAB}{where}/blob/main/notebooks/{path.name}" in (ROOT / "README.md").read_text()


def test_notebooks_define_the_same_config():
    cells = [cell.source for path in NOTEBOOKS for cell in read(path).cells]
    assert len({source for source in cells if DEFINES in source}) == 1
    assert sum(DEFINES in source for source in cells) == len(NOTEBOOKS) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_light_and_say_nothing_of_the_machine(path):
    assert path.stat().st_size < LARGEST
    outputs = [out for cell in read(path).cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    texts = [
        out.get("text", "") + str(out.get("data", {}).get("text/plain", "")) for out in outputs
    ]
    assert not re.findall(r"(?:/home|/root|/tmp|/work|/usr)/\S*", "\n".join(texts))


@pytest.mark.parametrize("page", ["README.md", *(f"notebooks/{path.name}" for path in NOTEBOOKS)])
def test_relative_links_lead_to_files(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target for target in targets if "://" not in target and not target.startswith("#")]
    missing = [t for t in local if not (ROOT / page).parent.joinpath(t.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_named_files_exist(path):
    """What a notebook's text calls by its path, `docs/weights.md` or `export.ipynb`."""
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    named = set(re.findall(r"`((?:docs|configs)/[\w/]+\.\w+|\w+\.ipynb)`", text))
    found = [ROOT / name if "/" in name else path.parent / name for name in named]
    assert not [str(file) for file in found if not file.exists()]
