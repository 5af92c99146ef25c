"""Checks of a vision transformer's attributes and of the images that it is given."""

from typing import Any

from jax import Array

from msvit_jax.errors import check_choice
from msvit_jax.image_size import is_square
from msvit_jax.models.attention import IMPLEMENTATIONS
from msvit_jax.models.block import GELUS
from msvit_jax.models.embedding import POSITIONS
from msvit_jax.models.reduction import UNMERGE
from msvit_jax.tokens import grid

# No attention spans more; a description that asks for it is damaged.
_MOST_PATCHES = 2**20


def check_attributes(vit: Any) -> None:
    """Raises ValueError for attributes that do not fit together."""
    if vit.num_classes < 0:
        raise ValueError(
            f"num_classes={vit.num_classes} is negative; use 0 for a feature extractor."
        )
    check_choice("pos_resize", vit.pos_resize, grid.RESIZINGS)
    if not int(vit.mlp_ratio * vit.width):
        raise ValueError(
            f"mlp_ratio={vit.mlp_ratio} with width={vit.width} makes MLPs without channels."
        )
    if vit.heads < 1 or vit.width % vit.heads:
        raise ValueError(f"width={vit.width} is not divisible by heads={vit.heads}.")
    check_choice("pool", vit.pool, ("token", "mean"))
    if vit.pool == "token" and not vit.class_token:
        raise ValueError("pool='token' needs class_token=True; use pool='mean' without one.")
    check_choice("attention_impl", vit.attention_impl, IMPLEMENTATIONS)
    check_choice("pos_init", vit.pos_init, POSITIONS)
    if vit.pos_init == "sincos" and vit.width % 4:
        raise ValueError(f"pos_init='sincos' needs a width divisible by 4, not {vit.width}.")
    check_choice("gelu", vit.gelu, GELUS)
    if vit.distilled and vit.pool != "token":
        raise ValueError("distilled=True needs pool='token'.")
    check_choice("unmerge", vit.unmerge, UNMERGE)
    specs = vit.reductions
    if specs and vit.scan_layers:
        raise ValueError(
            f"reducer={vit.reducer!r} needs scan_layers=False: layers differ in length."
        )


def check_grid(vit: Any) -> None:
    """Raises ValueError unless the images divide into the grid's patches."""
    if vit.fixed_grid_size is not None:
        check_square(vit, f"fixed_grid_size={vit.fixed_grid_size}, as in a cascade's stages,")
    else:
        check_divisible(vit)
    if vit.max_tokens > _MOST_PATCHES:
        raise ValueError(
            f"image_size={vit.image_size} makes {vit.max_tokens:,} patches of an image; "
            f"{_MOST_PATCHES:,} are the most that is sensible."
        )
    if vit.fixed_grid_size is not None and not 1 <= vit.fixed_grid_size <= vit.image_shape[0]:
        raise ValueError(
            f"fixed_grid_size={vit.grid_size} is not from 1 to image_size={vit.image_size}."
        )
    if vit.padding[1] >= vit.effective_patch_size:
        raise ValueError(
            f"fixed_grid_size={vit.grid_size} does not fit an image of {vit.image_size} px: "
            f"patches of {vit.effective_patch_size} px reach {sum(vit.padding)} px beyond "
            "it, so some would lie outside. Use another fixed_grid_size or image_size."
        )


def check_divisible(vit: Any) -> None:
    """Raises ValueError unless both sides of the images are whole numbers of patches."""
    if any(side % vit.patch_size for side in vit.image_shape[:2]):
        raise ValueError(
            f"image_size={vit.image_size} is not divisible by patch_size={vit.patch_size}."
        )


def check_square(vit: Any, maker: str) -> None:
    """Raises ValueError for images that are rectangles; `maker` names what makes square grids."""
    if not is_square(vit.image_size):
        raise ValueError(
            f"{maker} makes square grids of square images; image_size={vit.image_size} is a "
            "rectangle. Give one number, or use a model such as vit or msvit."
        )


def check_images(images: Array, multiple: int) -> None:
    """Raises ValueError unless images are [B, H, W, 3], H and W divisible by `multiple`."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"Images must be [batch, height, width, 3], got shape {tuple(images.shape)}; "
            "convert gray or RGBA images to RGB and add a batch axis to a single one."
        )
    height, width = images.shape[1:3]
    if height % multiple or width % multiple:
        raise ValueError(
            f"An image of {height} x {width} px does not divide into patches of {multiple} px; "
            f"resize it to a multiple of {multiple}."
        )
