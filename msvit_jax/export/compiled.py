"""Exports the forward function of a model for programs that have JAX but not this library.

Functions are exported by `jax.export` for CPU, CUDA and TPU, with a batch of any size. They take
the parameters as their first argument, then pixels. The weights are therefore stored once, in a
file and on the devices, for all functions and batch sizes; built-in parameters would be constants
in every compiled program.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import shlex
import shutil
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import Array, export

from msvit_jax.data import image_files
from msvit_jax.errors import UserError, check_choice
from msvit_jax.exits import exit_thresholds
from msvit_jax.exits.budget_curve import fitted_thresholds
from msvit_jax.export import run as runner
from msvit_jax.export.bundle import ExportBundle
from msvit_jax.models.dvt import StageCarry
from msvit_jax.models.interface import SEGMENTATION, ImageModel
from msvit_jax.pixels import normalize
from msvit_jax.segmentation import upsampling
from msvit_jax.weights import ours

PLATFORMS = ("cpu", "cuda", "tpu")
LAYOUTS = ("slots", "budget")
PIXELS = ("uint8", "float32")
SUFFIX = ".jaxexport"
WEIGHTS = "model.safetensors"

# Build dates of JAX versions, from their wheels. Add a row for each version that requirements.txt
# pins; a version between two rows is assumed to be as old as the earlier one.
_JAX_BUILT = {
    (0, 10, 0): datetime.date(2026, 4, 16),
    (0, 10, 2): datetime.date(2026, 6, 17),
    (0, 12, 0): datetime.date(2026, 10, 16),
}
_MONTHS_READABLE = 6  # jax.export's backward compatibility
_GUARANTEES = "https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees"
_BATCH = "b"  # name of the batch dimension in the functions' shapes


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of compiled functions.

    Attributes:
      layout: Layout of a model with a gate, one of `LAYOUTS`; None: slots.
      token_capacity: Capacity in patch tokens per image, for layout="budget".
      gmacs_budget: Mean GMACs per image of a cascade; selects among the thresholds that eval.py
        fitted.
      threshold: Default threshold of the gate; None: the model's own.
      thresholds: Default thresholds of a cascade's exits; None: all images leave at the last.
      pixels: Type of the pixels, one of `PIXELS`; their values are 0 to 255 in either type.
    """

    layout: str | None = None
    token_capacity: int | None = None
    gmacs_budget: float | None = None
    threshold: float | None = None
    thresholds: Sequence[float] | None = None
    pixels: str = "uint8"


@dataclasses.dataclass(frozen=True)
class Function:
    """A function to export.

    Attributes:
      name: Name of its file, without the suffix.
      call: Function of the parameters by name and the inputs; returns outputs by name.
      params: Shapes and types of the parameters that it needs, by name.
      inputs: Shapes and types of its inputs, by name and in order.
    """

    name: str
    call: Callable[..., dict[str, Any]]
    params: dict[str, Any]
    inputs: dict[str, Any]

    def exported(self) -> export.Exported:
        """Exports the function for all platforms."""
        make = export.export(jax.jit(self.call), platforms=PLATFORMS)
        return make(self.params, *self.inputs.values())


def write(bundle: ExportBundle, directory: pathlib.Path, options: Options) -> None:
    """Writes functions, weights, about.json and the code that runs them into a new directory.

    Args:
      bundle: Model and parameters.
      directory: Path of the directory to create.
      options: Options of the compiled functions.

    Raises:
      UserError: Options do not fit the model, or flatbuffers is not installed.
    """
    _check_flatbuffers()
    model = portable(bundle.model)
    settings = resolve_settings(model, bundle, options)
    directory.mkdir()
    described = []
    for function in functions(model, bundle, options):
        exported = function.exported()
        (directory / f"{function.name}{SUFFIX}").write_bytes(exported.serialize())
        described.append(_described(function, exported))
    about = {
        "format": "msvit_jax compiled functions, 1",
        **bundle.about,
        "image_size": model.image_size,
        "pixels": options.pixels,
        **settings,
        "weights": WEIGHTS,
        "functions": described,
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "readable": readable(jax.__version_info__),
        "made_by": command(bundle, "compiled", options),
    }
    ours.save(directory / WEIGHTS, bundle.params, bundle.about)
    kept = [WEIGHTS, *(entry["file"] for entry in described)]
    sealed = runner.sealed(json.loads(json.dumps(about)), directory, kept)
    (directory / runner.ABOUT).write_text(json.dumps(sealed, indent=2) + "\n")
    modules = [runner, image_files]
    if model.task == SEGMENTATION:
        modules.append(upsampling)
    for module in modules:
        shutil.copy(str(module.__file__), directory)
    _write_flatbuffers(directory / runner.FLATBUFFERS)


