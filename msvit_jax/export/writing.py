"""Writes an export in a named format; the output appears complete or not at all."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator

from msvit_jax import paths
from msvit_jax.errors import UserError, nearest
from msvit_jax.export import compiled, formats, onnx_graphs
from msvit_jax.export.bundle import ExportBundle
from msvit_jax.export.compiled import Options


@dataclasses.dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
      suffix: Suffix of its file; empty if the format is a directory.
      write: Function that writes a source to a path; returns what was left out, or an empty string.
    """

    suffix: str
    write: Callable[[ExportBundle, pathlib.Path], str]


FORMATS = {
    "safetensors": Format(".safetensors", formats.write_ours),
    "timm": Format(".safetensors", formats.write_timm),
    "huggingface": Format("", formats.write_huggingface),
    "big_vision": Format(".npz", formats.write_big_vision),
    "dvt": Format(".safetensors", formats.write_dvt),
    "segmenter": Format(".safetensors", formats.write_segmenter),
    "orbax": Format("", formats.write_orbax),
}
FUNCTIONS = {"compiled": compiled.write, "onnx": onnx_graphs.write}  # directories; take options
_PLAIN = Options()


def check(format_name: str, out: str | pathlib.Path, options: Options = _PLAIN) -> None:
    """Checks everything that can be checked before a model is loaded.

    Raises:
      UserError: The format is unknown or lacks a package, the output exists or has a wrong suffix,
        or options are given for a format of weights.
    """
    names = [*FORMATS, *FUNCTIONS]
    if format_name not in names:
        raise UserError(
            f"There is no format {format_name!r}.{nearest(format_name, names)} "
            f"The formats are {', '.join(names)}."
        )
    path = paths.parse(out)
    if path.exists() or os.path.islink(path):
        raise UserError(f"{str(out)!r} exists and is left as it is; give another --out.")
    paths.check_writable(path.parent)
    if format_name == "onnx":
        onnx_graphs.check_packages()
    if format_name in FUNCTIONS:
        return
    suffix = FORMATS[format_name].suffix
    if suffix and path.suffix != suffix:
        raise UserError(f"--format={format_name} makes a {suffix} file; {str(out)!r} is none.")
    given = [
        field.name
        for field in dataclasses.fields(Options)
        if getattr(options, field.name) != field.default
    ]
    if given:
        raise UserError(
            f"{', '.join(given)}: only functions have such options, and --format={format_name} "
            f"writes weights; use --format={' or '.join(FUNCTIONS)}, or leave them out."
        )


def write(
    bundle: ExportBundle,
    format_name: str,
    out: str | pathlib.Path,
    options: Options = _PLAIN,
) -> str:
    """Writes a model in a format.

    Args:
      bundle: Model to write.
      format_name: One of `FORMATS` or `FUNCTIONS`.
      out: Path of a file or directory, which must not exist; created complete or not at all.
      options: Options for the formats in `FUNCTIONS`.

    Returns:
      What was left out because the format cannot hold it; empty if nothing was.

    Raises:
      UserError: The format is unknown, the output exists or has a wrong suffix, options do not fit,
        or the format cannot express the model.
    """
    check(format_name, out, options)
    with _whole(paths.parse(out)) as path:
        if format_name in FUNCTIONS:
            FUNCTIONS[format_name](bundle, path, options)
            return ""
        return FORMATS[format_name].write(bundle, path)


@contextlib.contextmanager
def _whole(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path whose content appears at `out` at the end, unless there is an error."""
    paths.check_writable(out.parent)
    with paths.whole(out) as part:
        yield part
        if out.exists():
            raise UserError(
                f"{str(out)!r} was made by another process meanwhile and is left as it is; give "
                "another --out."
            )
