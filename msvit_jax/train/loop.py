"""The training loop: takes batches, writes reports and checkpoints.

Python runs ahead of the devices by a few steps (`reporter.LAG`). Before a checkpoint is saved every
step before it has been checked, and its logs are safe.
"""

import contextlib
import dataclasses
import json
import pathlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import config_dict

from msvit_jax import checkpoint, data, flops, labels, paths, peers, sharding, tasks, weights
from msvit_jax import config as configs
from msvit_jax.data import on_device
from msvit_jax.errors import UserError
from msvit_jax.evaluate import Evaluator
from msvit_jax.image_size import shown
from msvit_jax.models.interface import ImageModel
from msvit_jax.models.layout import images_per_group
from msvit_jax.run_log import Logger
from msvit_jax.train import optimizer, owner
from msvit_jax.train.capacity_schedule import CapacitySchedule
from msvit_jax.train.keep_rate_schedule import KeepRateSchedule
from msvit_jax.train.program import TrainProgram
from msvit_jax.train.reporter import Reporter
from msvit_jax.train.step import StepMetrics, Teacher
from msvit_jax.train_state import TrainState, count_parameters
from msvit_jax.weights.declared import UNSEEN


@dataclasses.dataclass(frozen=True)
class RunLength:
    """Length of a run.

    Attributes:
      steps: Step after which this run ends.
      schedule_steps: Number of steps that the learning-rate schedule spans.
      steps_per_epoch: Number of steps per epoch, a float because a batch may span two epochs.
      eval_every: Number of steps between evaluations.
    """

    steps: int
    schedule_steps: int
    steps_per_epoch: float
    eval_every: int

    @classmethod
    def from_config(cls, config: config_dict.ConfigDict, train_examples: int) -> "RunLength":
        """Computes steps from the config's epochs."""
        per_epoch = train_examples / config.batch_size
        whole = round(config.epochs * per_epoch)
        steps = whole if config.steps is None else config.steps
        if not 0 < steps <= whole:
            raise UserError(
                f"A run of {steps} steps is not possible: epochs={config.epochs} of "
                f"{train_examples} examples in batches of {config.batch_size} are {whole} steps."
            )
        return cls(steps, whole, per_epoch, max(1, round(config.eval_every_epochs * per_epoch)))


