"""Optional packages: which extra of msvit-jax installs them, and the error when one is missing.

`pip install msvit-jax` installs what models and weights files need: JAX, Flax, NumPy and
safetensors. Everything else belongs to an extra of pyproject.toml.
"""

import contextlib
from collections.abc import Iterator

from msvit_jax.errors import UserError

_DATA = ("absl", "array_record", "grain", "ml_collections", "PIL", "sklearn", "tensorflow_datasets")
_PLOTS = ("matplotlib", "PIL")
_TRAIN = (*_DATA, *_PLOTS, "etils", "optax", "orbax", "scipy", "tensorboardX", "tqdm")
# Top-level modules by the extra that installs them.
MODULES = {
    "data": _DATA,
    "plots": _PLOTS,
    "train": _TRAIN,
    "export": (*_TRAIN, "flatbuffers"),
    "gcs": ("etils", "gcsfs"),
}


class MissingExtraError(UserError, ModuleNotFoundError):
    """An optional package is not installed; the message says how to install it."""

    def __init__(self, module: str, extra: str) -> None:
        """Names the missing top-level module and the extra that installs it."""
        super().__init__(f"{module} is not installed: pip install 'msvit-jax[{extra}]'")
        self.name = module


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
    """Names the extra if an import in the block fails because one of its packages is missing.

    Blocks can be nested; the outermost extra that installs the package is named.

    Args:
      extra: Key of `MODULES`.

    Raises:
      MissingExtraError: A package of the extra is not installed. Other import errors pass through.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in MODULES[extra]:
            raise
        raise MissingExtraError(module, extra) from None
