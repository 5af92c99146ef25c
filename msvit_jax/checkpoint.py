"""Checkpoints of runs: saved asynchronously, the latest and the best kept, restored exactly.

A workdir holds `config.json`, `metrics.jsonl` and `checkpoints/<step>/` with the items `model`
(parameters), `ema` (their moving average, where there is one), `trainer` (step, optimizer, priors
of the gate's loss) and `about` (config, model metadata, digests of all arrays).

Values that changed on the disk are noticed by the digests; checkpoints from before there were any
are taken as they are.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from msvit_jax import checkpoint_files, digests, extras, paths, peers
from msvit_jax import config as configs
from msvit_jax.errors import UserError, describe
from msvit_jax.models.interface import ImageModel
from msvit_jax.train_state import TrainState

with extras.needed("train"):
    import orbax.checkpoint as ocp
    from absl import logging
    from ml_collections import config_dict
    from orbax.checkpoint.checkpoint_managers import preservation_policy

CONFIG_FILE = paths.CONFIG_FILE
CHECKPOINTS = "checkpoints"
SET_ASIDE = "damaged_checkpoints"
_COMMITTED = "commit_success.txt"
_LEAST_PART = 1 << 20  # bytes that a device writes of an array, where several share the writing


class Run(NamedTuple):
    """A trained run: config, model, variables for `model.apply`, and names of its classes."""

    config: config_dict.ConfigDict
    model: ImageModel
    variables: dict[str, Any]
    class_names: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(
        self,
        workdir: str | pathlib.Path,
        *,
        keep_latest: int = 2,
        best_by: str = "top1",
        about: Any = None,
    ) -> None:
        """Opens a workdir's checkpoints.

        Args:
          workdir: Directory of the run; made if it does not exist.
          keep_latest: Number of the newest checkpoints to keep besides the best.
          best_by: Name of the figure whose highest value is the best.
          about: Dict saved with each checkpoint as JSON.
        """
        self._directory = checked_workdir(workdir) / CHECKPOINTS
        self._about, self._best_by = about or {}, best_by
        peers.on_first_process(self._mend_scores)
        best = _metric
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers={
                **{name: _arrays_handler() for name in checkpoint_files.ITEMS},
                "about": ocp.JsonCheckpointHandler(),
            },
            # Other ways to set these options lose the newest or the best after a restart.
            options=ocp.CheckpointManagerOptions(
                best_fn=best,
                best_mode="max",
                cleanup_tmp_directories=True,
                preservation_policy=preservation_policy.AnyPreservationPolicy(
                    [
                        preservation_policy.LatestN(keep_latest),
                        preservation_policy.BestN(
                            get_metric_fn=best, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
            ),
        )

    def _mend_scores(self) -> None:
        for step in _steps(self._directory.parent):
            checkpoint_files.mend_score(self._directory / str(step))

    def save(
        self,
        state: TrainState,
        step: int,
        metrics: Mapping[str, float] | None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts saving in the background.

        Args:
          state: State to save.
          step: Step of the state.
          metrics: Metrics that decide which checkpoint is best; None if it was not evaluated.
          extra: JSON values saved beside `about`.
        """
        if self._manager.latest_step() == step:
            return
        # Only this figure is kept: Orbax saves metrics as JSON, and best_fn needs no other.
        best = None if metrics is None else float(metrics[self._best_by])
        # A figure of nothing is no number and compares with none.
        kept = None if best is None or math.isnan(best) else {self._best_by: best}
        found = {name: digests.of_tree(item) for name, item in _items(state).items()}
        about = {
            **self._about,
            **(extra or {}),
            checkpoint_files.DIGESTS: found,
            checkpoint_files.SHAPES: {
                name: checkpoint_files.shapes_of(item) for name, item in _items(state).items()
            },
            checkpoint_files.SCORES: kept,
        }
        items = {name: ocp.args.PyTreeSave(item) for name, item in _items(state).items()}
        items["about"] = ocp.args.JsonSave(digests.seal(about))
        with self._saving():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=kept, force=True)

    def restore_latest(self, like: TrainState) -> tuple[TrainState | None, list[str]]:
        """Restores the newest checkpoint that is whole.

        Damaged newer ones are moved to `damaged_checkpoints/`.

        Args:
          like: State of shapes (`jax.ShapeDtypeStruct`) with shardings.

        Returns:
          State, or None if there is no checkpoint; and a message for each damaged one.

        Raises:
          UserError: There are checkpoints, and none can be restored.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            if why := self.damage(step):
                damaged[step] = why
                continue
            try:
                state = self._restore(step, like)
            except Exception as error:
                # Orbax and tensorstore raise many types for a truncated file.
                damaged[step] = f"{type(error).__name__}: {_first_line(error)}"
                continue
            for bad in damaged:
                self._set_aside(bad)
            return state, [
                f"checkpoint {bad} is damaged ({why}); moved to {SET_ASIDE}/, using {step}"
                for bad, why in damaged.items()
            ]
        if damaged:
            reasons = "".join(f"\n  step {step}: {why}" for step, why in damaged.items())
            raise UserError(
                f"No checkpoint in {self._directory} can be restored; remove the workdir to start "
                f"anew.{reasons}"
            )
        return None, []

    def damage(self, step: int) -> str:
        """Says what is damaged in a checkpoint; '' if nothing is. Processes share the reading.

        This comes before all processes restore together: one of them that fails there would leave
        the others waiting.
        """
        directory = self._directory / str(step)
        why = ""
        try:
            about = checkpoint_files.read_about(directory)
            items = [name for name in checkpoint_files.ITEMS if (directory / name).exists()]
            for name in items[jax.process_index() :: jax.process_count()]:
                tree = checkpoint_files.read_tree(directory / name, about)
                checkpoint_files.check_digests(name, tree, about)
            if missing := set(about.get(checkpoint_files.DIGESTS, ())) - set(items):
                raise ValueError(f"{' and '.join(sorted(missing))} is missing")
        except Exception as error:  # of many types
            why = f"{type(error).__name__}: {_first_line(error)}"
        return next(filter(None, peers.exchange("checkpoint", why)), "")

    def _restore(self, step: int, like: TrainState) -> TrainState:
        args = {
            name: ocp.args.PyTreeRestore(
                item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
            )
            for name, item in _items(like).items()
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        trainer = restored["trainer"]
        return dataclasses.replace(
            like,
            step=trainer["step"],
            params={"model": restored["model"], "gate_loss": trainer["gate_loss"]},
            opt_state=trainer["opt_state"],
            ema=restored["ema"] if like.ema is not None else None,
        )

    def about(self, step: int) -> dict[str, Any]:
        """Returns what was saved as JSON with a checkpoint."""
        return checkpoint_files.read_about(self._directory / str(step))

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            source, target = (self._directory, self._directory.parent / SET_ASIDE)
            target.mkdir(exist_ok=True)
            if paths.is_address(target):
                cast(Any, target / str(step)).rmtree(missing_ok=True)
                (source / str(step)).rename(target / str(step))
            else:
                shutil.rmtree(target / str(step), ignore_errors=True)
                shutil.move(source / str(step), target / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def reached_preemption(self, step: int) -> bool:
        """Tells whether all processes were asked to stop; needs `jax.distributed.initialize`."""
        return self._manager.reached_preemption(step)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in order; waits for started saves."""
        self.wait()
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits until all started saves are on disk."""
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Reports why a checkpoint could not be written, and which ones are left."""
        try:
            yield
        except Exception as error:  # tensorstore's are ValueErrors with a text
            if not (isinstance(error, OSError) or _OS_ERROR.search(str(error))):
                raise
            steps = ", ".join(map(str, _steps(self._directory.parent))) or "none"
            raise UserError(
                f"A checkpoint could not be saved in {str(self._directory)!r}: {_cause(error)} "
                f"Checkpoints that are whole: {steps}; the same command goes on from the last."
            ) from error


