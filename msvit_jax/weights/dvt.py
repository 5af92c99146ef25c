"""Converts the official DVT weights (PyTorch) to our names and back.

    python -m msvit_jax.weights.dvt --model=dvt_t2t_vit_12 --source=t2t.pth --out=t2t.safetensors

Nothing in the files is executed. The output can be passed to `train.py --config.init_from=`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from msvit_jax import errors
from msvit_jax.errors import UserError
from msvit_jax.models.registry import create_model
from msvit_jax.models.t2t import T2TViT
from msvit_jax.tree import flat_names
from msvit_jax.weights import ours, timm
from msvit_jax.weights.entries import Entry, Flat, State, conv, linear, norm, one, same, squeezed

NAME = "dvt"
STAGES = ("less_less_token", "less_token", "normal_token")


def _window_linear(theirs: str, ours: str, size: int) -> Iterator[Entry]:
    """A linear layer over windows, with channels first there and last here."""
    yield one(
        f"{theirs}.weight",
        f"{ours}/kernel",
        lambda w: _channels_last(w, size).T,
        lambda k: _channels_first(k.T, size),
    )
    yield same(f"{theirs}.bias", f"{ours}/bias")


def _window_norm(theirs: str, ours: str, size: int) -> Iterator[Entry]:
    for their, our in (("weight", "scale"), ("bias", "bias")):
        yield one(
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
    """The inverse of `_channels_last`."""
    split = x.reshape(*x.shape[:-1], size, size, -1)
    return np.moveaxis(split, -1, -3).reshape(x.shape)


def _mix(theirs: str, ours: str) -> Iterator[Entry]:
    """A 1 x 1 convolution [D, C, 1, 1] as a kernel [C, D]."""
    yield one(
        f"{theirs}.weight",
        f"{ours}/kernel",
        lambda w: w[:, :, 0, 0].T,
        lambda k: k.T[:, :, None, None],
    )
    yield same(f"{theirs}.bias", f"{ours}/bias")


def _tokenizer(theirs: str, ours: str, window: int) -> Iterator[Entry]:
    for step, size in ((1, window), (2, 3)):
        their, our = f"{theirs}.attention{step}", f"{ours}/performer_{step}"
        yield same(f"{their}.w", f"{our}/random_features")
        yield from _window_norm(f"{their}.norm1", f"{our}/norm1", size)
        yield from _window_linear(f"{their}.kqv", f"{our}/kqv", size)
        yield from linear(f"{their}.proj", f"{our}/proj")
        yield from norm(f"{their}.norm2", f"{our}/norm2")
        yield from linear(f"{their}.mlp.0", f"{our}/fc1")
        yield from linear(f"{their}.mlp.2", f"{our}/fc2")
    yield from _window_linear(f"{theirs}.project", f"{ours}/proj", 3)


def table(model: Any) -> list[Entry]:
    """All parameters of a cascade with three stages, as the official models have.

    Raises:
      UserError: The cascade has another number of stages.
    """
    if len(model.grid_sizes) != len(STAGES):
        raise UserError(
            f"The official weights have {len(STAGES)} stages, not {len(model.grid_sizes)}."
        )
    return [entry for stage in range(len(STAGES)) for entry in _stage(model, stage)]


def _stage(model: Any, stage: int) -> Iterator[Entry]:
    theirs, ours, vit = STAGES[stage], f"stage_{stage}", model.stage_model(stage)
    for name in ("cls_token", "pos_embed"):
        yield squeezed(f"{theirs}.{name}", f"{ours}/{name}")
    if isinstance(vit, T2TViT):
        window = vit.split.window
        yield from _tokenizer(f"{theirs}.tokens_to_token", f"{ours}/patch_embed", window)
    else:
        yield from conv(f"{theirs}.patch_embed.proj", f"{ours}/patch_embed/proj")
    for layer in range(vit.depth):
        their, our = f"{theirs}.blocks.{layer}", f"{ours}/blocks_{layer}"
        yield from timm.block(vit, their, our)
        if stage and model.feature_reuse:
            reuse = f"reuse_{stage}/blocks_{layer}"
            yield from norm(f"{their}.feature_resuse_mlp.0", f"{reuse}/norm")
            yield from linear(f"{their}.feature_resuse_mlp.1.fc1", f"{reuse}/fc1")
            yield from linear(f"{their}.feature_resuse_mlp.1.fc2", f"{reuse}/fc2")
    if stage and model.relation_reuse:
        for index, name in ((0, "fc1"), (2, "fc2")):
            reuse = f"reuse_{stage}/relation/{name}"
            yield from _mix(f"{theirs}.relation_reuse_conv.{index}", reuse)
    yield from norm(f"{theirs}.norm", f"{ours}/norm")
    yield from linear(f"{theirs}.head", f"{ours}/head")


def canonical(state: State, model: Any) -> tuple[Flat, list[str]]:
    """Returns the state unchanged, and no unused names: the format has no variants."""
    del model
    return dict(state), []


def main(argv: Sequence[str]) -> None:
    """Converts a file as the command line says."""
    # Imported here because loading imports this module.
    from msvit_jax.weights import loading

    del argv
    given = flags.FLAGS
    model = create_model(given.model)
    params, _ = loading.load_params(given.source, model)
    flat = flat_names(params)
    about = {"model": {"name": given.model}, "mean": model.mean, "std": model.std}
    ours.save(given.out, flat, about)
    print(f"{sum(x.size for x in flat.values()):,} parameters of {given.model} in {given.out}")


if __name__ == "__main__":
    from absl import flags  # only needed by the command

    flags.DEFINE_string(
        "model",
        None,
        "Name of the model: dvt_deit_small, dvt_t2t_vit_12 or dvt_t2t_vit_14.",
        required=True,
    )
    flags.DEFINE_string(
        "source", None, "Path of the official .pth or .pth.tar file.", required=True
    )
    flags.DEFINE_string("out", None, "Path of the .safetensors file to write.", required=True)
    errors.run(main)
