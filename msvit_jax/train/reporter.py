"""Reports of training: figures of steps, read late, checked, and averaged.

Python runs ahead of the devices by `LAG` steps: figures of a step are read when they have long been
computed, so that logging never makes a device wait, and a loss that is not finite is still noticed
within `LAG` steps.
"""

import collections
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from msvit_jax import flops, metrics
from msvit_jax.errors import UserError
from msvit_jax.run_log import Logger
from msvit_jax.train.health import Health
from msvit_jax.train.step import StepMetrics

LAG = 2


class NotFiniteError(UserError):
    """Error for a loss or gradient that became NaN or infinite."""


class Reporter:
    """Reads the figures of steps when they are due, checks them, and makes the reports."""

    def __init__(self, run: Any, logger: Logger) -> None:
        """Starts without figures.

        Args:
          run: Run of `train.loop`.
          logger: Logger of the reports.
        """
        self._run, self._logger = run, logger
        self._learning_rate = jax.jit(run.schedule)
        self._pending: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self._macs = flops.macs_per_image(run.model, np.arange(run.model.max_tokens + 1))
        self._sums: metrics.Sums | None = None
        self._saved_sums: list[Any] = []
        self._scalars: list[dict[str, float]] = []
        half_epoch = max(1, round(run.run_length.steps_per_epoch / 2))
        self._health = Health(run.config.batch_size, half_epoch)
        self._last: dict[str, float] = {}
        # The clock starts when the first step has been computed: that one is compiled first.
        self._clock, self._clock_step = 0.0, -1
        self._seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns what a resumed run needs to make the next report as if it had not stopped."""
        leaves = [] if self._sums is None else jax.tree.leaves(self._sums)
        return {
            "sums": [np.asarray(leaf).tolist() for leaf in leaves],
            "scalars": self._scalars,
            "health": self._health.to_json(),
            "last": self._last,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over what `to_json` returned; an empty mapping changes nothing."""
        if not saved:
            return
        self._saved_sums = saved["sums"]
        self._scalars = list(saved["scalars"])
        self._health.restore(saved["health"])

    def add(self, step: int, reported: StepMetrics) -> None:
        """Takes a step's figures, not yet computed, and reads those that are `LAG` steps old."""
        jax.tree.map(lambda x: x.copy_to_host_async(), reported)
        self._pending.append((step, reported))
        if len(self._pending) > LAG:
            self._read()

    def flush(self) -> None:
        """Reads all pending figures; waits for the devices."""
        while self._pending:
            self._read()

    def restart_clock(self) -> None:
        """Excludes what happened since the last step from the time per step."""
        self._clock += time.perf_counter() - self._read_at

    def _read(self) -> None:
        step, reported = self._pending.popleft()
        scalars = {name: float(value) for name, value in jax.device_get(reported.scalars).items()}
        sums = metrics.to_host(reported.sums)
        self._read_at = time.perf_counter()
        if self._clock_step < 0:
            self._clock, self._clock_step = self._read_at, step
        self._check(step, scalars)
        self._last = scalars
        for warning in self._health.observe(scalars, metrics.accuracy(sums)):
            self._logger.say(f"step {step}: warning: {warning}")
        if self._saved_sums:  # only now is their structure known
            leaves = [np.asarray(leaf, np.float64) for leaf in self._saved_sums]
            self._sums = jax.tree.unflatten(jax.tree.structure(sums), leaves)
            self._saved_sums = []
        self._sums = sums if self._sums is None else self._sums + sums
        if self._run.capacity is not None:
            self._run.capacity.observe(sums.tokens, sums.overflow)
        self._scalars.append(scalars)
        self._logger.advance()
        if step % self._run.config.log_every_steps == 0 or step == self._run.run_length.steps:
            self._report(step)

    def _check(self, step: int, scalars: dict[str, float]) -> None:
        bad = [name for name, value in scalars.items() if not np.isfinite(value)]
        if not bad:
            return
        raise NotFiniteError(
            f"{' and '.join(bad)} not finite at step {step} (its batch is that of seed "
            f"{self._run.config.seed}, step {step - 1}). Start again in a new --workdir with a "
            "lower learning rate, a longer warm-up, optimizer.clip_norm, or dtype=float32: a "
            f"workdir keeps its settings. {self._checkpoints()}"
        )

    def _checkpoints(self) -> str:
        """Names the checkpoints of a run that failed, with the loss that each had."""
        found = []
        for step in self._run.checkpoints.all_steps():
            loss = self._run.checkpoints.about(step).get("reporter", {}).get("last", {})
            found.append(f"step {step} (loss {loss.get('total_loss', math.nan):.3g})")
        if not found:
            return "There is no checkpoint yet."
        return (
            f"Its checkpoints: {', '.join(found)}; --config.init_from={self._run.workdir} in the "
            "new run would begin with the best of them."
        )

    def _report(self, step: int) -> None:
        assert self._sums is not None
        run, now = self._run, self._read_at
        figures = metrics.summarize(self._sums, self._macs)
        means = {
            name: float(np.mean([s[name] for s in self._scalars])) for name in self._scalars[0]
        }
        figures |= {**means, "learning_rate": float(self._learning_rate(step - 1))}
        steps = step - self._clock_step
        if steps:
            # Steps are read up to LAG late, so the time of a few does not tell; it is taken over
            # several reports where they are that close together.
            self._seconds = (now - self._clock) / steps
            if steps > 2 * LAG:
                self._clock, self._clock_step = now, step
        if self._seconds is not None:
            figures |= {
                "images_per_second": run.config.batch_size / self._seconds,
                "seconds_per_step": self._seconds,
                "seconds_left": self._seconds * (run.run_length.steps - step),
            }
        self._logger.report("train", step, step / run.run_length.steps_per_epoch, figures)
        self._sums, self._scalars = None, []
