"""The official DVT weights (PyTorch), into our names and back.

    python -m msvit_jax.weights.dvt --model=dvt_t2t_vit_12 --source=t2t.pth --out=t2t.safetensors

Needs the torch extra for reading .pth files, which are loaded with weights_only: nothing in them is
executed. What is written can be given to `train.py --config.init_from=`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from safetensors.numpy import save_file

from msvit_jax import errors
from msvit_jax.errors import UserError, nearest
from msvit_jax.models.registry import create_model
from msvit_jax.models.t2t import T2TViT

STAGES = ("less_less_token", "less_token", "normal_token")
State = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter in both formats.

    Attributes:
      theirs: its name in the official state dict.
      ours: in a DVT's parameters, joined by '/'.
      to_ours: makes ours of theirs.
      to_theirs: the reverse.
    """

    theirs: str
    ours: str
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


def _linear(theirs: str, ours: str, *, bias: bool = True) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", f"{ours}/kernel", _transposed, _transposed)
    if bias:
        yield Entry(f"{theirs}.bias", f"{ours}/bias", _same, _same)


def _norm(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", f"{ours}/scale", _same, _same)
    yield Entry(f"{theirs}.bias", f"{ours}/bias", _same, _same)


def _window_linear(theirs: str, ours: str, size: int) -> Iterator[Entry]:
    """A linear layer over windows, whose channels come first there and last here."""
    yield Entry(
        f"{theirs}.weight",
        f"{ours}/kernel",
        lambda w: _channels_last(w, size).T,
        lambda k: _channels_first(k.T, size),
    )
    yield Entry(f"{theirs}.bias", f"{ours}/bias", _same, _same)


def _window_norm(theirs: str, ours: str, size: int) -> Iterator[Entry]:
    for their, our in (("weight", "scale"), ("bias", "bias")):
        yield Entry(
            f"{theirs}.{their}",
            f"{ours}/{our}",
            lambda x: _channels_last(x, size),
            lambda x: _channels_first(x, size),
        )


def _channels_last(x: np.ndarray, size: int) -> np.ndarray:
    """[..., C * size * size] ordered (channel, row, column) -> (row, column, channel)."""
    split = x.reshape(*x.shape[:-1], -1, size, size)
    return np.moveaxis(split, -3, -1).reshape(x.shape)


def _channels_first(x: np.ndarray, size: int) -> np.ndarray:
    """Undoes `_channels_last`."""
    split = x.reshape(*x.shape[:-1], size, size, -1)
    return np.moveaxis(split, -1, -3).reshape(x.shape)


def _conv(theirs: str, ours: str) -> Iterator[Entry]:
    """A convolution [D, C, h, w] as a kernel [h, w, C, D]."""
    yield Entry(
        f"{theirs}.weight",
        f"{ours}/kernel",
        lambda w: w.transpose(2, 3, 1, 0),
        lambda k: k.transpose(3, 2, 0, 1),
    )
    yield Entry(f"{theirs}.bias", f"{ours}/bias", _same, _same)


def _mix(theirs: str, ours: str) -> Iterator[Entry]:
    """A 1 x 1 convolution [D, C, 1, 1] as a kernel [C, D]."""
    yield Entry(
        f"{theirs}.weight",
        f"{ours}/kernel",
        lambda w: w[:, :, 0, 0].T,
        lambda k: k.T[:, :, None, None],
    )
    yield Entry(f"{theirs}.bias", f"{ours}/bias", _same, _same)


def _tokenizer(theirs: str, ours: str, window: int) -> Iterator[Entry]:
    for step, size in ((1, window), (2, 3)):
        their, our = f"{theirs}.attention{step}", f"{ours}/performer_{step}"
        yield Entry(f"{their}.w", f"{our}/random_features", _same, _same)
        yield from _window_norm(f"{their}.norm1", f"{our}/norm1", size)
        yield from _window_linear(f"{their}.kqv", f"{our}/kqv", size)
        yield from _linear(f"{their}.proj", f"{our}/proj")
        yield from _norm(f"{their}.norm2", f"{our}/norm2")
        yield from _linear(f"{their}.mlp.0", f"{our}/fc1")
        yield from _linear(f"{their}.mlp.2", f"{our}/fc2")
    yield from _window_linear(f"{theirs}.project", f"{ours}/proj", 3)


def table(model: Any) -> list[Entry]:
    """All parameters of a cascade of three stages, the official number.

    Raises:
      UserError: the cascade has another number of stages.
    """
    if len(model.grids) != len(STAGES):
        raise UserError(f"The official weights have {len(STAGES)} stages, not {len(model.grids)}.")
    return [entry for stage in range(len(STAGES)) for entry in _stage(model, stage)]


def _stage(model: Any, stage: int) -> Iterator[Entry]:
    theirs, ours, vit = STAGES[stage], f"stage_{stage}", model.stage_model(stage)
    for name in ("cls_token", "pos_embed"):
        yield Entry(f"{theirs}.{name}", f"{ours}/{name}", lambda x: x[0], lambda x: x[None])
    if isinstance(vit, T2TViT):
        window = vit.split.window
        yield from _tokenizer(f"{theirs}.tokens_to_token", f"{ours}/patch_embed", window)
    else:
        yield from _conv(f"{theirs}.patch_embed.proj", f"{ours}/patch_embed/proj")
    for layer in range(vit.depth):
        their, our = f"{theirs}.blocks.{layer}", f"{ours}/blocks_{layer}"
        yield from _norm(f"{their}.norm1", f"{our}/norm1")
        yield from _linear(f"{their}.attn.qkv", f"{our}/attn/qkv", bias=vit.qkv_bias)
        yield from _linear(f"{their}.attn.proj", f"{our}/attn/proj")
        yield from _norm(f"{their}.norm2", f"{our}/norm2")
        yield from _linear(f"{their}.mlp.fc1", f"{our}/mlp/fc1")
        yield from _linear(f"{their}.mlp.fc2", f"{our}/mlp/fc2")
        if stage and model.feature_reuse:
            reuse = f"reuse_{stage}/blocks_{layer}"
            yield from _norm(f"{their}.feature_resuse_mlp.0", f"{reuse}/norm")
            yield from _linear(f"{their}.feature_resuse_mlp.1.fc1", f"{reuse}/fc1")
            yield from _linear(f"{their}.feature_resuse_mlp.1.fc2", f"{reuse}/fc2")
    if stage and model.relation_reuse:
        for index, name in ((0, "fc1"), (2, "fc2")):
            reuse = f"reuse_{stage}/relation/{name}"
            yield from _mix(f"{theirs}.relation_reuse_conv.{index}", reuse)
    yield from _norm(f"{theirs}.norm", f"{ours}/norm")
    yield from _linear(f"{theirs}.head", f"{ours}/head")


def to_ours(state: State, model: Any, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Official weights by our names.

    Args:
      state: the official state dict.
      model: a cascade.
      shapes: arrays or shapes of its parameters by name, as `init_from.model_shapes` flattened.

    Raises:
      UserError: keys are missing or unexpected, or have another shape; all are listed.
    """
    found: dict[str, np.ndarray] = {}
    misfits: list[str] = []
    entries = table(model)
    unexpected = sorted(set(state) - {entry.theirs for entry in entries})
    for entry in entries:
        if entry.theirs not in state:
            # Of a wholly different file the first few say enough, and comparing names takes long.
            near = nearest(entry.theirs, unexpected) if len(misfits) < 20 else ""
            misfits.append(f"{entry.theirs}: missing.{near}")
            continue
        theirs, wanted = np.asarray(state[entry.theirs]), shapes[entry.ours]
        expected = entry.to_theirs(np.empty(wanted.shape, np.bool_)).shape
        if theirs.shape != expected:
            misfits.append(f"{entry.theirs}: {theirs.shape} in the source, {expected} expected")
        else:
            found[entry.ours] = np.ascontiguousarray(entry.to_ours(theirs), wanted.dtype)
    misfits += [f"{name}: unexpected" for name in unexpected]
    if misfits:
        raise UserError(
            f"These are not weights of this model ({len(misfits)} misfits):\n  "
            + "\n  ".join(misfits)
        )
    return found


def to_theirs(params: State, model: Any) -> dict[str, np.ndarray]:
    """Undoes `to_ours`, exactly."""
    return {
        entry.theirs: np.ascontiguousarray(entry.to_theirs(np.asarray(params[entry.ours])))
        for entry in table(model)
    }


def read_pth(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a PyTorch file of tensors; nothing in it is executed.

    Raises:
      UserError: torch is not installed, or the file holds something else than tensors by name.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "Reading .pth files needs PyTorch: pip install 'msvit-jax[torch]'"
        ) from error
    if not pathlib.Path(path).is_file():
        raise UserError(f"There is no file {str(path)!r}.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, for damaged files and for files with code in them
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{str(path)!r} is not a file of weights alone: {first}") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(x, torch.Tensor) for x in loaded.values()
    ):
        raise UserError(f"{str(path)!r} does not hold tensors by name.")
    return {
        name.removeprefix("module."): x.detach().to(torch.float32).numpy()
        for name, x in loaded.items()
    }


def main(argv: Sequence[str]) -> None:
    """Converts a file."""
    # Here: it brings Orbax, which the table does not need.
    from msvit_jax.train.init_from import model_shapes
    from msvit_jax.train.optimizer import flat_names

    del argv
    given = flags.FLAGS
    model = create_model(given.model)
    shapes = flat_names(model_shapes(model))
    ours = to_ours(read_pth(given.source), model, shapes)
    save_file(ours, given.out, metadata={"model": given.model})
    print(f"{sum(x.size for x in ours.values()):,} parameters of {given.model} in {given.out}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "dvt_deit_small, dvt_t2t_vit_12 or dvt_t2t_vit_14.", required=True
    )
    flags.DEFINE_string("source", None, "The official .pth or .pth.tar file.", required=True)
    flags.DEFINE_string("out", None, "The .safetensors file to write.", required=True)
    errors.run(main)
