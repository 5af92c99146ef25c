"""Placement of arrays on devices, decided here alone: a mesh with axes `data` and `fsdp`.

The batch is cut over both axes. Parameters and optimizer state are copied along `data` and cut
along `fsdp`, each at its largest axis that divides evenly. Where devices lie in several slices of a
TPU, `data` is the axis that crosses the slow network between them, and `fsdp` stays within a slice.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from msvit_jax.errors import UserError
from msvit_jax.tree import flat_names

BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices as data x fsdp; -1 takes what the other leaves.

    Args:
      data: Number of devices along the axis that copies parameters.
      fsdp: Number of devices along the axis that cuts them.
      devices: Devices to use; None for all devices of all processes.

    Raises:
      UserError: The axes do not multiply to the number of devices, or cut parameters across slices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if data == -1:
        data = count // max(fsdp, 1)
    elif fsdp == -1:
        fsdp = count // max(data, 1)
    if data < 1 or fsdp < 1 or data * fsdp != count:
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} does not use the {count} devices there are; "
            "set one of the two to -1, and the other to a divisor of that number."
        )
    auto = (AxisType.Auto,) * 2
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        return Mesh(across_slices(devices, slices, data, fsdp), BATCH_AXES, axis_types=auto)
    return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=auto, devices=devices)


def across_slices(devices: Sequence[Any], slices: int, data: int, fsdp: int) -> np.ndarray:
    """Arranges devices of several slices as [data, fsdp], each slice in rows of its own.

    Raises:
      UserError: A row would need devices of two slices.
    """
    if data % slices:
        raise UserError(
            f"mesh.fsdp={fsdp} cuts parameters across the {slices} slices there are, over the slow "
            f"network between them; take a divisor of the {len(devices) // slices} devices of one."
        )
    within = (data // slices, fsdp)
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1), devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Cuts the first axis over every device."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Puts the whole array on every device."""
    return NamedSharding(mesh, P())


def put(x: np.ndarray, where: NamedSharding) -> jax.Array:
    """Puts an array that every process has on its devices, without comparing the processes'."""
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def platform() -> str:
    """Platform that what is traced now is meant for: of the mesh entered, or JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def vmem_bytes() -> int:
    """Least bytes of fast memory (VMEM) of the TPU that what is traced now is meant for."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    small = device.device_kind in ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")
    return (16 if small else 64) << 20


def can_map(batch: int) -> bool:
    """Tells whether `map_devices` knows where the rows of a batch are."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    if AxisType.Explicit in mesh.axis_types:
        return False
    return batch % math.prod(mesh.shape[name] for name in _auto_axes(mesh)) == 0


def map_devices(function: Callable[..., Any], shared: bool = False) -> Callable[..., Any]:
    """Lets each device compute a function of its own rows of all arguments.

    XLA cannot cut a kernel over devices by itself. The devices are those of the mesh that
    `jax.set_mesh` has entered; without a mesh, or under `pmap` or `shard_map`, where a function
    sees the rows of one device anyway, it is returned as it is.

    Args:
      function: Function of arrays [B, ...] to arrays [B, ...] whose rows do not depend on each
        other.
      shared: Whether the function takes one more argument, of which each device has all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else _auto_axes(mesh)
    if not axes:
        return function
    rows = P(axes)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(rows, P()) if shared else rows,
        out_specs=rows,
        axis_names=set(axes),
        check_vma=False,
    )


def _auto_axes(mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in pairs if kind == AxisType.Auto)


def tree_sharding(mesh: Mesh, tree: Any) -> Any:
    """Returns a sharding per leaf of a tree of arrays or shapes, cut along `fsdp` if possible."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, mesh)), tree)


def _spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    parts = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not divisible:
        return P()
    largest = max(divisible, key=lambda axis: shape[axis])
    return P(*(None,) * largest, "fsdp")


def describe(state: Any, params: Any) -> list[str]:
    """Describes how a state is cut: its bytes on a device, and the parameters if any are cut.

    Args:
      state: Arrays or shapes of all that training holds, with shardings of `tree_sharding`.
      params: The parameters among them. Those that differ in a number alone, such as that of a
        layer, share a line.
    """
    total = f"state: {_megabytes(jax.tree.leaves(state))} on each device"
    kinds: dict[tuple[str, Any, Any], list[Any]] = {}
    for name, leaf in flat_names(params).items():
        kind = re.sub(r"\d+", "*", name), leaf.shape, leaf.sharding.spec
        kinds.setdefault(kind, []).append(leaf)
    if all(spec == P() for *_, spec in kinds):
        return [f"{total}, copied"]
    lines = [f"{total}; parameters:"]
    for (name, shape, spec), leaves in kinds.items():
        cut = f"axis {spec.index('fsdp')} cut" if "fsdp" in spec else "copied"
        lines.append(
            f"  {name}: {len(leaves)} x {list(shape)}, {cut}, {_megabytes(leaves)} on each device"
        )
    return lines


def _device_bytes(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    dtype = leaf.dtype
    return math.prod(shape) * (dtype.itemsize if isinstance(dtype, np.dtype) else 8)  # a key


def _megabytes(leaves: Iterable[Any]) -> str:
    return f"{sum(map(_device_bytes, leaves)) / 1e6:.3g} MB"


def check_batch(
    batch_size: int, mesh: Mesh, name: str = "batch_size", microbatches: int = 1
) -> None:
    """Checks that a global batch can be cut over the devices.

    Raises:
      UserError: It cannot; the message names sizes that can.
    """
    unit = mesh.size * microbatches
    if batch_size < 1 or batch_size % unit:
        lower, upper = batch_size // unit * unit, (batch_size // unit + 1) * unit
        sizes = f"{lower} or {upper}" if lower > 0 else f"{unit}"
        parts = f"{mesh.size} devices" + (
            f" x {microbatches} accumulation steps" if microbatches > 1 else ""
        )
        raise UserError(f"{name}={batch_size} cannot be divided among {parts}; use {sizes}.")


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays from this process's rows of a batch; process p holds the p-th part."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }
