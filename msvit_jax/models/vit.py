"""The plain vision transformer; every model of the library is one or contains one.

ViT (Dosovitskiy et al. 2021), DeiT (Touvron et al. 2021) with its distillation token, LayerScale
(Touvron et al. 2021, CaiT) and register tokens (Darcet et al. 2024), as timm's models have them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict
from jax import Array, lax
from numpy.typing import ArrayLike

from msvit_jax import flops
from msvit_jax.image_size import ImageSize
from msvit_jax.models import attention_kernel, reduction, vit_checks
from msvit_jax.models.attention import Mask
from msvit_jax.models.block import Block, LayerNorm, init_weights
from msvit_jax.models.embedding import (
    PatchEmbed,
    sequence_positions,
    sincos_positions,
)
from msvit_jax.models.encoded import Encoded, patch_positions, patch_targets
from msvit_jax.models.interface import ModelDefaults
from msvit_jax.models.output import Features, Output, also_empty
from msvit_jax.models.reduction import ReductionSpec
from msvit_jax.tokens import grid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ViT(ModelDefaults, nn.Module):
    """A vision transformer for classification.

    Attributes:
      num_classes: Number of classes of the head; 0 for no head, the answer is then
        `Output.features`.
      image_size: Side of the training images in px, or their (height, width); position embeddings
        are made for it and resized for images of any other size that is a whole number of patches.
      patch_size: Side of a patch in px.
      fixed_grid_size: Number of patches along one side of square images, instead of as many as
        `patch_size` gives. Patches are then as large as needed, with zeros around the image (10 at
        224 px: patches of 23 px, 3 px of zeros on each side), and only images of `image_size` are
        taken.
      width: Number of channels of a token.
      depth: Number of blocks.
      heads: Number of attention heads.
      mlp_ratio: Hidden width of the MLPs divided by `width`.
      qkv_bias: Whether queries, keys and values have a bias.
      class_token: Whether there is a class token.
      distilled: Whether there are DeiT's second token and head; in evaluation the two heads' logits
        are averaged.
      register_tokens: Number of extra learned tokens without position.
      prefix_positions: Whether class and distillation token have positions of their own (timm's
        `no_embed_class` negated).
      pos_init: Initialization of the position embeddings. "normal" draws small random numbers.
        "sincos" takes sines and cosines of row and column (Beyer et al. 2022), from which a small
        model trained from scratch on little data learns much faster. "fixed" takes sines and
        cosines of the position in the sequence, which are never trained (T2T-ViT): they are still a
        parameter, with its gradient cut, so they are saved with the weights, and an optimizer whose
        weight decay skips positions, as ours does, leaves them unchanged.
      pos_resize: Method that resizes position embeddings for images of another size, one of
        `tokens.grid.RESIZINGS`: that of the code base the weights come from.
      pool: Input of the head: "token" (the class token) or "mean" (mean of the patch tokens after
        the last norm).
      layer_scale: Initial value of LayerScale; None for no LayerScale.
      norm_epsilon: Epsilon of the layer norms.
      gelu: Variant of GELU in the blocks, "exact" or "tanh" (its approximation, as in JAX's own
        ViTs).
      drop_path: Stochastic depth's rate in the last block; it rises linearly from 0 in the first.
      dtype: Compute dtype; parameters, softmax and logits stay float32.
      remat: Whether the blocks' activations are recomputed in the backward pass instead of kept.
      attention_impl: Implementation of attention, one of `models.attention.IMPLEMENTATIONS`.
      scan_layers: Whether one compiled block is scanned over stacked parameters (`blocks`, layers
        first), which compiles faster.
      reducer: Method by which layers reduce tokens, a name in `reducers.REDUCERS`, or "none".
      reduce_layers: Layers that reduce, counted from 1; None takes those after each quarter of the
        depth ("algm": 1 and 5 of 12), or all with `remove`.
      keep: Share of the patch tokens that such a layer keeps, for all or for each of them.
      remove: Number of patch tokens that such a layer merges instead ("tome"), for all or for each.
      reducer_options: Other attributes of the reducer, by name.
      unmerge: What a patch that was merged or dropped, or whose region is coarse, has in the
        features of a model without a head: "copy" (the token that it became part of; zeros if
        dropped) or "residual" (its own features from before, plus what later layers added to that
        token).
      mean: Mean of the pixels that images are normalized with, on the scale of 0 to 1.
      std: Standard deviation of the pixels that images are normalized with, on the scale of 0 to 1.
    """

    num_classes: int = 1000
    image_size: ImageSize = 224
    patch_size: int = 16
    fixed_grid_size: int | None = None
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    class_token: bool = True
    distilled: bool = False
    register_tokens: int = 0
    prefix_positions: bool = True
    pos_init: str = "normal"
    pos_resize: str = "timm"
    pool: str = "token"
    layer_scale: float | None = None
    norm_epsilon: float = 1e-6
    gelu: str = "exact"
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False
    scan_layers: bool = False
    attention_impl: str = "auto"
    reducer: str = "none"
    reduce_layers: tuple[int, ...] | None = None
    keep: float | tuple[float, ...] = 0.7
    remove: int | tuple[int, ...] = 0
    reducer_options: Mapping[str, Any] = dataclasses.field(default_factory=FrozenDict)
    unmerge: str = "copy"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def setup(self) -> None:
        """Makes the submodules and parameters."""
        self.check()
        count = self.max_tokens + self.positioned_prefix
        self.patch_embed = self._embedding()
        start = {
            "normal": init_weights,
            "sincos": sincos_positions(self.positioned_prefix, self.patch_grid),
            "fixed": sequence_positions,
        }[self.pos_init]
        self.pos_embed = self.param("pos_embed", start, (count, self.width))
        if self.class_token:
            self.cls_token = self.param("cls_token", init_weights, (1, self.width))
        if self.distilled:
            self.dist_token = self.param("dist_token", init_weights, (1, self.width))
        if self.register_tokens:
            shape = (self.register_tokens, self.width)
            self.reg_tokens = self.param("reg_tokens", init_weights, shape)
        again = ["__call__", "reducing", "reusing"]
        make_block = nn.remat(Block, methods=again) if self.remat else Block
        block = {
            "width": self.width,
            "heads": self.heads,
            "hidden": self.mlp_hidden,
            "qkv_bias": self.qkv_bias,
            "layer_scale": self.layer_scale,
            "norm_epsilon": self.norm_epsilon,
            "attention_impl": self.attention_impl,
            "dtype": self.dtype,
            "gelu": self.gelu,
        }
        if self.scan_layers:
            self.blocks = make_block(**block)
        else:
            specs = self.reductions
            self.blocks = [make_block(**block, reduction=specs.get(i)) for i in range(self.depth)]
        self.norm = LayerNorm(epsilon=self.norm_epsilon)
        if not self.num_classes:
            return
        self.head = nn.Dense(self.num_classes, kernel_init=init_weights)
        if self.distilled:
            self.head_dist = nn.Dense(self.num_classes, kernel_init=init_weights)

    def _embedding(self) -> nn.Module:
        return PatchEmbed(self.width, self.effective_patch_size, self.dtype)

    def check(self) -> None:
        """Raises ValueError for attributes that do not fit together."""
        self.check_grid()
        vit_checks.check_attributes(self)

    def check_grid(self) -> None:
        """Raises ValueError unless the images divide into the grid's patches."""
        vit_checks.check_grid(self)

    @property
    def backbone(self) -> "ViT":
        """The model itself, which is a plain transformer."""
        return self

    def with_backbone(self, **changes: Any) -> Self:
        """Returns a copy, for the same parameters, with changed attributes."""
        return self.clone(**changes)

    @property
    def reductions(self) -> dict[int, ReductionSpec]:
        """The layers that reduce tokens, counted from 0.

        Raises:
          ValueError: The attributes do not fit together.
        """
        return reduction.reduction_specs(
            reducer=self.reducer,
            layers=self.reduce_layers,
            keep=self.keep,
            remove=self.remove,
            options=self.reducer_options,
            depth=self.depth,
            patches=self.max_tokens,
            prefix=self.prefix_length,
            mean_query=self.pool == "mean",
        )

    def layer_tokens(self, tokens: ArrayLike) -> np.ndarray:
        """Counts the patch tokens that enter each layer's MLP: [...] -> [depth, ...]."""
        return reduction.layer_tokens(self.reductions, self.depth, tokens)[1:]

    def final_tokens(self, tokens: ArrayLike) -> np.ndarray:
        """Counts the patch tokens after the last layer: [...] -> [...]."""
        return reduction.layer_tokens(self.reductions, self.depth, tokens)[-1]

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of a training image."""
        if self.fixed_grid_size:
            return self.fixed_grid_size, self.fixed_grid_size
        height, width, _ = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def effective_patch_size(self) -> int:
        """Side of a patch in px: `patch_size`, or what follows from `fixed_grid_size`."""
        side = self.fixed_grid_size
        return self.patch_size if side is None else -(-self.image_shape[0] // side)

    @property
    def padding(self) -> tuple[int, int]:
        """Width in px of the zeros before and after an image along either side."""
        if self.fixed_grid_size is None:
            return 0, 0
        beyond = self.fixed_grid_size * self.effective_patch_size - self.image_shape[0]
        return beyond // 2, beyond - beyond // 2

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLPs."""
        return int(self.width * self.mlp_ratio)

    @property
    def prefix_length(self) -> int:
        """Tokens before the patches: class, distillation, registers."""
        return self.class_token + self.distilled + self.register_tokens

    @property
    def positioned_prefix(self) -> int:
        """Tokens before the patches that have a position embedding."""
        return (self.class_token + self.distilled) if self.prefix_positions else 0

    def macs(self, tokens: ArrayLike) -> np.ndarray:
        """Counts multiply-accumulates for images with the given numbers of active patch tokens.

        The patch embedding is counted for the whole grid of a training image.
        """
        specs = self.reductions
        left = reduction.layer_tokens(specs, self.depth, tokens) + self.prefix_length
        blocks = flops.attention(left[:-1], self.width) + flops.mlp(
            left[1:], self.width, self.mlp_hidden
        )
        total = self.embed_macs + blocks.sum(axis=0) + self.head_macs
        for layer, spec in specs.items():
            if not (reducer := spec.make()).keeps_all:
                total = total + reducer.macs(left[layer], left[layer + 1], self.width, self.heads)
        return total

    @property
    def embed_macs(self) -> float:
        """Multiply-accumulates of the patch embedding."""
        return flops.dense(self.max_tokens, 3 * self.effective_patch_size**2, self.width)

    @property
    def embed_norm_elements(self) -> float:
        """Number of values that layer norms before the first block output."""
        return 0.0

    @property
    def head_macs(self) -> float:
        """Multiply-accumulates of the classification head or heads."""
        return (1 + self.distilled) * flops.dense(1, self.width, self.num_classes)

    def positions(self, size: tuple[int, int]) -> Array:
        """Position embeddings of the patches on a grid of the given size: [h, w, D] float32."""
        own = self._positions[self.positioned_prefix :].reshape(*self.patch_grid, self.width)
        return grid.resize_positions(own, size, self.pos_resize)

    @property
    def _positions(self) -> Array:
        return lax.stop_gradient(self.pos_embed) if self.pos_init == "fixed" else self.pos_embed

    def prefix(self, batch: int) -> Array:
        """Class, distillation and register tokens with their positions: [B, P, D]."""
        tokens = []
        if self.class_token:
            tokens.append(self.cls_token)
        if self.distilled:
            tokens.append(self.dist_token)
        tokens = [jnp.concatenate(tokens)] if tokens else []
        if tokens and self.prefix_positions:
            tokens[0] = tokens[0] + self._positions[: self.positioned_prefix]
        if self.register_tokens:
            tokens.append(self.reg_tokens)
        if not tokens:
            return jnp.zeros((batch, 0, self.width), self.dtype)
        stacked = jnp.concatenate(tokens).astype(self.dtype)
        return jnp.broadcast_to(stacked[None], (batch, *stacked.shape))

    def with_prefix(self, x: Array) -> Array:
        """Puts the prefix before patch tokens: [B, N, D] -> [B, P + N, D]."""
        return jnp.concatenate([self.prefix(x.shape[0]), x.astype(self.dtype)], axis=1)

    def forward_features(
        self,
        x: Array,
        *,
        train: bool,
        mask: Mask | None = None,
        size: tuple[int, int] | None = None,
        normalize: bool = True,
    ) -> Encoded:
        """Runs all blocks and the last norm.

        Args:
          x: [B, N, D], tokens with positions, prefix included, in any order and layout.
          train: Whether stochastic depth is on.
          mask: Attention mask, which also tells the images of a row apart; None if a row is one
            image and all its tokens count.
          size: (h, w) of the patches if they are a whole grid in reading order behind the prefix.
          normalize: Whether the last norm is applied, or left to the caller.
        """
        last = self.norm if normalize else lambda x: x
        rates = self.drop_rates(train=train)
        if self.scan_layers:
            return Encoded(last(self._scan_blocks(x, mask, rates)))
        specs, residual = self.reductions, self.keeps_own_features
        state = reduction.start(x, specs, size, residual=residual) if specs else None
        targets: list[Array] = []
        for layer, block in enumerate(self.blocks):
            rate = None if rates is None else rates[layer]
            if state is not None and layer in specs:
                x, mask, state = block.reducing(x, rate, mask, state, train)
                targets.append(state.targets)
            else:
                x = block(x, rate, mask)
        unmerged = last(state.unmerge(x)) if state is not None and residual else None
        return Encoded(last(x), state, tuple(targets), unmerged)

    @property
    def keeps_own_features(self) -> bool:
        """Whether patches that share a token have features of their own in the answer."""
        return self.unmerge == "residual" and not self.num_classes

    def drop_rates(self, *, train: bool) -> Array | None:
        """Stochastic depth's rate in each block, [depth]; None if it is off."""
        if not train or not self.drop_path:
            return None
        return jnp.linspace(0.0, self.drop_path, self.depth, dtype=jnp.float32)

    def _scan_blocks(self, x: Array, mask: Mask | None, rates: Array | None) -> Array:
        def step(block: Callable[..., Array], x: Array, rate: Array | None) -> tuple[Array, None]:
            return block(x, rate, mask), None

        if not self.remat:
            # Left to itself, a scan keeps all that the backward pass uses, much of it in float32.
            # What products and attention gave is enough; the rest takes less time to compute again.
            policies = jax.checkpoint_policies
            kept = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable,
                policies.save_only_these_names(attention_kernel.SAVED),
            )
            step = nn.remat(step, prevent_cse=False, policy=kept)
        scan = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
        )
        return scan(self.blocks, x, rates)[0]

    def forward_head(
        self, x: Array, *, train: bool, areas: Array | None = None
    ) -> tuple[Array, Array | None]:
        """Computes logits from encoded tokens.

        Args:
          x: [B, P + N, D] encoded tokens; with pool="token" the prefix alone is enough.
          train: Whether a distilled model returns the logits of its two heads apart instead of
            their mean.
          areas: [B, N], number of fine cells that each patch token stands for, its weight in mean
            pooling; None for equal weights.

        Returns:
          Logits [B, classes] float32, and the logits of the distillation head or None.
        """
        if not self.num_classes:
            return jnp.zeros((x.shape[0], 0)), None
        if self.pool == "mean":
            patch_tokens = x[:, self.prefix_length :].astype(jnp.float32)
            if areas is None:
                pooled = patch_tokens.mean(axis=1)
            else:
                share = areas / areas.sum(axis=1, keepdims=True)
                pooled = jnp.einsum("bnd,bn->bd", patch_tokens, share)
            return self.head(pooled), None
        logits = self.head(x[:, 0].astype(jnp.float32))
        if not self.distilled:
            return logits, None
        distilled = self.head_dist(x[:, 1].astype(jnp.float32))
        return (logits, distilled) if train else ((logits + distilled) / 2, None)

    def features(self, x: Array, size: tuple[int, ...]) -> Features:
        """Returns the features that a model without a head answers with.

        Args:
          x: [B, P + N, D] encoded tokens, un-merged.
          size: (h, w) of the patch grid.
        """
        patches = x[:, self.prefix_length :].reshape(x.shape[0], *size, self.width)
        return Features(patches, x[:, 0] if self.class_token else None)

    def embed(self, images: Array, *, train: bool = False) -> Array:
        """Computes patch tokens with their positions: [B, H, W, 3] -> [B, h, w, D].

        `train` turns on the tokenizer's dropout, if it has any.
        """
        x = self._tokens(images, train)
        return x + self.positions((x.shape[1], x.shape[2])).astype(x.dtype)[None]

    def _tokens(self, images: Array, train: bool) -> Array:
        del train  # patches are embedded the same in training and in evaluation
        around = self.padding
        if any(around):
            images = jnp.pad(images, ((0, 0), around, around, (0, 0)))
        return self.patch_embed(images)

    @also_empty
    def __call__(self, images: Array, *, train: bool = False) -> Output:
        """Classifies images.

        Args:
          images: [B, H, W, 3] float32 images, normalized with `mean` and `std`; H and W are whole
            numbers of patches, or those of a training image if `fixed_grid_size` is set.
          train: Whether stochastic depth is on (rng stream "dropout").
        """
        self.check_shape(images)
        return self.forward_tokens(self.embed(images, train=train), train=train)

    def check_shape(self, images: Array) -> None:
        """Raises ValueError unless the model takes images of this shape."""
        vit_checks.check_images(images, self.patch_size if self.fixed_grid_size is None else 1)
        if self.fixed_grid_size is not None and images.shape[1:] != self.image_shape:
            height, width, _ = self.image_shape
            raise ValueError(
                f"With fixed_grid_size={self.grid_size} images must be {height} x {width} px, not "
                f"{images.shape[1]} x {images.shape[2]}; resize them."
            )

    def forward_tokens(self, grid_tokens: Array, *, train: bool) -> Output:
        """Classifies images from their embedded patches [B, h, w, D]."""
        batch, *size, width = grid_tokens.shape
        x = self.with_prefix(grid_tokens.reshape(batch, -1, width))
        encoded = self.forward_features(x, train=train, size=(size[0], size[1]))
        areas = None
        if self.pool == "mean" or not self.num_classes:
            x, alive = encoded.unmerge(), encoded.alive
            areas = None if alive is None else alive[:, self.prefix_length :].astype(jnp.float32)
        else:
            x = encoded.tokens
        logits, distilled = self.forward_head(x, train=train, areas=areas)
        return Output(
            logits=logits,
            tokens=jnp.full((batch,), size[0] * size[1], jnp.int32),
            distilled_logits=distilled,
            merge_positions=patch_positions(encoded, self.prefix_length),
            merge_targets=patch_targets(encoded.targets, self.prefix_length),
            features=None if self.num_classes else self.features(x, tuple(size)),
        )
