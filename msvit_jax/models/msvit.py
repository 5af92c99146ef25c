"""MSViT: a vision transformer on mixed-scale tokens (Havtorn et al. 2023, arXiv 2307.02321).

The paper masks a sequence of all coarse and all fine tokens (49 + 196 at 224 px). Here tokens are
in slots (see `tokens.grid`), as many as the fine grid has cells, with the same output: our
reconstruction. Where the paper leaves a choice open, the attribute's docstring says so.
"""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from numpy.typing import ArrayLike

from msvit_jax import flops
from msvit_jax.errors import check_choice
from msvit_jax.models import gate as gates
from msvit_jax.models import layout as layouts
from msvit_jax.models.attention import Mask
from msvit_jax.models.backbone_mixin import BackboneMixin
from msvit_jax.models.embedding import PatchEmbed
from msvit_jax.models.encoded import patch_positions, patch_targets
from msvit_jax.models.output import Features, GateOutput, Output, also_empty
from msvit_jax.models.vit import ViT
from msvit_jax.models.vit_checks import check_images
from msvit_jax.tokens import alternatives, grid, packing

COARSE_EMBEDDINGS = ("shared", "mean", "separate")


class CoarseResidual(nn.Module):
    """APT's residual: a zero-initialized projection of a 2x2 convolution of the fine tokens."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, fine: Array) -> Array:
        """Maps a region's fine tokens [B, R, 4, D] to a residual for its coarse token [B, R, D]."""
        mixed = nn.DenseGeneral(self.width, axis=(-2, -1), dtype=self.dtype, name="conv")(fine)
        zeros = nn.initializers.zeros
        return nn.Dense(self.width, kernel_init=zeros, dtype=self.dtype, name="proj")(mixed)


