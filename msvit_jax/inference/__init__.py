"""Running trained models: any number of images in, answers in the same order out."""

from msvit_jax import extras

with extras.needed("train"):
    from msvit_jax.inference.calibrate import Calibration
    from msvit_jax.inference.predictor import Predictions, Predictor

__all__ = ["Calibration", "Predictions", "Predictor"]
