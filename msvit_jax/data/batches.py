"""Which rows of a batch a process makes, and making batches ahead of their use."""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import jax
from absl import flags
from ml_collections import ConfigDict

from msvit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rows:
    """This process's rows of the global batch: their number, and which process of how many."""

    local: int
    index: int
    count: int

    @classmethod
    def of_process(cls, batch_size: int, index: int | None, count: int | None) -> "Rows":
        """Divides a global batch among processes; None stands for JAX's index and count."""
        index = jax.process_index() if index is None else index
        count = jax.process_count() if count is None else count
        if batch_size < 1 or batch_size % count:
            raise UserError(
                f"batch_size {batch_size} cannot be divided among {count} processes; choose a "
                f"multiple of {count}."
            )
        return cls(batch_size // count, index, count)


def ahead(dataset: grain.MapDataset, config: ConfigDict) -> Iterator[Any]:
    """Iterates over batches that threads or worker processes make ahead."""
    # One thread: Pillow decodes under the interpreter lock, so more threads slow each other down.
    threads = min(1, config.prefetch)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch)
    batches = dataset.to_iter_dataset(options)
    if not config.workers:
        return iter(batches)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads a flag even without an absl main
    per_worker = -(-config.prefetch // config.workers)
    several = grain.MultiprocessingOptions(
        num_workers=config.workers, per_worker_buffer_size=per_worker
    )
    return _of_workers(batches.mp_prefetch(several, worker_init_fn=_start_worker))


def _start_worker(index: int, count: int) -> None:
    """Makes a worker process end with the process that started it, however that ends.

    `prctl` could not do this: it goes by the thread that started the worker, which ends early.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which stops in order
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _of_workers(batches: Iterable[Any]) -> Iterator[Any]:
    """Yields batches; says in one line that a worker was killed."""
    try:
        yield from batches
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise UserError(
            "A worker process of data.workers was killed, perhaps because memory was full. Use "
            "fewer data.workers or less data.prefetch; the same command goes on from the last "
            "checkpoint."
        ) from error
