"""Runs trained models on any number of images; answers keep the order of the images."""

from msvit_jax import extras

with extras.needed("train"):
    from msvit_jax.inference.calibrate import Calibration
    from msvit_jax.inference.predictor import Predictions, Predictor

__all__ = ["Calibration", "Predictions", "Predictor"]
