"""DVT: a cascade of transformers with more and more tokens, stopped when one is confident.

Wang et al. 2021, "Not All Images are Worth 16x16 Words" (arXiv 2105.15075). Every stage is a whole
transformer over the same image on a finer grid; a later one reuses what the one before computed:
its last features (section 3.2) and the scores of its attention (section 3.3). Each stage has an
exit of its own. Which exit answers an image is not decided here: see `exits.exit_thresholds`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array
from numpy.typing import ArrayLike

from msvit_jax import flops
from msvit_jax.models.backbone_mixin import BackboneMixin
from msvit_jax.models.block import LayerNorm, gelu, init_weights
from msvit_jax.models.output import Output, also_empty
from msvit_jax.models.vit import ViT
from msvit_jax.tokens import grid

# Operations that the paper's counter charges for each number that a layer norm outputs; it counts
# no other element-wise operations.
PUBLISHED_NORM_COST = 5.0


@struct.dataclass
class StageCarry:
    """Results that a stage hands on to the next.

    Attributes:
      tokens: [B, P + n, D], tokens after the last block, before the last norm; None without feature
        reuse.
      scores: [B, layers * heads, P + n, P + n], attention scores of all layers before the softmax,
        layer by layer; None without relationship reuse.
    """

    tokens: Array | None = None
    scores: Array | None = None


@struct.dataclass
class Exit:
    """The answer of one stage.

    Attributes:
      logits: [B, classes] float32 logits of the stage's exit.
      handed: Results for the next stage; None after the last.
    """

    logits: Array
    handed: StageCarry | None = None


def _upsampling_macs(old: int, new: int) -> float:
    """Counts multiply-accumulates of resizing one channel of a square grid, zeros left out."""
    return float((grid.upsampling(old, new) != 0).sum() * (old + new))


class FeatureReuse(nn.Module):
    """Context for one layer from an earlier stage's features: norm, linear, GELU, linear."""

    hidden: int
    width: int
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Computes the context of each token: [B, n, D] -> [B, n, width]."""
        dense = {"dtype": self.dtype, "kernel_init": init_weights}
        x = LayerNorm(epsilon=self.norm_epsilon, name="norm")(tokens)
        x = gelu(nn.Dense(self.hidden, name="fc1", **dense)(x))
        return nn.Dense(self.width, name="fc2", **dense)(x)


def _uniform(fan_in: int) -> Any:
    """PyTorch's initializer of a convolution's weights and bias, which DVT keeps only here."""
    bound = fan_in**-0.5
    return lambda key, shape: nn.initializers.uniform(2 * bound)(key, shape, jnp.float32) - bound


class ChannelMix(nn.Module):
    """A linear layer over axis 1: a 1 x 1 convolution of maps whose channels come first."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Mixes the channels: [B, C, h, w] -> [B, channels, h, w]."""
        fan_in = x.shape[1]
        kernel = self.param("kernel", _uniform(fan_in), (fan_in, self.channels))
        bias = self.param("bias", _uniform(fan_in), (self.channels,))
        mixed = jnp.einsum("bcqk,cd->bdqk", x.astype(self.dtype), kernel.astype(self.dtype))
        return mixed + bias.astype(self.dtype)[None, :, None, None]


class RelationReuse(nn.Module):
    """Mixes the scores of an earlier stage over its layers and heads: 1x1, GELU, 1x1."""

    ratio: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, scores: Array) -> Array:
        """Maps [B, layers * heads, n, n] to the same shape, for this stage's layers and heads."""
        channels = scores.shape[1]
        hidden = gelu(ChannelMix(self.ratio * channels, self.dtype, name="fc1")(scores))
        return ChannelMix(channels, self.dtype, name="fc2")(hidden)