# Texts of tensorstore for errors of the operating system.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'|No space left|PERMISSION_DENIED")


def _cause(error: Exception) -> str:
    found = _OS_ERROR.search(str(error))
    if isinstance(error, OSError) or found is None or not found[1]:
        return describe(error)
    return describe(OSError(int(found[1]), os.strerror(int(found[1]))))


def checked_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Parses a workdir, see `paths.parse`, and makes it absolute.

    Raises:
      UserError: It is not a path, or is at an address that cannot hold checkpoints.
    """
    place = paths.absolute(workdir)
    if paths.is_address(place) and not str(place).startswith("gs://"):
        raise UserError(
            f"{str(place)!r} cannot be a workdir: checkpoints are kept in local folders and at "
            "gs:// addresses."
        )
    return place


def _metric(metrics: Mapping[str, float]) -> float:
    return next(iter(metrics.values()))  # the only one that is saved


def _items(state: TrainState) -> dict[str, Any]:
    items = {
        "model": state.params["model"],
        "trainer": {
            "step": state.step,
            "opt_state": state.opt_state,
            "gate_loss": state.params["gate_loss"],
        },
    }
    if state.ema is not None:
        items["ema"] = state.ema
    return items


def _arrays_handler() -> Any:
    """Returns what writes and reads the arrays of an item.

    Where all devices have an array, Orbax lets each write a part, and compiles a program to cut it:
    for a small model a hundred programs, which take longer than the writing.
    """
    kinds = ocp.type_handlers
    arrays = kinds.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_PART)
    registry = kinds.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, kinds.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def read_config(workdir: str | pathlib.Path) -> config_dict.ConfigDict:
    """Reads the config that a workdir was trained with.

    Raises:
      UserError: It is not a workdir.
    """
    file = checked_workdir(workdir) / CONFIG_FILE
    if not file.is_file():
        raise UserError(
            f"{str(workdir)!r} is not the workdir of a run: it has no {CONFIG_FILE}. "
            "Train one with: python train.py --config=... --workdir=..."
        )
    try:
        return configs.with_defaults(configs.from_json(file.read_text()))
    except UserError:
        raise
    except Exception as error:  # of many types: it may hold anything
        raise UserError(
            f"{str(file)!r} is damaged ({_first_line(error)}). Every checkpoint beside it has "
            "a copy, 'config' in about/metadata; with it as config.json the run is whole again."
        ) from error


def find_step(workdir: str | pathlib.Path, which: str = "best") -> int:
    """Returns the step of a workdir's 'best' or 'latest' checkpoint, or checks a number.

    'best' is the newest if no checkpoint was evaluated.

    Raises:
      UserError: There is no such checkpoint.
    """
    directory = checked_workdir(workdir) / CHECKPOINTS
    steps = _steps(workdir)
    if not steps:
        raise UserError(f"No checkpoint in {str(directory)!r}; has the run saved one yet?")
    if which == "latest":
        return steps[-1]
    if which == "best":
        scores = {
            s: m for s in steps if (m := checkpoint_files.score_of(directory / str(s))) is not None
        }
        return max(scores, key=lambda s: (scores[s], s)) if scores else steps[-1]
    if str(which).isdigit() and int(which) in steps:
        return int(which)
    raise UserError(f"No checkpoint {which!r}; use 'best', 'latest', or a step of {steps}.")


def load_run(workdir: str | pathlib.Path, which: str = "best") -> Run:
    """Loads a trained run, with the moving average of its parameters where it has one.

    Args:
      workdir: Directory of the run.
      which: Checkpoint: 'best', 'latest', or a step.

    Raises:
      UserError: It is not a workdir, or has no checkpoint, or a damaged one.
    """
    config = read_config(workdir)
    step = str(find_step(workdir, which))  # once: a running run may get a better one
    params = load_params(workdir, step)
    model = configs.build_model(config).with_dense_layout()
    names = tuple(read_about(workdir, step).get("class_names") or ())
    return Run(config, model, {"params": jax.tree.map(jax.numpy.asarray, params)}, names)


def load_params(workdir: str | pathlib.Path, which: str = "best") -> dict[str, Any]:
    """Loads a run's model parameters (their moving average, if any) as NumPy arrays."""
    step = find_step(workdir, which)
    directory = checked_workdir(workdir) / CHECKPOINTS / str(step)
    item = directory / ("ema" if (directory / "ema").exists() else "model")
    try:
        about = checkpoint_files.read_about(directory)
        tree = checkpoint_files.read_tree(item, about)
        checkpoint_files.check_digests(item.name, tree, about)
        return tree
    except Exception as error:
        raise UserError(
            f"Checkpoint {step} in {str(workdir)!r} is damaged ({_first_line(error)}); "
            f"another one can be chosen by its step: {_steps_text(workdir, step)}."
        ) from error


