"""Input workers and the process that they work for end together."""

import collections
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from msvit_jax.data import pipeline
from msvit_jax.errors import UserError
from tests import tiny_run

TRAINER = """
import multiprocessing, sys
from msvit_jax.data import pipeline
from tests import tiny_run

if __name__ == "__main__":
    config = tiny_run.config(data__data_dir=sys.argv[1], data__workers=1).data
    batches = pipeline.train_iterator(config, batch_size=16, seed=0)
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    while True:
        next(batches)
"""


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.fault(7)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    command = [sys.executable, str(script), tiny_run.data_dir()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        worker = int(trainer.stdout.readline())
        assert _runs(worker)
        trainer.kill()
    for _ in range(300):
        if not _runs(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker was still there after 30 seconds")


@pytest.mark.fault(7)
def test_a_killed_worker_is_told_in_one_line():
    config = tiny_run.config(data__workers=1).data
    batches = pipeline.train_iterator(config, batch_size=16, seed=0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(UserError, match=r"A worker process of data\.workers was killed"):
        collections.deque(itertools.islice(batches, 100))