def readable(jax_version: tuple[int, ...]) -> dict[str, str]:
    """Describes how long JAX promises to read functions that one of its versions exported.

    Args:
      jax_version: Version of the exporting JAX, such as (0, 12, 0).
    """
    older = [known for known in _JAX_BUILT if known <= jax_version[:3]]
    built = _JAX_BUILT[max(older, default=min(_JAX_BUILT))]
    months = built.month - 1 + _MONTHS_READABLE
    until = built.replace(year=built.year + months // 12, month=months % 12 + 1, day=1)
    until += datetime.timedelta(days=min(built.day, 28) - 1)
    return {
        "until": until.isoformat(),
        "promise": (
            f"Versions of JAX that are built by that day, {_MONTHS_READABLE} months after the one "
            "that exported, read these functions; so do those of up to 3 weeks before it. Later "
            "ones may refuse: export again by made_by, from the checkpoint."
        ),
        "source": _GUARANTEES,
    }


def command(bundle: ExportBundle, format_name: str, options: Options) -> str:
    """The command that repeats an export; unknown paths are placeholders in capitals."""
    words = ["python", "-m", "msvit_jax.export", f"--workdir={bundle.workdir or 'RUN'}"]
    words += [] if bundle.step is None else [f"--which={bundle.step}"]
    words += [f"--format={format_name}", "--out=OUT"]
    for field in dataclasses.fields(Options):
        value = getattr(options, field.name)
        if value != field.default:
            text = ",".join(map(str, value)) if field.name == "thresholds" else str(value)
            words.append(f"--{field.name}={text}")
    return shlex.join(words)


def portable(model: ImageModel) -> ImageModel:
    """The model in the slots layout, with an attention implementation that every platform has."""
    return model.with_backbone(attention_impl="xla").with_dense_layout()


def resolve_settings(model: ImageModel, bundle: ExportBundle, options: Options) -> dict[str, Any]:
    """Checks the options and returns the settings that run.py needs besides the functions."""
    return {"task": model.task, **_kind_settings(model, bundle, options)}


def _kind_settings(model: ImageModel, bundle: ExportBundle, options: Options) -> dict[str, Any]:
    check_choice("pixels", options.pixels, PIXELS)
    gated, cascade = model.has_gate, model.is_cascade
    if not gated and (options.layout, options.threshold) != (None, None):
        given = "threshold" if options.layout is None else "layout"
        raise UserError(f"{given} is for models with a gate; {bundle.name!r} has none.")
    if not cascade and options.thresholds is not None:
        raise UserError(f"thresholds are for cascades; {bundle.name!r} has one exit.")
    if not gated and options.token_capacity is not None:
        raise UserError(f"token_capacity is for models with a gate; {bundle.name!r} has none.")
    if not cascade and options.gmacs_budget is not None:
        raise UserError(f"gmacs_budget is for cascades; {bundle.name!r} has one exit.")
    if gated:
        return {"kind": "mixed_scale", **_gate_settings(model, options)}
    if cascade:
        return {"kind": "cascade", "thresholds": _exit_thresholds(model, bundle, options)}
    return {"kind": "plain"}


def _gate_settings(model: ImageModel, options: Options) -> dict[str, Any]:
    layout = options.layout or "slots"
    if layout == "rows":
        raise UserError(
            "layout='rows' packs a batch of one size, and exported functions take batches of any; "
            "use layout='budget' with token_capacity=."
        )
    check_choice("layout", layout, LAYOUTS)
    if (layout == "budget") != (options.token_capacity is not None):
        raise UserError(
            "layout='budget' needs token_capacity=, patch tokens per image; only this "
            "layout takes it."
        )
    adjustable = model.has_threshold
    if options.threshold is not None and not adjustable:
        raise UserError(
            "threshold is for gates that decide by one; with fine_share the gate decides by rank."
        )
    if layout == "budget":
        _with_capacity(model, options.token_capacity)  # checks it
    threshold = model.threshold if options.threshold is None else options.threshold
    return {
        "layout": layout,
        "token_capacity": options.token_capacity,
        "threshold": float(threshold) if adjustable else None,
    }


def _with_capacity(model: ImageModel, token_capacity: int | None) -> ImageModel:
    if not isinstance(token_capacity, int):
        raise UserError(f"token_capacity={token_capacity} is not a whole number of patch tokens.")
    made = model.clone(layout="budget", token_capacity=token_capacity)
    try:
        made.check_layout()
    except ValueError as error:
        raise UserError(str(error)) from error
    return made


def _exit_thresholds(model: ImageModel, bundle: ExportBundle, options: Options) -> list[float]:
    stages = len(model.exit_tokens)
    if options.gmacs_budget is None:
        given = options.thresholds
        return list(
            exit_thresholds.check(
                [exit_thresholds.NEVER] * (stages - 1) if given is None else given, stages
            )
        )
    if options.thresholds is not None or bundle.workdir is None:
        raise UserError("Give either gmacs_budget (of a run that eval.py fitted) or thresholds.")
    exit_thresholds.check_budget(options.gmacs_budget * 1e9, model.exit_macs())
    return list(fitted_thresholds(bundle.workdir, options.gmacs_budget))


def functions(model: ImageModel, bundle: ExportBundle, options: Options) -> list[Function]:
    """All functions of a model; the one to try first comes first."""
    (batch,) = export.symbolic_shape(_BATCH)
    images = jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.dtype(options.pixels))
    if model.is_cascade:
        return _stages(model, bundle, images)
    inputs: dict[str, Any] = {"images": images}
    if not model.has_gate:
        return [Function("forward", _forward(model), _wanted(bundle), inputs)]
    if model.has_threshold:
        inputs["threshold"] = jax.ShapeDtypeStruct((), jnp.float32)
    # Images that exceed the capacity run in the slots layout, which fits any image.
    made = [Function("slots", _forward(model), _wanted(bundle), inputs)]
    if options.layout == "budget":
        fast = _with_capacity(model, options.token_capacity)
        made.insert(0, Function("budget", _forward(fast), _wanted(bundle), inputs))
    return made