def read_about(workdir: str | pathlib.Path, which: str = "best") -> dict[str, Any]:
    """Reads a checkpoint's description: `config`, `class_names`, `mean`, `std`.

    Args:
      workdir: Directory of the run.
      which: Checkpoint: 'best', 'latest', or a step.
    """
    step = find_step(workdir, which)
    try:
        return checkpoint_files.read_about(checked_workdir(workdir) / CHECKPOINTS / str(step))
    except Exception as error:  # of many types
        raise UserError(
            f"Checkpoint {step} in {str(workdir)!r} is damaged ({_first_line(error)}); "
            f"another one can be chosen by its step: {_steps_text(workdir, step)}."
        ) from error


def has_checkpoint(workdir: str | pathlib.Path) -> bool:
    """Tells whether a run has saved a checkpoint there that it can resume from."""
    return (pathlib.Path(workdir) / CONFIG_FILE).is_file() and bool(_steps(workdir))


def _steps(workdir: str | pathlib.Path) -> list[int]:
    directory = checked_workdir(workdir) / CHECKPOINTS
    if not directory.is_dir():
        return []
    steps = [p for p in directory.iterdir() if p.name.isdigit()]
    if paths.is_address(directory):  # Orbax cannot rename there; this file marks a whole one
        steps = [p for p in steps if (p / _COMMITTED).exists()]
    return sorted(int(p.name) for p in steps)


