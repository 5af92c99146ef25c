"""Start of the training and evaluation commands: joins the processes of a run."""

import os
from collections.abc import Sequence

import jax
from absl import flags

from msvit_jax.errors import UserError

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, to run on several hosts that are no TPU pod."
)
_COUNT = flags.DEFINE_integer("process_count", None, "Number of processes, with --coordinator.")
_INDEX = flags.DEFINE_integer("process_index", None, "This process, with --coordinator.")
# Set on machines of TPU pods and multi-slice jobs, and by cluster managers that JAX detects.
_CLUSTERS = ("MEGASCALE_COORDINATOR_ADDRESS", "JAX_COORDINATOR_ADDRESS")


def start(argv: Sequence[str]) -> None:
    """Checks the command line and joins the other processes, if there are any.

    Raises:
      UserError: There are arguments that are not flags, or only some flags for several processes.
    """
    if len(argv) > 1:
        raise UserError(
            f"Unexpected argument {argv[1]!r}; config keys are written --config.key=value."
        )
    given = (_COORDINATOR.value, _COUNT.value, _INDEX.value)
    if all(value is not None for value in given):
        jax.distributed.initialize(*given, cluster_detection_method="deactivate")
    elif any(value is not None for value in given):
        raise UserError("--coordinator, --process_count and --process_index go together.")
    elif _on_cluster():
        jax.distributed.initialize()


def _on_cluster() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or any(name in os.environ for name in _CLUSTERS)
