"""Types of arrays with their shapes, for signatures: `Float[Array, "batch classes"]`.

They are jaxtyping's where it is installed, as for the tests, which check them in every call.
Elsewhere the shape is only there to be read.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array

__all__ = ["AnyArray", "Float", "Int", "Num", "Shaped"]

AnyArray = Array | np.ndarray

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Num, Shaped
else:
    try:
        from jaxtyping import Float, Int, Num, Shaped
    except ModuleNotFoundError:

        class _Unchecked:
            def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
                return array_and_shape[0]

        Float = Int = Num = Shaped = _Unchecked
