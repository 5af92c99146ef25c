"""Analytic multiply-accumulates (MACs), and XLA's own count to check them against.

Papers of this field call multiply-accumulates "FLOPs". Matrix products are counted, element-wise
work (softmax, norms, GELU) is not.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from numpy.typing import ArrayLike


class HasMacs(Protocol):
    """A model that knows its own cost."""

    def macs(self, tokens: ArrayLike) -> np.ndarray:
        """Counts multiply-accumulates for images with that many active patch tokens."""
        ...


def dense(rows: ArrayLike, inputs: int, outputs: int) -> Any:
    """Counts MACs of a linear layer over `rows` tokens."""
    return np.asarray(rows, np.float64) * inputs * outputs


def attention(length: ArrayLike, width: int) -> Any:
    """Counts MACs of self-attention with projections over `length` tokens, prefix included."""
    length = np.asarray(length, np.float64)
    return 4 * length * width * width + 2 * length * length * width


def mlp(length: ArrayLike, width: int, hidden: int) -> Any:
    """Counts MACs of one block's MLP over `length` tokens."""
    return 2 * np.asarray(length, np.float64) * width * hidden


def block(length: ArrayLike, width: int, hidden: int) -> Any:
    """Counts MACs of one transformer block over a sequence of `length` tokens, prefix included."""
    return attention(length, width) + mlp(length, width, hidden)


def macs_per_image(model: HasMacs, tokens: ArrayLike) -> np.ndarray:
    """Counts MACs of each image, given its number of active patch tokens: [B] -> [B] float64."""
    return np.asarray(model.macs(tokens), np.float64)


def xla_macs(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns half of the floating-point operations XLA counts in the compiled function.

    Args:
      function: Function that `jax.jit` takes.
      *arguments: Arrays, or their shapes (`jax.ShapeDtypeStruct`).
    """
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return float(analysis["flops"]) / 2