def train(config: config_dict.ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Trains to the end of the config's epochs, resuming the workdir's run if it holds one.

    Args:
      config: Config with the keys of `config.base`.
      workdir: Directory for checkpoints and logs; a run of the same config in it is resumed.

    Returns:
      Figures of the last evaluation (`metrics.summarize`).

    Raises:
      UserError: The config cannot be run, or the workdir belongs to another.
    """
    with contextlib.ExitStack() as held:
        return _Run(config, checkpoint.checked_workdir(workdir), held).run()


class _Run:
    """One run and its parts; `run` reads from top to bottom."""

    def __init__(
        self, config: config_dict.ConfigDict, workdir: pathlib.Path, held: contextlib.ExitStack
    ) -> None:
        checkpoint.quiet_orbax()
        self.info = data.dataset_info(config.data)
        config = configs.resolve(config, self.info.num_classes)
        config, followed = _following(config, workdir)
        self.config, self.workdir = config, workdir
        peers.agree(self._facts())
        self.mesh: Mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
        sharding.check_batch(
            config.batch_size, self.mesh, microbatches=config.optimizer.accum_steps
        )
        self.run_length = RunLength.from_config(config, self.info.train_examples)
        self.schedule: optax.Schedule = optimizer.schedule(
            config.optimizer, self.run_length.schedule_steps, self.run_length.steps_per_epoch
        )
        self.program = TrainProgram.from_config(config, self.mesh, self.schedule)
        self.model: ImageModel = self.program.model
        self.capacity = self._capacity_schedule()
        self.keep_rate = KeepRateSchedule.from_config(
            config.keep_rate, self.model, self.run_length.steps_per_epoch
        )
        self._compiled_steps: dict[Any, Any] = {}
        self.about: dict[str, Any] = {}  # description of the checkpoint that is resumed
        self.messages: list[str] = [
            f"{key}={value!r} as {config.init_from} says" for key, value in followed.items()
        ]
        held.enter_context(owner.hold(workdir))
        checkpoint.claim_workdir(workdir, config)
        self.checkpoints = checkpoint.Checkpoints(
            workdir,
            keep_latest=config.checkpoint.keep_latest,
            best_by=tasks.task_of(self.model).best_by,
            about={
                "config": config.to_dict(),
                "class_names": list(self.info.class_names),
                "mean": list(self.model.mean),
                "std": list(self.model.std),
            },
        )

    def _facts(self) -> dict[str, Any]:
        """Returns what all processes of a run must have alike."""
        keys = configs.flatten(json.loads(configs.to_json(self.config)))
        return {
            "workdir": str(self.workdir),
            "data set": self.info.fingerprint,
            **{f"config.{k}": v for k, v in keys.items() if k not in configs.OF_ONE_PROCESS},
        }

    def _capacity_schedule(self) -> CapacitySchedule | None:
        """Makes the trimmed layout's schedule, unless the config itself sets the capacities."""
        model, config = self.model, self.config
        if model.layout != "trimmed" or model.token_capacity is not None:
            return None
        batch = config.batch_size // config.optimizer.accum_steps
        images = images_per_group(batch, model.packing_layout)
        return CapacitySchedule.start(config.capacity, regions=model.num_regions, images=images)

    def start_state(self) -> TrainState:
        """Returns the newest checkpoint's state, or a fresh one."""
        state, damaged = self.checkpoints.restore_latest(self.program.abstract_state)
        self.messages += [f"warning: {message}" for message in damaged]
        if state is not None:
            self.about = self.checkpoints.about(int(state.step))
            self._check_classes()
            self.messages.append(f"resumed at step {int(state.step)}")
            if self.capacity is not None:
                # the latter is the earlier name
                self.capacity.restore(self.about.get("capacity") or self.about["trim"])
            return state
        loaded: dict[str, np.ndarray] = {}
        if self.config.init_from:
            source = weights.load(self.config.init_from, self.model)
            source = dataclasses.replace(source, flat=self._with_our_classes(source.flat))
            taken, report = source.adapt_to(self.program.params["model"], self.model.patch_grid)
            loaded = {f"model/{name}": value for name, value in taken.items()}
            self.messages.append(f"starting from {self.config.init_from}: {report}")
        return self.program.fresh_state(loaded)

    def _check_classes(self) -> None:
        """Raises UserError where a checkpoint was trained on other classes than the data's."""
        names = self.about.get("class_names") or ()
        how = self.config.data.match_classes
        if labels.order(names, self.info.class_names, how, of="The run") is not None:
            raise UserError(
                "The data set's classes have another order than when the run was started. "
                "data.match_classes=by_name cannot go on with it; prepare the data set as it was."
            )

    def _with_our_classes(self, flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns initial weights, without a head that was trained for classes of other names."""
        names, ours = weights.class_names(self.config.init_from), self.info.class_names
        how = self.config.data.match_classes
        if len(names) != len(ours):
            return flat  # a head of another size is left out anyway
        try:
            return labels.in_order(flat, labels.order(names, ours, how, of="The source"))
        except UserError as error:
            self.messages.append(f"the head starts fresh. {error}")
            return labels.without_heads(flat)

    def teacher(self) -> Teacher | None:
        """Loads the model to distill from, on every device."""
        teacher = teacher_of(self.config)
        if teacher is None:
            return None
        names = weights.class_names(self.config.loss.distillation.teacher)
        how = self.config.data.match_classes
        indices = labels.order(names, self.info.class_names, how, of="The teacher")
        variables = {"params": labels.in_order(teacher.variables["params"], indices)}
        teacher = dataclasses.replace(teacher, variables=variables)
        whole = sharding.replicated(self.mesh)
        return dataclasses.replace(teacher, variables=jax.device_put(teacher.variables, whole))

    def run(self) -> dict[str, Any]:
        """Trains to the end."""
        with jax.set_mesh(self.mesh), _stop_signals() as stop:
            state = self.start_state()
            start = int(state.step)
            active = jax.process_index() == 0
            logger = Logger(
                self.workdir,
                steps=self.run_length.steps,
                start=start,
                active=active,
                terminal=self.config.terminal,
            )
            try:
                for message in [*self.describe(), *self.messages]:
                    logger.say(message)
                return self._steps(state, start, logger, stop)
            finally:
                try:
                    self.checkpoints.close()
                finally:
                    logger.close()

    def _steps(
        self, state: TrainState, start: int, logger: Logger, stop: "StopRequest"
    ) -> dict[str, Any]:
        config, run_length = self.config, self.run_length
        teacher = self.teacher()
        evaluate = Evaluator(
            self.model,
            config.data,
            batch_size=config.eval_batch_size or config.batch_size,
            mesh=self.mesh,
            samples=config.log_images,
        )
        reporter = Reporter(self, logger)
        reporter.restore(self.about.get("reporter") or {})
        figures: dict[str, Any] = {}
        batches = self.batches(start)
        for step in range(start + 1, run_length.steps + 1):
            if self.keep_rate is not None and self.keep_rate.at(step - 1) != self.keep_rate.at(
                step - 2
            ):
                logger.say(f"step {step}: keeps {self.keep_rate.at(step - 1)} of the tokens")
            state, reported = self.train_step(step - 1)(state, next(batches), teacher)
            reporter.add(step, reported)
            last = step == run_length.steps
            evaluating = last or step % run_length.eval_every == 0
            periodic = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
            stopping = self._stopping(step, stop)
            looking = self.capacity is not None and self.capacity.due(step) and not last
            if evaluating or periodic or stopping or looking:
                reporter.flush()
            if self.capacity is not None and looking and (change := self.capacity.look(step)):
                logger.say(f"step {step}: {change}")
            if evaluating:
                result = evaluate(_weights(state))
                figures = result.figures
                logger.evaluation(
                    step, step / run_length.steps_per_epoch, result, self.model.region_grid
                )
                reporter.restart_clock()
            if evaluating or periodic or stopping:
                extra = {"reporter": reporter.to_json()}
                if self.capacity is not None:
                    extra["capacity"] = self.capacity.to_json()
                logger.sync()
                self._check_workdir()
                self.checkpoints.save(state, step, figures if evaluating else None, extra)
            if stopping and not last:
                self.checkpoints.wait()
                logger.say(f"stopped at step {step}; the same command resumes it")
                return {"step": step, **figures}
        return figures or evaluate(_weights(state)).figures

    def _check_workdir(self) -> None:
        """Raises UserError where the workdir was removed, instead of making a part of it anew."""
        if jax.process_index() == 0 and not (self.workdir / checkpoint.CONFIG_FILE).exists():
            raise UserError(
                f"{str(self.workdir)!r} was removed or moved while the run went on; it ends here, "
                "because nothing could be resumed from what it would still write."
            )

    def train_step(self, step: int) -> Callable[..., tuple[TrainState, StepMetrics]]:
        """Returns the step for the current capacities and keep rates, each compiled once."""
        step_capacity = None if self.capacity is None else self.capacity.at(step)
        rates = None if self.keep_rate is None else self.keep_rate.at(step)
        if (step_capacity, rates) not in self._compiled_steps:
            self._compiled_steps[step_capacity, rates] = self.program.jit_step(step_capacity, rates)
        return self._compiled_steps[step_capacity, rates]

    def batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
        """Iterates over global batches on the devices, a few ahead."""
        config = self.config
        which = {"batch_size": config.batch_size, "seed": config.seed, "start_step": start}
        if config.data.on_device:
            return on_device.train_iterator(config.data, mesh=self.mesh, **which)
        host = data.train_iterator(config.data, **which)
        return data.device_batches(host, lambda b: sharding.shard_batch(self.mesh, b))

    def _stopping(self, step: int, stop: "StopRequest") -> bool:
        """Tells whether to save and stop; the same answer on every process."""
        if peers.joined():
            return self.checkpoints.reached_preemption(step)
        return stop.asked

    def describe(self) -> list[str]:
        """Describes the model, the data and the devices."""
        model, config = self.model, self.config
        num_slots = model.max_tokens
        count = count_parameters(self.program.params["model"])
        frozen = tuple(config.optimizer.freeze)
        learned = sum(
            leaf.size
            for name, leaf in optimizer.flat_names(self.program.params["model"]).items()
            if not optimizer.frozen(f"model/{name}", frozen)
        )
        most = float(flops.macs_per_image(model, np.asarray([num_slots]))[0]) / 1e9
        tokens = f"{num_slots} tokens"
        if model.has_gate:
            tokens = f"{num_slots // 4} to {num_slots} tokens"
        elif model.is_cascade:
            tokens = f"{' or '.join(map(str, model.exit_tokens))} tokens"
        devices = f"{self.mesh.size} x {jax.devices()[0].device_kind}"
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        examples = self.info.train_examples
        epochs = self.run_length.steps / self.run_length.steps_per_epoch
        return [
            f"{config.model.name}: {count:,} parameters"
            + (f" ({learned:,} trained)" if learned != count else "")
            + f", {tokens}, up to {most:.4g} GMACs an image of {shown(model.image_size)}",
            f"{self.info.name}: {examples:,} training and {self.info.eval_examples:,} evaluation "
            f"images, {self.info.num_classes} classes",
            f"{devices} ({axes}), {jax.process_count()} process(es), batch {config.batch_size}, "
            f"{self.run_length.steps:,} steps = {epochs:.4g} epochs, "
            f"compute in {config.dtype}",
            *sharding.describe(self.program.abstract_state, self.program.abstract_state.params),
        ]


def _weights(state: TrainState) -> Any:
    """Returns the parameters to evaluate: the moving average where there is one."""
    return state.params["model"] if state.ema is None else state.ema


def _following(
    config: config_dict.ConfigDict, workdir: pathlib.Path
) -> tuple[config_dict.ConfigDict, dict[str, Any]]:
    """Adds the model options that the weights declare and the config leaves open.

    A resumed run has these in its own config and no longer needs the source.
    """
    if not config.init_from:
        return config, {}
    if checkpoint.has_checkpoint(workdir):
        model = checkpoint.read_config(workdir).get("model", {})
        said = {key: model[key] for key in UNSEEN if key in model and key not in config.model}
    else:
        plain = configs.build_model(config)
        said = weights.declared_options(config.init_from, plain, config.model)
    return configs.with_model_options(config, said), said


def teacher_of(config: config_dict.ConfigDict) -> Teacher | None:
    """Loads the teacher that a config names; None if it names none."""
    options = config.loss.distillation
    return load_teacher(options.teacher, options.model, config) if options.teacher else None


def load_teacher(source: str, name: str, config: config_dict.ConfigDict) -> Teacher:
    """Loads a teacher from a workdir, or from a weights file together with its model's name."""
    if paths.parse(source).is_dir() and weights.file_of(source) is None:
        run = checkpoint.load_run(source)
        teacher = Teacher(model=run.model, variables=run.variables)
    else:
        if not name:
            raise UserError(
                "loss.distillation.teacher is a weights file; name its model with "
                "loss.distillation.model."
            )
        options = config.copy_and_resolve_references()
        with options.unlocked():
            options.model = {"name": name, "num_classes": config.model.num_classes}
        model = configs.build_model(options)
        loaded = weights.load_model(source, model)
        teacher = Teacher(model=loaded.model, variables={"params": loaded.params})
    remedy = "Distil from a model of the same classes."
    ours = config.model.num_classes
    labels.check_count(teacher.model.num_classes, ours, of="The teacher", remedy=remedy)
    return teacher


@dataclasses.dataclass
class StopRequest:
    """Whether the run was asked to stop."""

    asked: bool = False


@contextlib.contextmanager
def _stop_signals() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or Ctrl-C into a request; a second one ends the process at once.

    With several processes JAX itself listens for SIGTERM, so that all stop at the same step, and
    Ctrl-C is passed to it.
    """
    stop = StopRequest()
    several = peers.joined()
    old: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        stop.asked = True
        signal.signal(number, old[number])
        if several:
            signal.raise_signal(signal.SIGTERM)

    with contextlib.suppress(ValueError):  # outside the main thread there are no signals
        for name in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            old[name] = signal.signal(name, ask)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
