"""Start of the training and evaluation commands: joins the processes of a run."""

import contextlib
import os
from collections.abc import Iterator, Sequence

from absl import flags

from msvit_jax import peers
from msvit_jax.errors import UserError, refuse_arguments

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Address host:port of process 0, for several hosts that are not a TPU pod."
)
_COUNT = flags.DEFINE_integer("process_count", None, "Number of processes; needs --coordinator.")
_INDEX = flags.DEFINE_integer(
    "process_index", None, "Index of this process, from 0; needs --coordinator."
)
_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout",
    45,
    "Seconds to wait for the other processes at the start, and to go without a sign of life from "
    "one of them before it counts as gone.",
    lower_bound=5,
)
# Set on machines of TPU pods and multi-slice jobs, and by cluster managers that JAX detects.
_CLUSTERS = ("MEGASCALE_COORDINATOR_ADDRESS", "JAX_COORDINATOR_ADDRESS")


@contextlib.contextmanager
def started(argv: Sequence[str]) -> Iterator[None]:
    """Checks the command line, joins the other processes, if there are any, and ends with them.

    Raises:
      UserError: There are arguments that are not flags, or only some flags for several processes.
    """
    refuse_arguments(argv, "config keys are written --config.key=value")
    given = (_COORDINATOR.value, _COUNT.value, _INDEX.value)
    if all(value is not None for value in given):
        peers.join(*given, timeout=_TIMEOUT.value)
    elif any(value is not None for value in given):
        raise UserError("--coordinator, --process_count and --process_index go together.")
    elif _on_cluster():
        peers.join(timeout=_TIMEOUT.value)
    with peers.together():
        yield


def _on_cluster() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or any(name in os.environ for name in _CLUSTERS) or _slurm_tasks() > 1


def _slurm_tasks() -> int:
    """Counts the tasks of this Slurm step; `srun` sets the variable, a batch script has none."""
    inside = "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" in os.environ
    count = os.environ.get("SLURM_NTASKS", "")
    return int(count) if inside and count.isdigit() else 1
