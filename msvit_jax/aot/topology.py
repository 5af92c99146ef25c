"""TPU topologies to compile for without TPUs, on any Linux machine that has libtpu."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from msvit_jax.errors import UserError

GIB = 2.0**30
# Read by libtpu when it starts: no metadata server, no lock on chips, no other hosts, no logs. The
# accelerator named here only lets it start; programs are compiled for the requested topology.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
}
_HOST = (2, 2, 1)  # chips per TPU host along each axis; smaller slices have smaller hosts


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
      name: Google's name, in lower case.
      memory: Memory of a chip in GiB; this and the next three are its maker's published figures.
      tflops: Peak of bfloat16 products, in 10^12 floating point operations a second.
      memory_gbps: Bandwidth of the memory, in 10^9 bytes a second.
      link_gbps: Bandwidth to other chips of a slice, all links together, in 10^9 bytes a second.
      axes: Number of axes of a slice.
      example: Example of a topology.
      options: Options for the compiler. For v4 they combine a chip's two cores to one device, as
        JAX does on the machine.
    """

    name: str
    memory: int
    tflops: float
    memory_gbps: float
    link_gbps: float
    axes: int
    example: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32, 275, 1228, 300, 3, "v4:2x2x1", {"chip_config_name": "megacore"}),
        Chip("v5e", 16, 197, 819, 200, 2, "v5e:2x2"),
        Chip("v5p", 95, 459, 2765, 600, 3, "v5p:2x2x1"),
        Chip("v6e", 32, 918, 1640, 400, 2, "v6e:2x2"),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice to compile for.

    Attributes:
      name: Name as requested, such as 'v5e:16x16'.
      chip: Kind of its chips.
      devices: Devices of the slice, one per chip.
    """

    name: str
    chip: Chip
    devices: list[Any]


def without_a_tpu() -> None:
    """Sets up this process to compile for TPUs without using any; call it before using JAX.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "The TPU compiler, libtpu, is not installed; it needs no TPU. "
            f"Install it with: pip install 'jax[tpu]=={jax.__version__}'"
        )
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    # Programs for absent chips cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)


def find(name: str) -> Topology:
    """Finds a slice by its name.

    Args:
      name: Kind of chip and number of chips along each axis, such as 'v5e:2x2' or 'v4:2x2x4'.

    Raises:
      UserError: The name is not that of a topology; the message shows valid names.
    """
    from jax.experimental import topologies

    chip, sides = _parse(name)
    padded = (*sides, 1)[:3]
    bounds = tuple(min(side, most) for side, most in zip(padded, _HOST, strict=True))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=bounds, **chip.options
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"There is no topology {name!r}: {error} {_forms()}") from error
    return Topology(name, chip, list(found.devices))


def _parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Splits a name such as 'v5e:2x2' into the kind of chip and the sides."""
    kind, _, shape = name.partition(":")
    sides = (
        tuple(int(side) for side in shape.split("x")) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    )
    chip = CHIPS.get(kind)
    if chip is None or len(sides) != chip.axes or 0 in sides:
        raise UserError(f"Unknown topology {name!r}. {_forms()}")
    return chip, sides


def _forms() -> str:
    examples = ", ".join(chip.example for chip in CHIPS.values())
    return (
        f"Write <chip>:<chips along each axis>, e.g. v5e:16x16, v5e:1x1, {examples}; "
        "v5e and v6e have two axes, v4 and v5p three."
    )