def _wanted(bundle: ExportBundle, prefixes: tuple[str, ...] = ("",)) -> dict[str, Any]:
    return {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for name, value in bundle.params.items()
        if name.startswith(prefixes)
    }


def _forward(model: ImageModel) -> Callable[..., dict[str, Array]]:
    def forward(params: Any, images: Array, *threshold: Array) -> dict[str, Array]:
        own: Any = model
        if model.layout == "budget":
            # One group per image: the layout of larger groups would depend on the batch size.
            own = model.clone(row_groups=images.shape[0])
        given = {"threshold": threshold[0]} if threshold else {}
        images = normalize(images, model.mean, model.std)
        output = own.apply(_variables(params), images, train=False, **given)
        answers = {"logits": output.logits}
        if model.region_grid is not None:
            shape = (-1, *model.region_grid)
            answers |= {
                "tokens": output.tokens,
                "within_capacity": output.answered,
                "coarse": (output.gate.coarse > 0.5).reshape(shape),
                "coarse_probability": jax.nn.sigmoid(output.gate.logits).reshape(shape),
            }
        merge_maps = output.merge_maps(model.patch_grid)
        if merge_maps is not None:
            answers["merge_maps"] = merge_maps.astype(jnp.int16)
        return answers

    return forward


def _stages(model: ImageModel, bundle: ExportBundle, images: Any) -> list[Function]:
    made: list[Function] = []
    handed: Any = None
    for stage in range(len(model.exit_tokens)):
        inputs = {"images": images} if handed is None else {"images": images, "handed": handed}
        params = _wanted(bundle, (f"stage_{stage}/", f"reuse_{stage}/"))
        made.append(Function(f"stage_{stage + 1}", _stage(model, stage), params, inputs))
        outputs = jax.eval_shape(made[-1].call, params, *inputs.values())
        handed = outputs.get("handed")
    return made


def _stage(model: ImageModel, stage: int) -> Callable[..., dict[str, Any]]:
    def run_stage(params: Any, images: Array, handed: Any = None) -> dict[str, Any]:
        images = normalize(images, model.mean, model.std)
        before = None if stage == 0 else StageCarry(**handed)
        done = model.apply(_variables(params), images, before, stage=stage, method="run_stage")
        if done.handed is None:
            return {"logits": done.logits}
        after = {"tokens": done.handed.tokens, "scores": done.handed.scores}
        return {
            "logits": done.logits,
            "handed": {name: value for name, value in after.items() if value is not None},
        }

    return run_stage


def _variables(params: dict[str, Array]) -> dict[str, Any]:
    return {"params": unflatten_dict(params, sep="/")}


def _described(function: Function, exported: export.Exported) -> dict[str, Any]:
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    inputs = {"params": f"{len(function.params)} arrays by name", **shapes(function.inputs)}
    return {
        "name": function.name,
        "file": f"{function.name}{SUFFIX}",
        "inputs": inputs,
        "outputs": shapes(outputs),
    }


def shapes(tree: Any) -> Any:
    """Types and shapes as text, 'float32[b, 1000]'."""
    return jax.tree.map(lambda x: f"{x.dtype}[{', '.join(map(str, x.shape))}]", tree)


def _check_flatbuffers() -> None:
    try:
        importlib.metadata.version("flatbuffers")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "JAX writes exported functions with flatbuffers, which is not installed: "
            "pip install 'msvit-jax[export]'"
        ) from error


def _write_flatbuffers(path: pathlib.Path) -> None:
    """Packs the installed flatbuffers (pure Python), which JAX needs to read the functions.

    JAX does not require it, so without this copy users of the functions would have to install it.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in importlib.metadata.files("flatbuffers") or ():
            if file.suffix == ".py" or file.name == "METADATA":
                packed.write(str(file.locate()), str(file))
