"""Segmenter: semantic segmentation with a transformer (Strudel et al. 2021, arXiv 2105.05633).

The encoder is any transformer of the library without a head. What it answers with is a dense map on
the fine grid, whatever its tokens were: coarse tokens are repeated over their cells (MSViT, dense
prediction) and merged ones put back, so the decoders know nothing of either.

A decoder knows no positions, so cells that hold the same token get the same logits. With
`decode="mixed"` it therefore sees each token once, and counts it as often in attention as there are
cells that hold it: the same logits, for fewer tokens.
"""

from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from numpy.typing import ArrayLike

from msvit_jax import flops
from msvit_jax.errors import check_choice
from msvit_jax.models import shared_tokens
from msvit_jax.models.attention import Mask
from msvit_jax.models.backbone_mixin import BackboneMixin
from msvit_jax.models.block import Block, LayerNorm, init_weights
from msvit_jax.models.interface import SEGMENTATION
from msvit_jax.models.layout import Layout
from msvit_jax.models.output import GateOutput, Output, also_empty

DECODERS = ("linear", "mask")
DECODES = ("dense", "mixed")
_HEAD_WIDTH = 64  # channels of one attention head of the mask transformer
_TINY = 1e-12  # keeps the direction of a patch that was dropped, which is zero, finite


class LinearDecoder(nn.Module):
    """One linear layer, patch by patch."""

    classes: int

    @nn.compact
    def __call__(self, tokens: Array, sizes: Array | None = None, *, train: bool) -> Array:
        """Computes logits: [B, N, D] -> [B, N, classes] float32; sizes change nothing."""
        del sizes, train
        head = nn.Dense(self.classes, kernel_init=init_weights, name="head")
        return head(tokens.astype(jnp.float32))

    def macs(self, tokens: np.ndarray, width: int) -> np.ndarray:
        """Counts multiply-accumulates for images of so many tokens."""
        return flops.dense(tokens, width, self.classes)


class MaskTransformer(nn.Module):
    """Class embeddings that attend to the patches; a class's mask is its similarity to each patch.

    Attributes:
      classes: Number of classes.
      width: Number of channels, those of the encoder.
      depth: Number of transformer blocks.
      heads: Number of attention heads.
      drop_path: Stochastic depth's rate in the last block; it rises linearly from 0.
      dtype: Compute dtype of the blocks.
      attention_impl: Implementation of attention.
    """

    classes: int
    width: int
    depth: int = 2
    heads: int = 6
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    attention_impl: str = "auto"

    def setup(self) -> None:
        """Makes the submodules and parameters."""
        width, scale = self.width, self.width**-0.5
        self.proj_dec = nn.Dense(width, kernel_init=init_weights, dtype=self.dtype)
        self.class_embed = self.param("class_embed", init_weights, (self.classes, width))
        self.layers = [
            Block(
                width,
                self.heads,
                4 * width,
                norm_epsilon=1e-5,
                attention_impl=self.attention_impl,
                dtype=self.dtype,
            )
            for _ in range(self.depth)
        ]
        self.norm = LayerNorm(epsilon=1e-5)
        start = nn.initializers.normal(scale)
        self.proj_patch = nn.Dense(width, use_bias=False, kernel_init=start)
        self.proj_class = nn.Dense(width, use_bias=False, kernel_init=start)
        self.mask_norm = LayerNorm(epsilon=1e-5)

    def __call__(self, tokens: Array, sizes: Array | None = None, *, train: bool) -> Array:
        """Computes logits.

        Args:
          tokens: [B, N, D] tokens of patches.
          sizes: [B, N] float32, number of patches that hold each token, 0 for an empty position;
            None for one each.
          train: Whether stochastic depth is on (rng stream "dropout").

        Returns:
          [B, N, classes] float32.
        """
        x = self.proj_dec(tokens)
        classes = jnp.broadcast_to(self.class_embed[None], (x.shape[0], *self.class_embed.shape))
        x = jnp.concatenate([x, classes.astype(x.dtype)], axis=1)
        mask = None
        if sizes is not None:
            sizes = jnp.pad(sizes, ((0, 0), (0, self.classes)), constant_values=1)
            mask = Mask(weights=(sizes > 0).astype(jnp.float32), sizes=sizes)
        rates = jnp.linspace(0.0, self.drop_path, self.depth, dtype=jnp.float32)
        for layer, block in enumerate(self.layers):
            x = block(x, rates[layer] if train and self.drop_path else None, mask)
        x = self.norm(x).astype(jnp.float32)
        cells = _direction(self.proj_patch(x[:, : -self.classes]))
        classes = _direction(self.proj_class(x[:, -self.classes :]))
        return self.mask_norm(jnp.einsum("bnd,bcd->bnc", cells, classes))

    def macs(self, tokens: np.ndarray, width: int) -> np.ndarray:
        """Counts multiply-accumulates for images of so many tokens."""
        length = tokens + self.classes
        blocks = self.depth * flops.block(length, width, 4 * width)
        projections = flops.dense(tokens + length, width, width)
        return blocks + projections + flops.dense(tokens, width, self.classes)


