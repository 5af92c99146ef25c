"""Dense answers: from a patch grid to pixels, from windows to images, and how right they are."""

from msvit_jax.segmentation.colors import palette
from msvit_jax.segmentation.confusion import Confusion
from msvit_jax.segmentation.masks import IGNORED, MaskClasses, to_classes
from msvit_jax.segmentation.upsampling import bilinear, upsample, upsample_logits
from msvit_jax.segmentation.windows import Stitcher, View, Windows

__all__ = [
    "IGNORED",
    "Confusion",
    "MaskClasses",
    "Stitcher",
    "View",
    "Windows",
    "bilinear",
    "palette",
    "to_classes",
    "upsample",
    "upsample_logits",
]