class Reuse(nn.Module):
    """Prepares what a stage reuses from the results of the stage before.

    Attributes:
      backbone: Transformer of the stage.
      old: Side of the grid of the stage before.
      features: Width of the context; 0 for no feature reuse.
      hidden: Hidden width of feature reuse.
      relation_ratio: Hidden channels divided by channels in relationship reuse; 0 for none.
    """

    backbone: ViT
    old: int
    features: int
    hidden: int
    relation_ratio: int

    def setup(self) -> None:
        """Makes the submodules."""
        vit = self.backbone
        if self.features:
            # Named like the layers that they feed, so that layer decay finds them.
            self.blocks = [
                FeatureReuse(self.hidden, self.features, vit.norm_epsilon, vit.dtype)
                for _ in range(vit.depth)
            ]
        if self.relation_ratio:
            self.relation = RelationReuse(self.relation_ratio, vit.dtype)

    def mixed_scores(self, handed: StageCarry) -> Array | None:
        """Mixes the scores for all layers, still on the grid of the stage before."""
        if not self.relation_ratio or handed.scores is None:
            return None
        return self.relation(handed.scores)

    def relation_of(self, layer: int, mixed: Array | None) -> Array | None:
        """Returns a layer's bias r, resized except for the prefix: [B, H, P + N, P + N]."""
        if mixed is None:
            return None
        heads, resize = self.backbone.heads, self._upsampling(mixed)
        own = mixed[:, layer * heads : (layer + 1) * heads]
        return jnp.einsum("nq,bhqm->bhnm", resize, jnp.einsum("bhqk,mk->bhqm", own, resize))

    def features_of(self, layer: int, handed: StageCarry) -> Array | None:
        """Returns a layer's context E, zeros for the prefix: [B, P + N, C]."""
        if not self.features or handed.tokens is None:
            return None
        prefix = self.backbone.prefix_length
        context = self.blocks[layer](handed.tokens[:, prefix:])
        return jnp.einsum("nq,bqc->bnc", self._upsampling(context)[:, prefix:], context)

    def _upsampling(self, x: Array) -> Array:
        """Returns the matrix from the old tokens to the new, [P + N, P + n], in the dtype of x."""
        old, new, prefix = (self.old,) * 2, self.backbone.patch_grid, self.backbone.prefix_length
        return jnp.asarray(grid.grid_upsampling(old, new, prefix), x.dtype)