def _direction(x: Array) -> Array:
    """Normalizes the last axis to length 1; zero stays zero."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _TINY)


class Segmenter(BackboneMixin, nn.Module):
    """An encoder and a decoder that gives every patch a class.

    Parameters of the encoder have the names that they have without a decoder, so that weights of a
    classifier fit; those of the decoder are below `decoder`.

    Attributes:
      encoder: Model without a head (`num_classes=0`): a `ViT`, `MSViT` or `Mergence`.
      num_classes: Number of classes of the pixels.
      decoder: Kind of the decoder, "linear" or "mask".
      decoder_depth: Number of blocks of the mask transformer.
      decoder_heads: Number of heads of the mask transformer; None for one per 64 channels, at least
        one.
      decoder_drop_path: Stochastic depth's rate in the mask transformer's last block.
      decode: Tokens that the decoder sees: "dense" (one for each patch) or "mixed" (those that the
        encoder ends with, for the same logits up to rounding). In training a gate it is "dense":
        there the gate learns from what its cells would become.
    """

    encoder: Any
    num_classes: int = 150
    decoder: str = "mask"
    decoder_depth: int = 2
    decoder_heads: int | None = None
    decoder_drop_path: float = 0.0
    decode: str = "dense"

    task = SEGMENTATION

    def setup(self) -> None:
        """Makes the submodules."""
        self.check()
        nn.share_scope(self, self.encoder)
        self.decoding = self._decoder(name="decoder")

    def _decoder(self, **named: Any) -> LinearDecoder | MaskTransformer:
        if self.decoder == "linear":
            return LinearDecoder(self.num_classes, **named)
        vit = self.backbone
        return MaskTransformer(
            self.num_classes,
            vit.width,
            depth=self.decoder_depth,
            heads=self._heads,
            drop_path=self.decoder_drop_path,
            dtype=vit.dtype,
            attention_impl=vit.attention_impl,
            **named,
        )

    @property
    def _heads(self) -> int:
        return self.decoder_heads or max(1, self.backbone.width // _HEAD_WIDTH)

    def check(self) -> None:
        """Raises ValueError for attributes that do not fit together."""
        check_choice("decoder", self.decoder, DECODERS)
        check_choice("decode", self.decode, DECODES)
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes}; segmentation needs a class.")
        if self.encoder.num_classes:
            raise ValueError("A segmenter's encoder has no head: make it with num_classes=0.")
        if self.decoder == "mask" and self.backbone.width % self._heads:
            raise ValueError(
                f"width={self.backbone.width} is not divisible by decoder_heads={self._heads}."
            )
        vit = self.backbone
        if self.decode == "mixed" and vit.unmerge != "copy":
            raise ValueError(
                "decode='mixed' gives patches that share a token the same answer; with "
                "unmerge='residual' each has features of its own. Use decode='dense', or "
                "unmerge='copy'."
            )
        if self.decode == "mixed" and vit.attention_impl not in ("auto", "xla"):
            raise ValueError(
                "decode='mixed' needs attention that counts tokens by their cells; attention_impl="
                f"{vit.attention_impl!r} cannot. Use 'auto' or 'xla'."
            )

    @property
    def backbone(self) -> Any:  # type: ignore[override]
        """The plain transformer of the encoder."""
        return self.encoder.backbone

    def clone(self, **changes: Any) -> Self:
        """Returns a copy with changed attributes, of its own or of the encoder."""
        own = {*self.__dataclass_fields__, "parent", "name", "_deep_clone", "_reset_names"}
        inner = {key: value for key, value in changes.items() if key not in own}
        outer = {key: value for key, value in changes.items() if key in own}
        if inner:
            outer["encoder"] = outer.get("encoder", self.encoder).clone(**inner)
        return super().clone(**outer)

    def with_backbone(self, **changes: Any) -> Self:
        """Returns a copy, for the same parameters, with changed attributes of the backbone."""
        return self.clone(encoder=self.encoder.with_backbone(**changes))

    def with_dense_layout(self) -> Self:
        """Returns a copy, for the same parameters, whose layout has room for every image."""
        return self.clone(encoder=self.encoder.with_dense_layout())

    # The encoder answers for what it decides: its gate and its layout.

    @property
    def gate(self) -> str | None:  # type: ignore[override]
        """Kind of the encoder's gate; None for an encoder without one."""
        return self.encoder.gate

    @property
    def region_grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the regions that a gate decides on; None without a gate."""
        return self.encoder.region_grid

    @property
    def has_threshold(self) -> bool:
        """Whether the gate decides by a threshold."""
        return self.encoder.has_threshold

    @property
    def threshold(self) -> float:  # type: ignore[override]
        """Probability of coarse above which a region is coarse; unused without a gate."""
        return self.encoder.threshold

    @property
    def layout(self) -> str:  # type: ignore[override]
        """Layout of the encoder's tokens in memory."""
        return self.encoder.layout

    @property
    def token_capacity(self) -> int | tuple[int, ...] | None:  # type: ignore[override]
        """Capacity for each image's tokens; None if the layout has room for all, or sets none."""
        return self.encoder.token_capacity

    @property
    def row_groups(self) -> int:  # type: ignore[override]
        """Number of equal parts of a batch that the layout packs on their own."""
        return self.encoder.row_groups

    @property
    def packing_layout(self) -> Layout:
        """The layout with all its sizes."""
        return self.encoder.packing_layout

    @property
    def max_capacity(self) -> int:
        """Largest number of patch tokens of an image that training can compute."""
        return self.encoder.max_capacity

    def check_layout(self) -> None:
        """Raises ValueError for a layout whose sizes do not fit the model."""
        self.encoder.check_layout()

    @property
    def side_multiple(self) -> int:
        """Number of px that images are padded to a multiple of."""
        return self.encoder.side_multiple

    def macs(self, tokens: ArrayLike) -> np.ndarray:
        """Counts multiply-accumulates for training images with the given numbers of patch tokens.

        With `decode="dense"` the decoder sees the whole grid, whatever the tokens.
        """
        seen: ArrayLike = self.max_tokens
        if self.decode == "mixed":
            seen = self.backbone.final_tokens(tokens)
        decoder = self._decoder(parent=None).macs(np.asarray(seen, float), self.backbone.width)
        return self.encoder.macs(tokens) + decoder

    def gate_only(self, images: Array, *, threshold: float | Array | None = None) -> GateOutput:
        """Decides as in evaluation, without running the transformer; arguments as in `__call__`."""
        return self.encoder.gate_only(self._padded(images), threshold=threshold)

    def _padded(self, images: Array) -> Array:
        """Pads images below and on the right with zeros, as the official code does."""
        beyond = [-side % self.side_multiple for side in images.shape[1:3]]
        if not any(beyond):
            return images
        return jnp.pad(images, ((0, 0), (0, beyond[0]), (0, beyond[1]), (0, 0)))

    @also_empty
    def __call__(self, images: Array, *, train: bool = False, **decided: Any) -> Output:
        """Gives every patch a class.

        Args:
          images: [B, H, W, 3] float32 images, normalized; of any size: padded to a multiple
            of `side_multiple`.
          train: Whether the encoder and the decoder behave as in training.
          **decided: The encoder's `threshold` or `coarse`, where it has a gate.

        Returns:
          The encoder's output, with logits [B, h, w, classes] on the patch grid of the padded
          images; `segmentation.upsample_logits` brings them to the size of the images.
        """
        output = self.encoder(self._padded(images), train=train, **decided)
        patches = output.features.patches
        fits = output.within_capacity
        if fits is not None:
            # NaN would reach the decoder's parameters through a gradient of zero.
            patches = jnp.where(fits[:, None, None, None], patches, jnp.zeros_like(patches))
        logits = self._decode(patches, output, train)
        if fits is not None:
            logits = jnp.where(fits[:, None, None, None], logits, jnp.nan)
        return output.replace(logits=logits, features=None)

    def _decode(self, patches: Array, output: Output, train: bool) -> Array:
        """Computes the logits [B, h, w, classes] of a dense map [B, h, w, D]."""
        batch, rows, columns, width = patches.shape
        holders = None
        if self.decode == "mixed" and not (train and self.has_gate):
            holders = output.holders((rows, columns))
        if holders is None:
            tokens = patches.reshape(batch, rows * columns, width)
            return self.decoding(tokens, train=train).reshape(batch, rows, columns, -1)
        once = shared_tokens.share(patches, holders, self._decoder_capacity(rows * columns))
        return once.to_map(self.decoding(once.x, once.sizes, train=train))

    def _decoder_capacity(self, cells: int) -> int:
        """Largest number of different tokens that an image of so many cells can end with."""
        layout, most = self.packing_layout, cells
        if layout.token_capacity:
            most = min(cells, max(layout.token_capacity))
        reduced = bool(self.backbone.reductions)  # dropped cells share one token more
        return min(cells, int(self.backbone.final_tokens(most)) + reduced)
