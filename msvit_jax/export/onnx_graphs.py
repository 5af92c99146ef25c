"""Exports the forward function of a model as ONNX graphs, for programs without JAX.

The functions are those of `export.compiled`, one graph each, with the parameters inside and a batch
of any size. jax2onnx converts them from one flat list of elementary operations (see `plain_jaxpr`),
because it does not support everything that the models call.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import pathlib
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msvit_jax.errors import UserError
from msvit_jax.export import compiled, plain_jaxpr
from msvit_jax.export.bundle import ExportBundle
from msvit_jax.export.compiled import Function, Options
from msvit_jax.models.interface import ImageModel
from msvit_jax.weights import formats

SUFFIX = ".onnx"
OPSET = 23
PACKAGES = ("jax2onnx", "onnx", "onnx_ir")
INSTALL = "pip install 'msvit-jax[onnx]'"
# Largest allowed difference, relative to the largest value of an output. Differences by rounding
# are two orders of magnitude smaller.
TOLERANCE = 1e-3

_CHECKED = 2  # images that a graph is tested with
_THRESHOLDS = (
    0.5,
    -1.0,
)  # of the gate; with the second all regions are coarse and fit any capacity


@dataclasses.dataclass(frozen=True)
class Graph:
    """A converted function.

    Attributes:
      model: The graph, an `onnx.ModelProto`.
      inputs: Types and shapes of the inputs as text, by name.
      outputs: Types and shapes of the outputs as text, by name.
    """

    model: Any
    inputs: dict[str, str]
    outputs: dict[str, str]


def check_packages() -> None:
    """Raises UserError if the packages that write ONNX are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format=onnx needs {', '.join(missing)}, which is not installed: {INSTALL}"
        )


def write(bundle: ExportBundle, directory: pathlib.Path, options: Options) -> None:
    """Writes graphs and about.json into a new directory.

    If onnxruntime is installed, every graph is run and compared with the model.

    Args:
      bundle: Model and parameters.
      directory: Path of the directory to create.
      options: Options, the same as for compiled functions.

    Raises:
      UserError: Packages are missing, options do not fit the model, the model has an operation that
        ONNX lacks, or a graph's answers differ from the model's.
    """
    check_packages()
    bundle = _single_layers(bundle)
    model = _in_float32(compiled.portable(bundle.model))
    settings = compiled.resolve_settings(model, bundle, options)
    directory.mkdir()
    described = []
    differences: dict[str, float] = {}
    carry: Any = None  # real outputs of the previous stage, to test the next one with
    for function in compiled.functions(model, bundle, options):
        params = {name: bundle.params[name] for name in function.params}
        graph = convert(function, params)
        path = directory / f"{function.name}{SUFFIX}"
        path.write_bytes(graph.model.SerializeToString())
        if importlib.util.find_spec("onnxruntime"):
            differences[function.name], carry = _tried(function, params, path, carry)
        described.append(
            {
                "name": function.name,
                "file": path.name,
                "inputs": graph.inputs,
                "outputs": graph.outputs,
            }
        )
    about = {
        "format": "msvit_jax ONNX graphs, 1",
        **bundle.about,
        "image_size": model.image_size,
        "pixels": options.pixels,
        **settings,
        "functions": described,
        "opset": OPSET,
        "packages": {name: version(name.replace("_", "-")) for name in PACKAGES},
        "checked": _report(differences),
        "made_by": compiled.command(bundle, "onnx", options),
    }
    (directory / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def convert(function: Function, params: dict[str, np.ndarray]) -> Graph:
    """Converts a function, with its parameters as constants.

    Raises:
      UserError: It has an operation that ONNX or the converter lacks.
    """
    # Inputs and outputs of a graph share one namespace, so inputs of a stage are renamed.
    inputs = {name.replace("handed.", "before."): kind for name, kind in _named(function.inputs)}
    flat, outputs = plain_jaxpr.flatten(function.call, params, list(function.inputs.values()))
    _check_operations(function, flat)

    def run(*leaves: Any) -> list[Any]:
        return plain_jaxpr.evaluate(flat.jaxpr, flat.consts, leaves, plain_jaxpr.bind)

    described = compiled.shapes(dict(_named(outputs)))
    try:
        with _quietly():
            from jax2onnx import to_onnx

            model = to_onnx(
                run,
                list(inputs.values()),
                model_name=function.name,
                opset=OPSET,
                input_names=list(inputs),
                output_names=list(described),
            )
    except (NotImplementedError, jax.errors.JAXTypeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"jax2onnx {version('jax2onnx')} cannot convert {function.name!r}: {reason} "
            "Use --format=compiled."
        ) from error
    return Graph(model, {name: compiled.shapes(kind) for name, kind in inputs.items()}, described)


def compare(path: pathlib.Path, example: list[Any], answers: dict[str, Any]) -> float:
    """Runs a graph with onnxruntime and compares its answers with the model's.

    Args:
      path: Path of the .onnx file.
      example: Inputs of the function.
      answers: The model's outputs for these inputs, by name.

    Returns:
      The largest difference of the logits, relative to the largest logit.

    Raises:
      UserError: An answer differs by more than `TOLERANCE`.
    """
    import onnxruntime

    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, quiet, providers=["CPUExecutionProvider"])
    fed = dict(zip([x.name for x in session.get_inputs()], jax.tree.leaves(example), strict=True))
    got = session.run(None, {name: np.asarray(value) for name, value in fed.items()})
    difference = 0.0
    for (name, expected), given in zip(_named(answers), got, strict=True):
        expected = np.asarray(expected, np.float64)
        largest = max(float(np.nanmax(np.abs(expected), initial=0.0)), 1e-30)
        away = np.abs(np.where(np.isnan(expected), 0, given - expected)).max(initial=0.0)
        away = np.inf if (np.isnan(given) != np.isnan(expected)).any() else away
        if not away <= TOLERANCE * largest:
            raise UserError(
                f"{path.name}: onnxruntime {onnxruntime.__version__} gives {name} that "
                f"differ from the model's by {away / largest:.1e} of the largest value; nothing "
                "was written. Use --format=compiled."
            )
        if name == "logits":
            difference = float(away / largest)
    return difference


