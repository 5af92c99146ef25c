"""Exports a model for other programs: its weights in several formats, or its compiled functions.

On the command line `python -m msvit_jax.export`, in Python `write(ExportBundle.load("runs/vit"),
...)`.
"""

from msvit_jax import extras

with extras.needed("export"):
    from msvit_jax.export.bundle import ExportBundle
    from msvit_jax.export.compiled import Options
    from msvit_jax.export.writing import FORMATS, write

__all__ = ["FORMATS", "ExportBundle", "Options", "write"]
