"""Exports a run's weights, or its compiled functions, for other programs.

    python -m msvit_jax.export --workdir=RUN --format=safetensors --out=model.safetensors python -m
    msvit_jax.export --workdir=RUN --format=compiled --layout=budget --token_capacity=127 --out=D

Formats: safetensors (our names), timm and big_vision (the dense trunk), huggingface (a directory
for from_pretrained), dvt and segmenter (the official names), orbax (only parameters), compiled
(functions by jax.export, with a run.py that needs only JAX) and onnx (graphs; needs the extra
[onnx]). Existing files are never overwritten.
"""

import json
from collections.abc import Sequence

from absl import flags

from msvit_jax import checkpoint, errors
from msvit_jax.export import ExportBundle, Options, write
from msvit_jax.export.writing import check


def main(argv: Sequence[str]) -> None:
    """Loads, writes, and prints one line of JSON."""
    errors.refuse_arguments(argv)
    checkpoint.quiet_orbax()
    given = flags.FLAGS
    options = Options(
        layout=given.layout,
        token_capacity=given.token_capacity,
        gmacs_budget=given.gmacs_budget,
        threshold=given.threshold,
        thresholds=given.thresholds and errors.numbers("thresholds", given.thresholds),
        pixels=given.pixels,
    )
    check(given.format, given.out, options)  # before a checkpoint is read
    source = ExportBundle.load(given.workdir, given.which)
    left_out = write(source, given.format, given.out, options)
    if left_out:
        print(f"left out, --format={given.format} has no place for it: {left_out}")
    summary = {"model": source.name, "step": source.step, "format": given.format, "out": given.out}
    print(json.dumps(summary))


if __name__ == "__main__":
    # Defined here because flags are global and other commands use some of the same names.
    flags.DEFINE_string("workdir", None, "Workdir of a trained run.", required=True)
    flags.DEFINE_string("which", "best", "Checkpoint to export: 'best', 'latest' or a step.")
    flags.DEFINE_string(
        "format", None, "Format to write, one of those listed above.", required=True
    )
    flags.DEFINE_string("out", None, "Path of the new file or directory.", required=True)
    flags.DEFINE_string(
        "layout", None, "Layout of a model with a gate, 'slots' or 'budget' (compiled, onnx)."
    )
    flags.DEFINE_integer(
        "token_capacity", None, "Patch tokens per image with --layout=budget (compiled, onnx)."
    )
    flags.DEFINE_float(
        "gmacs_budget",
        None,
        "Mean GMACs per image of a cascade, by thresholds that eval.py fitted (compiled, onnx).",
    )
    flags.DEFINE_float("threshold", None, "Threshold of the gate (compiled, onnx).")
    flags.DEFINE_list("thresholds", None, "Thresholds of all exits but the last (compiled, onnx).")
    flags.DEFINE_string(
        "pixels", "uint8", "Type of the pixels, 'uint8' or 'float32' (compiled, onnx)."
    )
    errors.run(main)