class DVT(BackboneMixin, nn.Module):
    """A cascade of transformers over finer and finer grids.

    Parameters are `stage_<i>`, each exactly a ViT's (except that norm2 and fc1 of later stages also
    see the context's channels), and `reuse_<i>`, by which stage i reuses results of stage i - 1.

    Attributes:
      backbone: Transformer whose attributes every stage has, except for the grid.
      grid_sizes: Number of tokens along one side of each stage, increasing.
      feature_reuse: Whether later stages see the features of the stage before.
      relation_reuse: Whether attention in later stages starts from the scores of the stage before.
      feature_width: Number of channels of the context that each layer sees.
      feature_hidden: Hidden width of the layers that make the context.
      relation_ratio: Hidden channels divided by channels where scores are mixed.
    """

    backbone: ViT
    grid_sizes: tuple[int, ...] = (7, 10, 14)
    feature_reuse: bool = True
    relation_reuse: bool = True
    feature_width: int = 48
    feature_hidden: int = 128
    relation_ratio: int = 3

    def setup(self) -> None:
        """Makes the submodules."""
        self.check()
        self.stage = [self._stage(side) for side in self.grid_sizes]
        self.reuse = [
            Reuse(
                self._stage(new),
                old=old,
                features=self.feature_width if self.feature_reuse else 0,
                hidden=self.feature_hidden,
                relation_ratio=self.relation_ratio if self.relation_reuse else 0,
                name=f"reuse_{index}",
            )
            for index, (old, new) in enumerate(self._pairs, start=1)
        ]

    def check(self) -> None:
        """Raises ValueError unless the attributes fit together and fit the image."""
        vit = self.backbone
        if not self.grid_sizes or list(self.grid_sizes) != sorted(set(self.grid_sizes)):
            raise ValueError(
                f"grid_sizes={self.grid_sizes}: give one or more, each larger than the one before."
            )
        if not vit.num_classes:
            raise ValueError(
                "num_classes=0: a cascade needs classes, whose probabilities decide its exits."
            )
        for name, wanted in (("distilled", False), ("scan_layers", False), ("reducer", "none")):
            if getattr(vit, name) != wanted:
                raise ValueError(
                    f"{name}={getattr(vit, name)!r} cannot be used in the stages of a cascade."
                )
        for side in self.grid_sizes:
            self._stage(side).check()

    def stage_model(self, stage: int) -> ViT:
        """Returns a stage's transformer, counted from 0, without its parameters."""
        return self._stage(self.grid_sizes[stage])

    def _stage(self, side: int) -> ViT:
        return self.backbone.clone(fixed_grid_size=side, parent=None, name=None)

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.grid_sizes[:-1], self.grid_sizes[1:], strict=True))

    @property
    def patch_size(self) -> int:
        """Side of the last stage's patches in px."""
        return self._stage(self.grid_sizes[-1]).effective_patch_size

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of the last stage's tokens."""
        return self.grid_sizes[-1], self.grid_sizes[-1]

    @property
    def is_cascade(self) -> bool:
        """Whether images can leave at several exits."""
        return True

    @property
    def exit_tokens(self) -> np.ndarray:
        """Number of patch tokens of each stage: [stages]."""
        return np.asarray(self.grid_sizes) ** 2

    def exit_macs(self, norm_cost: float = 0.0) -> np.ndarray:
        """Counts multiply-accumulates up to each exit: [stages], increasing.

        Args:
          norm_cost: Operations charged for each number that a layer norm outputs;
            `PUBLISHED_NORM_COST` gives the paper's figures, which include them.
        """
        old = [None, *self.grid_sizes[:-1]]
        both = [self._stage_cost(*pair) for pair in zip(old, self.grid_sizes, strict=True)]
        return np.cumsum([macs + norm_cost * normed for macs, normed in both])

    def _stage_cost(self, old: int | None, new: int) -> tuple[float, float]:
        """Counts multiply-accumulates of a stage, and numbers that its layer norms output."""
        vit = self._stage(new)
        extra = self.feature_width if self.feature_reuse and old is not None else 0
        length, width = vit.prefix_length + new * new, vit.width
        block = float(flops.block(length, width, vit.mlp_hidden))
        block += float(flops.dense(length, extra, vit.mlp_hidden))
        macs = vit.embed_macs + vit.depth * block + float(vit.head_macs)
        normed = vit.embed_norm_elements + length * (
            (2 * vit.depth + 1) * width + vit.depth * extra
        )
        if old is None:
            return macs, normed
        context = (width + self.feature_width) * self.feature_hidden
        blend = _upsampling_macs(old, new)
        if self.feature_reuse:
            macs += vit.depth * (old * old * context + extra * blend)
            normed += vit.depth * old * old * width
        if self.relation_reuse:
            before, channels = vit.prefix_length + old * old, vit.depth * vit.heads
            macs += before**2 * 2 * self.relation_ratio * channels**2
            macs += channels * (before + length) * blend
        return macs, normed

    def macs(self, tokens: ArrayLike) -> np.ndarray:
        """Counts multiply-accumulates of images that left at the exit with so many patch tokens.

        Any other number of tokens is counted as the next larger exit's.
        """
        exit_index = np.searchsorted(self.exit_tokens, np.asarray(tokens))
        return self.exit_macs()[np.minimum(exit_index, len(self.grid_sizes) - 1)]

    @also_empty
    def __call__(self, images: Array, *, train: bool = False) -> Output:
        """Computes all exits.

        Args:
          images: [B, S, S, 3] float32 images, normalized; S is `image_size`.
          train: Whether stochastic depth is on (rng stream "dropout").

        Returns:
          Output with `exit_logits` [B, stages, classes]; `logits` are the last exit's.
        """
        handed, logits = None, []
        for stage in range(len(self.grid_sizes)):
            done = self.run_stage(images, handed, stage=stage, train=train)
            logits.append(done.logits)
            handed = done.handed
        tokens = jnp.full((images.shape[0],), self.exit_tokens[-1], jnp.int32)
        return Output(logits=logits[-1], tokens=tokens, exit_logits=jnp.stack(logits, axis=1))

    def run_stage(
        self, images: Array, handed: StageCarry | None = None, *, stage: int, train: bool = False
    ) -> Exit:
        """Computes one stage, given the results of the stage before.

        Rows do not depend on each other: images may come from several batches of earlier stages.

        Args:
          images: [B, S, S, 3] float32 images, normalized; S is `image_size`.
          handed: Results of stage - 1 for these images; None for stage 0.
          stage: Index of the stage, from 0.
          train: Whether stochastic depth is on (rng stream "dropout").
        """
        vit = self.stage[stage]
        vit.check_shape(images)
        x = vit.embed(images, train=train)
        x = vit.with_prefix(x.reshape(x.shape[0], -1, vit.width))
        rates, scores = vit.drop_rates(train=train), []
        reused = self._reused(stage, handed)
        for layer, block in enumerate(vit.blocks):
            rate = None if rates is None else rates[layer]
            x, own = block.reusing(x, rate, *reused(layer))
            scores.append(own)
        logits, _ = vit.forward_head(vit.norm(x), train=train)
        return Exit(logits, None if stage == len(self.grid_sizes) - 1 else self._handed(x, scores))

    def _reused(
        self, stage: int, handed: StageCarry | None
    ) -> Callable[[int], tuple[Array | None, Array | None]]:
        """Returns a function from layer to its relation and features, computed when it is called.

        This way only one layer's relation, as large as the layer's scores, exists at a time.
        """
        if stage == 0:
            return lambda layer: (None, None)
        if handed is None:
            raise ValueError(f"Stage {stage} needs the carry of stage {stage - 1}; run that first.")
        reuse, there = self.reuse[stage - 1], handed
        mixed = reuse.mixed_scores(there)
        return lambda layer: (reuse.relation_of(layer, mixed), reuse.features_of(layer, there))

    def _handed(self, x: Array, scores: list[Array]) -> StageCarry:
        joined = None
        if self.relation_reuse:
            joined = jnp.concatenate([s.astype(x.dtype) for s in scores], axis=1)
        return StageCarry(tokens=x if self.feature_reuse else None, scores=joined)
