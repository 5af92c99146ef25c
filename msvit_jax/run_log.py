"""A run's reports: terminal, `metrics.jsonl`, TensorBoard. Only process 0 writes.

Nothing here waits for a device, and slow work (pictures, files) is done by one background thread,
in order.
"""

import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from msvit_jax import event_files, paths, tree
from msvit_jax.errors import check_choice

if TYPE_CHECKING:
    from msvit_jax.evaluate import Evaluation, Samples

# Figures in a line on the terminal, in this order, with their formats.
SHOWN = {
    "total_loss": "loss {:.4f}",
    "loss": "task {:.4f}",
    "top1": "top1 {:.2f}%",
    "top5": "top5 {:.2f}%",
    "tokens_mean": "tokens {:.1f}",
    "miou": "mIoU {:.2f}%",
    "pixel_accuracy": "pixels {:.2f}%",
    "overflow": "overflow {:.1%}",
    "gmacs_mean": "{:.4g} GMACs",
    "content_fine": "content fine {:.0%}",
    "plain_coarse": "plain coarse {:.0%}",
    "agreement": "agreement {:.0%}",
    "gate_loss": "gate {:.4f}",
    "learning_rate": "lr {:.2e}",
    "images_per_second": "{:.0f} img/s",
}
RECORDS, BOARD = "metrics.jsonl", "tensorboard"
BRIEF = ("total_loss", "top1", "pixel_accuracy", "tokens_mean", "images_per_second")


class Logger:
    """Writes reports of a run; on processes other than 0 it does nothing."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        steps: int,
        start: int,
        active: bool,
        terminal: str = "lines",
    ) -> None:
        """Opens the logs, and cuts them back to the step that the run begins at.

        Args:
          workdir: Directory of the run.
          steps: Number of steps of the whole run, for the progress bar.
          start: Step the run begins at.
          active: Whether this process writes.
          terminal: Way of printing: "lines" prints every report; "bar" shows training in the
            progress bar alone, or in a few lines if the output is not a terminal.

        Raises:
          UserError: `terminal` is neither.
        """
        check_choice("terminal", terminal, ("lines", "bar"))
        self._steps, self._brief, self._quarters = steps, terminal == "bar", 0
        self._active = active
        if not active:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        _cut_back(workdir / RECORDS, start)
        event_files.cut_back(workdir / BOARD, start)
        self._jsonl = paths.Lines(workdir / RECORDS)
        self._board = event_files.Board(workdir / BOARD)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="logs")
        self._jobs: list[Future[None]] = []
        # The bar goes to stderr, where it does not mix with lines; it is off without a terminal.
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._active:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, steps: int = 1) -> None:
        """Moves the progress bar."""
        if self._active:
            self._bar.update(steps)

    def report(self, kind: str, step: int, epoch: float, figures: Mapping[str, Any]) -> None:
        """Prints and records figures.

        Args:
          kind: Kind of the report, 'train' or 'eval'.
          step: Optimizer step that the figures belong to.
          epoch: Epoch that the figures belong to, a float.
          figures: Figures by name; one that is not a number is recorded but not drawn.
        """
        if not self._active:
            return
        self._show(kind, step, epoch, figures)
        record = {"kind": kind, "step": step, "epoch": round(epoch, 4), "time": time.time()}
        self._later(self._record, kind, step, {**record, **figures})

    def _show(self, kind: str, step: int, epoch: float, figures: Mapping[str, Any]) -> None:
        if kind != "train" or not self._brief:
            self.say(line(kind, step, epoch, figures))
            return
        brief = {name: figures[name] for name in BRIEF if name in figures}
        self._bar.set_postfix_str("  ".join(_texts(brief)))
        quarter = 4 * step // self._steps
        if self._bar.disable and quarter > self._quarters:
            self._quarters = quarter
            self.say(line(kind, step, epoch, brief))

    def evaluation(
        self, step: int, epoch: float, result: "Evaluation", region_grid: tuple[int, int] | None
    ) -> None:
        """Reports an evaluation, with gate rates, token maps and merge maps as pictures.

        Args:
          step: Optimizer step that the figures belong to.
          epoch: Epoch that the figures belong to, a float.
          result: Result of the evaluator.
          region_grid: (rows, columns) of the gate's regions, or None.
        """
        self.report("eval", step, epoch, result.figures)
        if not self._active:
            return
        if result.coarse_rates is not None and region_grid is not None:
            self._later(self._rates, step, result.coarse_rates.reshape(region_grid))
        if result.samples is not None:
            self._later(self._maps, step, result.samples, region_grid)

    def _later(self, job: Callable[..., None], *arguments: Any) -> None:
        for done in [j for j in self._jobs if j.done()]:
            done.result()  # raises what went wrong there
            self._jobs.remove(done)
        self._jobs.append(self._thread.submit(job, *arguments))

    def _record(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        self._jsonl.write(json.dumps(tree.for_json(record)) + "\n")
        self._jsonl.flush()
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def _rates(self, step: int, rates: np.ndarray) -> None:
        """Draws one gray square per region, white where it is always fine."""
        picture = np.kron((1 - rates)[None], np.ones((1, 16, 16)))
        self._board.add_image("gate/fine_rate", picture.astype(np.float32), step)

    def _maps(self, step: int, samples: "Samples", region_grid: tuple[int, int] | None) -> None:
        from msvit_jax import pictures  # brings matplotlib, which not every run needs

        for index, image in enumerate(samples.images):
            coarse = None
            if samples.coarse is not None and region_grid is not None:
                coarse = samples.coarse[index].reshape(region_grid)
                picture = pictures.token_map(image, samples.coarse[index], region_grid)
                self._board.add_image(f"tokens/{index}", picture, step, dataformats="HWC")
            if samples.merge_maps is not None:  # after the last reduction
                picture = pictures.merge_map(image, samples.merge_maps[index, -1], coarse=coarse)
                self._board.add_image(f"merged/{index}", picture, step, dataformats="HWC")

    def sync(self) -> None:
        """Finishes pending work and makes it safe: a checkpoint must not be newer than its logs."""
        if not self._active:
            return
        self._later(self._jsonl.sync)
        self._later(self._board.flush)
        while self._jobs:
            self._jobs.pop(0).result()

    def close(self) -> None:
        """Finishes pending work and closes the logs."""
        if self._active:
            self._thread.shutdown(wait=True)
            self._bar.close()
            self._board.close()
            self._jsonl.close()
            for job in self._jobs:
                job.result()


def _cut_back(file: pathlib.Path, step: int) -> None:
    """Removes records of steps after `step`, which a resumed run writes again, and torn lines."""
    if not file.exists():
        return
    text = file.read_bytes().decode(errors="replace")
    kept = "".join(record for record in text.splitlines(keepends=True) if _is_until(record, step))
    if kept != text:
        paths.write_whole(file, kept)


def _is_until(record: str, step: int) -> bool:
    try:
        return record.endswith("\n") and json.loads(record)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def line(kind: str, step: int, epoch: float, figures: Mapping[str, Any]) -> str:
    """Formats a report as a line: 'train  step    100  epoch  0.64  loss 1.2345 ...'."""
    parts = [f"{kind:<5}  step {step:>6}  epoch {epoch:>6.2f}", *_texts(figures)]
    if "seconds_left" in figures:
        parts.append(f"left {duration(figures['seconds_left'])}")
    return "  ".join(parts)


def _texts(figures: Mapping[str, Any]) -> list[str]:
    return [text.format(figures[name]) for name, text in SHOWN.items() if name in figures]


def duration(seconds: float) -> str:
    """Formats a duration: '3m05s', '2h10m', '45s'."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