class MSViT(BackboneMixin, nn.Module):
    """A mixed-scale vision transformer over any `ViT`.

    Attributes:
      backbone: Transformer on the tokens; its patch size is the fine scale, twice that the coarse
        one.
      gate: Kind of the gate: "mlp" (learned), or one that learns nothing, listed in
        `gate.untrained_logits`.
      gate_hidden: Hidden width of the learned gate; None for the backbone's width (fits the
        published MACs).
      gate_bias: Initial bias of the learned gate's logits, toward coarse as in the paper (value:
        ours). Below 0 the gate starts fine.
      temperature: Temperature of the Gumbel-sigmoid in training (not published; 2/3 is batch
        shaping's custom).
      threshold: Probability of coarse above which a region is coarse in evaluation.
      fine_share: Share of each image's regions that is fine, in training and evaluation; None if
        the gate decides it.
      coarse_embedding: Embedding of coarse tokens: "shared" (the patch embedding of the 2x-pooled
        image, as in the paper), "mean" (the mean of the region's fine embeddings; our addition) or
        "separate" (an embedding of its own for the full-resolution coarse patch, which starts equal
        to "shared" where a model starts from a dense one).
      scale_embedding: Whether a learned embedding of the scale is added, starting at zero.
      coarse_residual: Whether APT's zero-initialized residual of the region's fine tokens is added.
      layout: Layout of tokens in memory, "slots", "budget", "trimmed" or "rows": the same logits at
        different cost (see `models.layout`).
      token_capacity: Capacity for each image's active patch tokens ("budget", "trimmed"); several
        capacities are for equal parts of the batch sorted by token count. None, for "trimmed": room
        for all tokens of both scales, until the trainer's schedule gives less.
      rows: Number of rows that the whole batch is packed into ("rows").
      row_width: Capacity of a row in tokens, prefix included ("rows").
      row_groups: Number of equal parts of the batch that are packed on their own: a multiple of the
        number of devices it is spread over, so that no token leaves its device.
      hold_level: Whether, in training, the gate learns which regions are fine but not how many (see
        `gate.hold_level`); set by a trainer that corrects the share itself.
      gate_gradient: Factor of the task's gradient to the gate in training. At 0 the tokens that a
        gate learns from are left out; set by a trainer that carries them in some steps only.
    """

    backbone: ViT
    gate: str = "mlp"
    gate_hidden: int | None = None
    gate_bias: float = 2.0
    temperature: float = 2 / 3
    threshold: float = 0.5
    fine_share: float | None = None
    coarse_embedding: str = "shared"
    scale_embedding: bool = False
    coarse_residual: bool = False
    layout: str = "slots"
    token_capacity: int | tuple[int, ...] | None = None
    rows: int | None = None
    row_width: int | None = None
    row_groups: int = 1
    hold_level: bool = False
    gate_gradient: float = 1.0

    def setup(self) -> None:
        """Makes the submodules and parameters."""
        self.check()
        vit = self.backbone
        if self.gate == "mlp":
            self.gate_mlp = gates.GateMLP(
                self._gate_hidden, self.region_grid, self.gate_bias, vit.dtype
            )
        if self.coarse_embedding == "separate":
            self.coarse_embed = PatchEmbed(vit.width, self.coarse_size, vit.dtype)
        if self.scale_embedding:
            self.scale_embed = self.param("scale_embed", nn.initializers.zeros, (2, vit.width))
        if self.coarse_residual:
            self.residual = CoarseResidual(vit.width, vit.dtype)

    def check(self) -> None:
        """Raises ValueError for attributes that do not fit together."""
        check_choice("gate", self.gate, gates.GATES)
        check_choice("coarse_embedding", self.coarse_embedding, COARSE_EMBEDDINGS)
        if self.fine_share is not None and not 0 <= self.fine_share <= 1:
            raise ValueError(f"fine_share={self.fine_share} is not between 0 and 1.")
        if any(side % self.coarse_size for side in self.image_shape[:2]):
            raise ValueError(
                f"image_size={self.image_size} is not divisible by the coarse patch of "
                f"{self.coarse_size} px (twice patch_size={self.patch_size})."
            )
        if any(spec.make().needs_grid for spec in self.backbone.reductions.values()):
            raise ValueError(
                f"reducer={self.backbone.reducer!r} merges squares of a whole grid, which the gate "
                "does already for mixed-scale tokens: use reducer='tome' with reduce_layers=, or "
                "keep=(1.0, KEEP) for its later layers alone."
            )
        self.check_layout()

    def check_layout(self) -> None:
        """Raises ValueError for a layout whose sizes do not fit the model."""
        regions = self.num_regions
        most = self.max_capacity if self.layout == "trimmed" else grid.REGION**2 * regions
        self.packing_layout.check(
            num_slots=most, smallest=regions, prefix=self.backbone.prefix_length
        )

    @property
    def packing_layout(self) -> layouts.Layout:
        """The layout with all its sizes."""
        token_capacity = (
            (self.token_capacity,)
            if isinstance(self.token_capacity, int)
            else tuple(self.token_capacity or ())
        )
        if self.layout == "trimmed" and not token_capacity:
            token_capacity = (self.max_capacity,)
        return layouts.Layout(
            self.layout, token_capacity, self.rows or 0, self.row_width or 0, self.row_groups
        )

    @property
    def max_capacity(self) -> int:
        """Number of patch tokens of both scales together, the most that training a gate can use."""
        regions = self.num_regions
        return (grid.REGION**2 + 1) * regions

    @property
    def coarse_size(self) -> int:
        """Side of a coarse patch in px."""
        return grid.REGION * self.backbone.patch_size

    @property
    def side_multiple(self) -> int:
        """Number of px that both sides of an image must be a multiple of: a coarse patch."""
        return self.coarse_size

    @property
    def region_grid(self) -> tuple[int, int]:
        """(rows, columns) of regions in a training image."""
        height, width, _ = self.image_shape
        return height // self.coarse_size, width // self.coarse_size

    @property
    def has_threshold(self) -> bool:
        """Whether the gate decides by a threshold instead of a fixed share."""
        return self.fine_share is None

    def with_dense_layout(self) -> Self:
        """Returns a copy whose layout has room for every image."""
        return self.clone(layout="slots")

    @property
    def _gate_hidden(self) -> int:
        return self.gate_hidden or self.backbone.width

    def macs(self, tokens: ArrayLike) -> np.ndarray:
        """Counts multiply-accumulates for images with the given numbers of active patch tokens.

        Counts the gate, both patch embeddings over the whole image, and the blocks over active
        tokens. This is what the layouts "budget" and "rows" compute, apart from padding.
        """
        vit = self.backbone
        regions = self.num_regions
        pixels = 3 * self.patch_size**2
        if self.coarse_embedding == "separate":
            pixels = 3 * self.coarse_size**2
        elif self.coarse_embedding == "mean":
            pixels = 0
        extra = float(flops.dense(regions, pixels, vit.width))
        if self.gate == "mlp":
            extra += gates.mlp_macs(regions, self.coarse_size, self._gate_hidden)
        if self.coarse_residual:
            extra += float(flops.dense(regions, grid.REGION**2 * vit.width, vit.width))
            extra += float(flops.dense(regions, vit.width, vit.width))
        return vit.macs(tokens) + extra

    def gate_logits(self, images: Array) -> Array:
        """Computes noise-free logits of staying coarse: [B, H, W, 3] normalized -> [B, R]."""
        regions = grid.patches(images, self.coarse_size)
        if self.gate == "mlp":
            return self.gate_mlp(regions)
        shape = (1,) * (regions.ndim - 1) + (3,)
        mean, std = (jnp.asarray(x, regions.dtype).reshape(shape) for x in (self.mean, self.std))
        return gates.untrained_logits(self.gate, regions * std + mean)

    def _decisions(
        self, logits: Array, train: bool, threshold: float | Array | None
    ) -> gates.Decisions:
        if self.fine_share is not None:
            return gates.finest(logits, self.fine_share)
        if train and self.gate == "mlp":
            return gates.sample(logits, self.make_rng("gate"), self.temperature)
        return gates.threshold_decisions(
            logits, threshold=self.threshold if threshold is None else threshold
        )

    def embed_scales(self, images: Array) -> tuple[Array, Array]:
        """Embeds both scales, with positions: fine [B, R, 4, D] and coarse [B, R, D]."""
        vit = self.backbone
        fine = vit.patch_embed(images)
        positions = vit.positions((fine.shape[1], fine.shape[2])).astype(fine.dtype)
        if self.coarse_embedding == "shared":
            coarse = vit.patch_embed(grid.pool(images))
        elif self.coarse_embedding == "mean":
            coarse = grid.pool(fine)
        else:
            coarse = self.coarse_embed(images)
        fine = grid.to_regions(fine + positions[None])
        coarse = grid.to_regions(coarse + grid.pool(positions)[None], 1)[:, :, 0]
        if self.coarse_residual:
            coarse = coarse + self.residual(fine)
        if self.scale_embedding:
            scale = self.scale_embed.astype(fine.dtype)
            fine, coarse = fine + scale[None, None, :1], coarse + scale[None, 1:]
        return fine, coarse

    def gate_only(self, images: Array, *, threshold: float | Array | None = None) -> GateOutput:
        """Decides as in evaluation, without running the transformer; arguments as in `__call__`."""
        check_images(images, self.coarse_size)
        logits = self.gate_logits(images)
        return GateOutput(logits=logits, coarse=self._decisions(logits, False, threshold).coarse)

    @also_empty
    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        threshold: float | Array | None = None,
        coarse: Array | None = None,
    ) -> Output:
        """Classifies images.

        Args:
          images: [B, H, W, 3] float32 images, normalized; H and W are divisible by the coarse
            patch.
          train: Whether decisions are sampled (rng stream "gate") and stochastic depth is on
            ("dropout").
          threshold: Threshold used in evaluation instead of the module's own; may be traced.
          coarse: [B, R] decisions used instead of the gate's, 1 = coarse. In training gradient
            reaches them, and the gate gets the gradient that they would have passed on to it.
        """
        check_images(images, self.coarse_size)
        logits = self.gate_logits(images)
        if train and self.hold_level:
            logits = gates.hold_level(logits)
        if coarse is not None and coarse.shape != logits.shape:
            raise ValueError(f"coarse has shape {coarse.shape}; the regions are {logits.shape}.")
        if coarse is None:
            decisions = self._decisions(logits, train, threshold)
        elif train:
            decisions = gates.given(coarse, logits)
        else:
            decisions = gates.Decisions(coarse, jnp.zeros_like(logits))
        coarse = decisions.coarse
        vit, both = self.backbone, self._carries_both(train)
        layout = self._layout_of(both)
        runs, carried = None, None
        if layout.kind != "slots":
            regions = grid.REGION**2 * logits.shape[1]
            lengths = vit.prefix_length + regions - (grid.REGION**2 - 1) * (coarse > 0.5).sum(1)
            runs = layouts.make_runs(lengths, layout)
            if both:
                room = runs.room.reshape(-1) - lengths
                carried = self._alternatives(decisions, room)
                coarse = gates.scaled_gradient(coarse, self.gate_gradient * carried)
        embedded = self.embed_scales(images)
        tokens, weights, areas = self._tokens(embedded, coarse, both)
        # What a coarse region's cells have beyond its token is added before the last norm.
        fine, of_region = embedded
        own = fine - of_region[:, :, None] if vit.keeps_own_features else None
        merge_positions, within_capacity = None, None
        if runs is None:
            mask = Mask(weights=weights)
            encoded = vit.forward_features(tokens, train=train, mask=mask, normalize=own is None)
            merge_positions = patch_positions(encoded, vit.prefix_length)
            x = encoded.unmerge() if self._all_tokens else encoded.tokens
            alive, merge_targets = encoded.alive, encoded.targets
        else:
            x, alive, within_capacity, merge_targets = self._encode_packed(
                tokens, weights, layout, runs, carried, train
            )
        active = weights > 0.5
        if within_capacity is not None:
            active &= within_capacity[:, None]
        merge_targets = tuple(jnp.where(active, target, -1) for target in merge_targets)
        if alive is not None and vit.pool == "mean":
            areas = areas * alive[:, vit.prefix_length :].astype(areas.dtype)
        normed = x if own is None else vit.norm(x)
        class_logits, distilled = vit.forward_head(normed, train=train, areas=areas)
        counts = jnp.round(weights.sum(axis=1)).astype(jnp.int32) - vit.prefix_length
        return Output(
            logits=_only_fitting(class_logits, within_capacity),
            tokens=counts,
            gate=GateOutput(logits=logits, coarse=coarse),
            distilled_logits=None
            if distilled is None
            else _only_fitting(distilled, within_capacity),
            within_capacity=within_capacity,
            # Where tokens of both scales are carried, token indices are not slot indices.
            merge_positions=None if both else merge_positions,
            merge_targets=None if both else patch_targets(merge_targets, vit.prefix_length),
            features=self._features(x, normed, own, coarse, images, within_capacity, both, alive),
        )

    @property
    def _all_tokens(self) -> bool:
        """Whether the answer needs more tokens than the prefix."""
        return self.backbone.pool == "mean" or not self.num_classes

    def _features(
        self,
        x: Array,
        normed: Array,
        own: Array | None,
        coarse: Array,
        images: Array,
        within_capacity: Array | None,
        both: bool,
        alive: Array | None,
    ) -> Features | None:
        if self.num_classes:
            return None
        prefix = self.backbone.prefix_length
        region_grid = (images.shape[1] // self.coarse_size, images.shape[2] // self.coarse_size)
        tokens = x[:, prefix:].reshape(*coarse.shape, -1, x.shape[-1])
        if both:
            if alive is not None:  # what a reduced token would have become is not known
                known = alive[:, prefix:].reshape(*coarse.shape, -1) > 0.5
                coarse = gates.scaled_gradient(coarse, known.all(axis=2).astype(coarse.dtype))
            patches = grid.both_to_map(tokens, coarse, region_grid)
        else:
            patches = grid.slots_to_map(tokens, coarse, region_grid)
        if own is not None:
            gained = grid.from_regions(
                coarse[:, :, None, None].astype(own.dtype) * own, region_grid
            )
            patches = self.backbone.norm(patches + gained)
        token = _only_fitting(normed[:, 0], within_capacity) if self.backbone.class_token else None
        if within_capacity is not None:
            patches = jnp.where(within_capacity[:, None, None, None], patches, jnp.nan)
        return Features(patches, token)

    def _carries_both(self, train: bool) -> bool:
        """Tells whether tokens of both scales are carried because a gate learns from them."""
        learns = self.gate == "mlp" and self.gate_gradient > 0
        return train and learns and self.layout in ("slots", "trimmed")

    def _layout_of(self, both: bool) -> layouts.Layout:
        """Returns the layout with its prefix; without a learning gate, trimmed becomes "budget"."""
        layout = self.packing_layout
        if layout.kind == "trimmed" and not both:
            layout = dataclasses.replace(layout, kind="budget")
        prefix = self.backbone.prefix_length
        return dataclasses.replace(
            layout, token_capacity=tuple(prefix + b for b in layout.token_capacity)
        )

    def _alternatives(self, decisions: gates.Decisions, room: Array) -> Array:
        """Returns regions' gradient factors, 0 where the other scale's tokens find no room."""
        return alternatives.nearest(decisions.coarse, decisions.slope, room)

    def _tokens(
        self, embedded: tuple[Array, Array], coarse: Array, both: bool
    ) -> tuple[Array, Array, Array]:
        """Returns prefix and patch tokens [B, P + N, D], weights [B, P + N] and areas [B, N]."""
        fine, of_region = embedded
        if both:
            x, weights = grid.both_scales(fine, of_region), grid.both_weights(coarse)
            areas = grid.both_areas(coarse)
        else:
            x, weights = grid.fill_slots(fine, of_region, coarse), grid.slot_weights(coarse)
            areas = grid.slot_areas(coarse)
        batch, _, _, width = x.shape
        tokens = self.backbone.with_prefix(x.reshape(batch, -1, width))
        seen = jnp.ones((batch, self.backbone.prefix_length), coarse.dtype)
        weights = jnp.concatenate([seen, weights.reshape(batch, -1)], axis=1)
        return tokens, weights, areas.reshape(batch, -1)

    def _encode_packed(
        self,
        tokens: Array,
        weights: Array,
        layout: layouts.Layout,
        runs: packing.Runs,
        carried: Array | None,
        train: bool,
    ) -> tuple[Array, Array | None, Array, tuple[Array, ...]]:
        """Encodes tokens in a packed layout.

        Returns the tokens that `ViT.forward_head` needs, whether each of them was not dropped,
        whether each image fits [B], and merge targets as indices of the image's tokens [B, P + N].
        """
        prefix, active = self.backbone.prefix_length, weights > 0.5
        gated: dict[str, Any] = {}
        if carried is not None:
            extra = jnp.repeat(carried > 0, grid.REGION**2 + 1, axis=1)
            extra = jnp.pad(extra, ((0, 0), (prefix, 0))) & ~active
            gated = {"weights": weights, "extra": extra}
        shortest = prefix + self.num_regions
        packed = layouts.pack(tokens, active, layout, runs, shortest=shortest, **gated)
        normalize = not self.backbone.keeps_own_features
        encoded = self.backbone.forward_features(
            packed.tokens, train=train, mask=packed.mask, normalize=normalize
        )
        needed = None if self._all_tokens else prefix
        alive = encoded.alive
        if alive is not None:
            alive = packed.restore(alive[..., None].astype(jnp.float32), count=needed)[..., 0]
        merge_targets = tuple(packed.named(target) for target in encoded.targets)
        return (
            packed.restore(encoded.unmerge(), count=needed),
            alive,
            packed.packing.within_capacity,
            merge_targets,
        )


def _only_fitting(logits: Array, within_capacity: Array | None) -> Array:
    """Sets the answers of images that do not fit to NaN, so that using one is noticed."""
    if within_capacity is None:
        return logits
    return jnp.where(within_capacity[:, None], logits, jnp.nan)
