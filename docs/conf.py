"""Sphinx: the pages of this folder and a reference made from docstrings; `make docs` builds it."""

import os
import re
from typing import Any

import msvit_jax

project = "msvit_jax"
release = msvit_jax.__version__
extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "api/modules.rst"]
html_theme = "furo"
html_title = f"msvit_jax {release}"
highlight_language = "none"  # indented blocks are commands; fences name their language
smartquotes = False  # "--flag" stays what it is
myst_heading_anchors = 3  # headings can be linked to, as page.md#heading

# What has a docstring. In the environment, as packages heed no other way; read at the first import.
os.environ["SPHINX_APIDOC_OPTIONS"] = "members"
# Modules are imported, so the package's own environment is needed; `__main__` is private.
apidoc_modules = [
    {
        "path": "../msvit_jax",
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "max_depth": 1,
    }
]
autodoc_default_options = {"member-order": "bysource", "exclude-members": "dtype"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
default_role = "literal"  # `name` in docstrings, as in Markdown
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a class says what its attributes are, once
napoleon_use_rtype = False

_FLAX_FIELDS = re.compile(r", parent: .*(?=\))")


def setup(app: Any) -> None:
    """Connects what adapts docstrings and signatures."""
    app.connect("autodoc-process-docstring", _keep_commands)
    app.connect("autodoc-process-signature", _leave_out_flax_fields)


def _keep_commands(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Makes literal blocks of what a module's docstring indents, which is a command line."""
    if what != "module":
        return
    kept: list[str] = []
    for line in lines:
        starts = line.startswith("    ") and len(kept) > 1 and not kept[-1]
        if starts and not kept[-2].startswith("    "):
            kept += ["::", ""]
        kept.append(line)
    lines[:] = kept


def _leave_out_flax_fields(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str | None, Any]:
    """Removes the two fields that Flax adds to every module."""
    return signature and _FLAX_FIELDS.sub("", signature), returns