def _tried(
    function: Function, params: dict[str, np.ndarray], path: pathlib.Path, carry: Any
) -> tuple[float, Any]:
    """Compares a graph with its function; returns the difference and the next stage's inputs."""
    difference = 0.0
    for threshold in _THRESHOLDS if "threshold" in function.inputs else _THRESHOLDS[:1]:
        example = _example(function, carry, threshold)
        answers = jax.device_get(jax.jit(function.call)(params, *example))
        difference = max(difference, compare(path, example, answers))
    return difference, answers.get("handed")


def _report(differences: dict[str, float]) -> dict[str, Any] | None:
    """The comparison's entry in about.json; None if onnxruntime is not installed."""
    if not differences:
        return None
    rounded = {name: float(f"{value:.1e}") for name, value in differences.items()}
    return {"onnxruntime": version("onnxruntime"), "largest_difference": rounded}


def _single_layers(bundle: ExportBundle) -> ExportBundle:
    """The source with one block per layer instead of one block scanned over all layers."""
    if not bundle.options.get("scan_layers"):
        return bundle
    options = {**bundle.options, "scan_layers": False}
    return dataclasses.replace(bundle, options=options, params=formats.unstack(bundle.params))


def _in_float32(model: ImageModel) -> ImageModel:
    """The model in float32 throughout, because CPU runtimes lack bfloat16."""
    return model.with_backbone(dtype=jnp.float32)


def _check_operations(function: Function, flat: Any) -> None:
    if any(equation.primitive.name == "bitcast_convert_type" for equation in flat.jaxpr.eqns):
        raise UserError(
            f"{function.name!r} cannot be an ONNX graph: reducer='random' decides by the bits of "
            "the tokens' numbers, and ONNX runtimes have no such operation. Use --format=compiled."
        )


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dictionaries with names such as 'handed.scores'.

    Inner dictionaries are in sorted order, as in jax.tree; the outer one keeps its own order.
    """
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", value[inner]) for inner in sorted(value))
        else:
            yield name, value


def _example(function: Function, carry: Any, threshold: float) -> list[Any]:
    """Inputs to test a function with; images are random squares with noise."""
    rng = np.random.default_rng(0)
    example: list[Any] = []
    for name, kind in function.inputs.items():
        if name == "images":
            shape = (_CHECKED, *kind.shape[1:])
            coarse = rng.integers(0, 256, (_CHECKED, 4, 4, 3))
            rows, columns = (np.arange(size) * 4 // size for size in shape[1:3])
            pixels = coarse[:, rows][:, :, columns] + rng.integers(-40, 40, shape)
            example.append(np.clip(pixels, 0, 255).astype(kind.dtype))
        elif name == "handed":
            example.append(carry)
        else:
            example.append(np.float32(threshold))
    return example


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppresses the converter's log messages and warnings about its own imports and types."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