def _steps_text(workdir: str | pathlib.Path, without: int) -> str:
    return ", ".join(str(s) for s in _steps(workdir) if s != without) or "there is no other"


def claim_workdir(workdir: str | pathlib.Path, config: config_dict.ConfigDict) -> None:
    """Writes the config into a new workdir, or checks that an old one was made with the same.

    A workdir without a checkpoint holds nothing to lose: its run ended before it saved one, perhaps
    because of a mistake in the config, and the corrected config takes its place.

    Raises:
      UserError: It belongs to another config; the message lists the differences.
    """
    directory = checked_workdir(workdir)
    file = directory / CONFIG_FILE
    if has_checkpoint(directory):
        changes = configs.differences(config, read_config(directory))
        if changes:
            raise UserError(
                f"{str(workdir)!r} belongs to another config:\n  "
                + "\n  ".join(changes)
                + "\nUse another --workdir, or give these keys the workdir's values to resume it."
            )
    elif jax.process_index() == 0:
        paths.check_writable(directory)
        paths.write_whole(file, configs.to_json(config))


def quiet_orbax() -> None:
    """Keeps Orbax's notes out of the terminal report; errors are still raised.

    This hides its logged errors, too: it prints the traceback of each of its threads before it
    raises them. Reads that were under way when it gave up complain that nobody waits for them.
    """
    logging.set_verbosity(logging.FATAL)
    for name in ("excepthook", "unraisablehook"):
        hook = getattr(sys, name)
        if not isinstance(hook, functools.partial):  # else it was done before
            setattr(sys, name, functools.partial(_unless_late, hook))


def _unless_late(hook: Callable[..., Any], *arguments: Any) -> None:
    """Passes an exception on to a hook of `sys`, except those of reads that are over."""
    if "Event loop is closed" not in str(getattr(arguments[0], "exc_value", arguments[-2:])):
        hook(*arguments)
