"""Runs a trained model on any number of images: static shapes inside, plain arrays outside."""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from msvit_jax import checkpoint, sharding, weights
from msvit_jax.errors import UserError
from msvit_jax.exits import exit_thresholds
from msvit_jax.exits.budget_curve import fitted_thresholds
from msvit_jax.image_size import height_and_width, shown
from msvit_jax.inference import segmenting, shapes
from msvit_jax.inference.calibrate import Calibration, threshold_for
from msvit_jax.inference.cascade import CascadeJob
from msvit_jax.inference.executables import ExecutableCache, carry_name, stage_name
from msvit_jax.inference.images import Images, ImageSource, Reading, open_images
from msvit_jax.inference.job import Job, decide_batches
from msvit_jax.inference.pool import ImagePool
from msvit_jax.inference.predictions import Predictions
from msvit_jax.inference.schedule import PADDING
from msvit_jax.inference.segmenting import Segmented
from msvit_jax.models.interface import SEGMENTATION, ImageModel
from msvit_jax.segmentation import Windows
from msvit_jax.tokens import grid
from msvit_jax.weights.adapt import Report

# Programs in addition to those of the shapes: for batches as they come, and for mixed ones.
_PREPARATION = ("normalize", "store", "take", "store floats", "take floats")


class Predictor:
    """Runs a model on any number of images and computes only the tokens that its gate keeps.

    A gated model runs in two steps. The gate runs on batches in the order of the images. Images
    then wait, each with its token count, until enough can share a static shape (see `schedule`).
    An image that does not fit a shape is run again in one that holds any image.
    A cascade runs stage by stage, each image until an exit is certain enough (see `cascade`).
    Answers do not depend on batch size, devices, layout or order, up to rounding.

    Calls may come from several threads; each has its own queue.

    Attributes:
      model: The model, in the slots layout if it has a gate.
      class_names: Names of the classes; empty if they are not known.
      crop: Share of the short side of image files that is kept.
      exif_orientation: Whether image files are rotated upright by their EXIF data.
      windows: How a segmenter looks at images larger than the model's.
      report: Report on how the parameters of a weights file were used; None otherwise.
    """

    report: Report | None = None
    windows: Windows

    def __init__(
        self,
        model: ImageModel,
        variables: Any,
        *,
        batch_size: int = 32,
        layout: str = "auto",
        buckets: Sequence[int] | None = None,
        row_width: int | None = None,
        threshold: float | None = None,
        thresholds: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        crop: float = 1.0,
        exif_orientation: bool = True,
        mesh: Mesh | None = None,
        windows: Windows | None = None,
        max_programs: int = 28,
    ) -> None:
        """Sets up the predictor; programs are compiled on first use, or by `warm_up`.

        Args:
          model: A model of the registry.
          variables: Variables for `model.apply`.
          batch_size: Number of images run at a time, rounded up to a multiple of the number of
            devices.
          layout: "slots" computes all tokens, "budget" the same number for every image of a batch,
            "rows" packs several images into each row; "auto" uses budgets for full batches and the
            cheaper of budgets and rows for the images left at the end. It does not apply to a model
            without a gate.
          buckets: Capacities, in patch tokens per image, of the "budget" shapes; None: about ten in
            even steps. See also `calibrate`.
          row_width: Tokens per row; None: the smallest multiple of 128 that holds any image.
          threshold: Threshold of the gate; None: the model's own. See also `calibrate`.
          thresholds: Thresholds of a cascade, one for each exit but the last: an image leaves at
            the first exit whose largest softmax probability reaches the exit's threshold. None: all
            images leave at the last exit. See also `calibrate_exits`.
          class_names: Names of the classes, in the order of the labels.
          crop: Share of the short side of image files that is kept, as the data's `eval_crop`.
          exif_orientation: Whether image files are rotated upright by their EXIF data, as the
            data's `exif_orientation`.
          mesh: Devices to spread batches over; None: all local devices.
          windows: For a segmenter, how images are looked at; None: in windows of the model's image
            size that only overlap at the end. A run's are those of its evaluation.
          max_programs: Upper bound on the number of programs that are kept compiled.

        Raises:
          UserError: Options do not fit the model or each other.
        """
        self._mesh = mesh or sharding.make_mesh(devices=jax.local_devices())
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}; at least 1 is needed.")
        self._batch = -(-batch_size // self._mesh.size) * self._mesh.size
        self.model: ImageModel = model.with_dense_layout()
        self._threshold = model.threshold if model.has_threshold else None
        if threshold is not None:
            self.threshold = threshold
        self._policy_for = functools.partial(
            shapes.make_policy,
            self.model,
            layout=layout,
            batch=self._batch,
            groups=self._mesh.size,
            row_width=row_width,
            most_shapes=max_programs - len(_PREPARATION) - 1,  # and the gate
        )
        self._policy = self._policy_for(buckets=buckets)
        self._executables = ExecutableCache(self.model, variables, self._batch, self._mesh)
        self._exit_thresholds: tuple[float, ...] | None = None
        if model.is_cascade:
            stages = len(model.exit_tokens)
            self._exit_thresholds = (
                *[exit_thresholds.NEVER] * (stages - 1),
                exit_thresholds.ALWAYS,
            )
        if thresholds is not None:
            self.thresholds = thresholds
        self.class_names = _checked_names(class_names, self.model.num_classes)
        self.windows = windows or Windows(model.image_size)
        self.crop = crop
        self.exif_orientation = exif_orientation

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        which: str = "best",
        *,
        model: str | ImageModel | None = None,
        gmacs_budget: float | None = None,
        **options: Any,
    ) -> "Predictor":
        """Loads a trained run, with its class names and evaluation crop, or a weights file.

        Args:
          path: Workdir of a run, or a weights file of any format that `weights.load` reads.
          which: Checkpoint of a run: 'best', 'latest', or a step.
          model: Model of a weights file: a name of the registry, or a module for other sizes. None:
            the model that the source describes, as our own files and directories by transformers
            and timm do. Positions and patch kernels are resized to the model. Options that the
            source states are adopted or checked, see `weights.load_model` and `report`. Weights
            without a head make a feature extractor, see `Predictions.features`.
          gmacs_budget: Mean GMACs per image for a cascade's run; selects among the thresholds that
            eval.py fitted.
          **options: Options of `Predictor`; they take precedence over what was loaded.

        Raises:
          UserError: The path cannot be loaded (see `checkpoint.load_run` and
            `weights.load_params`), the model of a file is not known, or the budget has no
            thresholds (see `budget_curve.fitted_thresholds`).
        """
        if weights.file_of(path) is not None:
            return cls._load_file(path, model, gmacs_budget, options)
        if not pathlib.Path(path).exists():
            raise UserError(f"There is no weights file or workdir {str(path)!r}.")
        if model is not None:
            raise UserError("model= is for weights files; a run says itself what its model is.")
        step = str(checkpoint.find_step(path, which))  # resolved once: a run may still be improving
        run = checkpoint.load_run(path, step)
        about = checkpoint.read_about(path, step)
        known = {
            "class_names": about.get("class_names"),
            "crop": run.config.data.eval_crop,
            "exif_orientation": run.config.data.exif_orientation,
            "windows": Windows.from_config(run.config.data),
        }
        if gmacs_budget is not None:
            _check_cascade(run.model)
            exit_thresholds.check_budget(gmacs_budget * 1e9, run.model.exit_macs())
            known["thresholds"] = fitted_thresholds(path, gmacs_budget)
        return cls(run.model, run.variables, **{**known, **options})

    @classmethod
    def _load_file(
        cls,
        path: str | pathlib.Path,
        model: str | ImageModel | None,
        gmacs_budget: float | None,
        options: dict[str, Any],
    ) -> "Predictor":
        if gmacs_budget is not None:
            raise UserError("gmacs_budget= is for runs, whose thresholds eval.py has fitted.")
        loaded = weights.load_model(path, model)
        for note in loaded.report.notes:
            if "all zeros" in note:
                warnings.warn(f"{str(path)!r}: {note}", stacklevel=3)
        said = {"crop": loaded.crop, "exif_orientation": loaded.exif_orientation}
        known: dict[str, Any] = {"class_names": loaded.class_names or None}
        known |= {key: value for key, value in said.items() if value is not None}
        predictor = cls(loaded.model, {"params": loaded.params}, **{**known, **options})
        predictor.report = loaded.report
        return predictor

    @property
    def threshold(self) -> float | None:
        """A region is coarse if its probability exceeds this; None if the model has no threshold.

        Setting it does not affect calls that are already running.
        """
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._check_adjustable()
        self._threshold = float(value)

    def _check_adjustable(self) -> None:
        if self._threshold is None:
            raise UserError(
                "This model has no gate with a threshold: all images get the same number of tokens."
            )

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """An image leaves a cascade at the first exit this certain; None for other models."""
        return self._exit_thresholds

    @thresholds.setter
    def thresholds(self, values: Sequence[float]) -> None:
        _check_cascade(self.model)
        self._exit_thresholds = exit_thresholds.check(values, len(self.model.exit_tokens))

    @property
    def buckets(self) -> tuple[int, ...]:
        """Capacities of the "budget" shapes in patch tokens per image; empty if there are none."""
        return tuple(shape.tokens for shape in self._policy.shapes if shape.layout == "budget")

    @property
    def programs(self) -> tuple[str, ...]:
        """Names of all programs that may be compiled, at most `max_programs`."""
        if self.model.is_cascade:
            stages = range(len(self.model.exit_tokens))
            carries = [carry_name(stage) for stage in stages[1:]]
            return (*_PREPARATION, *map(stage_name, stages), *carries)
        gate = ("gate",) if self._executables.gated else ()
        return (*_PREPARATION, *gate, *(shape.name for shape in self._policy.shapes))

    @property
    def compiled(self) -> tuple[str, ...]:
        """Names of the programs that have been compiled."""
        return self._executables.compiled

    def warm_up(self) -> "Predictor":
        """Compiles and runs every program, so that no later call waits for a compilation.

        Programs are compiled in parallel, one thread per CPU core.
        """
        pixels = np.zeros((1, *self.model.image_shape), np.uint8)
        waiting = len(self.model.exit_tokens if self.model.is_cascade else self._policy.shapes)
        for given in (pixels, pixels.astype(np.float32)):  # programs that mix images of batches
            pool = ImagePool(self._executables, waiting)
            pool.add([0], self._executables.upload(given))
            pool.batch_of([PADDING] * self._batch)
        if self.model.is_cascade:
            # No exit is ever certain enough: every stage runs and passes all images to the next.
            self._cascade(
                self._open(pixels), [exit_thresholds.NEVER] * (len(self.model.exit_tokens) - 1)
            )
            return self
        images = self._executables.normalized(self._executables.upload(pixels))
        coarse = None
        if self._executables.gated:
            coarse = np.asarray(self._executables.run_gate(images, self.threshold).coarse)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            start = lambda shape: self._executables.answer(shape, images, coarse)  # noqa: E731
            jax.block_until_ready(list(threads.map(start, self._policy.shapes)))
        return self

    def __call__(
        self,
        images: Images,
        *,
        on_error: str = "stop",
        answered: Callable[[list[int], Predictions], Any] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Predictions:
        """Classifies images.

        Args:
          images: Pixels, uint8 [N, h, w, 3] of 0 to 255, or floats already normalized with the
            model's mean and std; a sequence of [h, w, 3] arrays; or paths of image files, whose
            center is cut out and resized. (h, w) is the model's image size.
          on_error: 'stop' at a file that cannot be read, or 'skip' it (see `Predictions.failed`).
          answered: Callback that gets the indices of images and their answers as they are
            completed, in order of completion. The result contains all of them as well.
          progress: Callback that gets the number of images answered since it was last called.

        Raises:
          UserError: There are no images, they have a wrong size, shape or type, NaN pixels or
            floats that are not normalized, or a file cannot be read; or the model is a segmenter.
        """
        if self.model.task == SEGMENTATION:
            raise UserError("This model answers pixel by pixel; call predictor.segment(images).")
        return self._answer(images, on_error, answered, progress)

    def segment(
        self,
        images: Images | Sequence[Any],
        *,
        windows: Windows | None = None,
        probabilities: bool = False,
        on_error: str = "stop",
    ) -> Iterator[Segmented]:
        """Gives every pixel a class, image by image; few images are in memory at a time.

        Args:
          images: Pixels, uint8 [N, H, W, 3]; a sequence of uint8 [H, W, 3] arrays of any sizes; or
            paths of image files, which are not cropped.
          windows: How images are looked at; None: `Predictor.windows`.
          probabilities: Whether answers hold the probabilities of all classes.
          on_error: 'stop' at a file that cannot be read, or 'skip' it: its answer says why.

        Yields:
          An answer for each image, in the order of the images.

        Raises:
          UserError: The model is no segmenter, there are no images, one is no uint8 [H, W, 3], or a
            file cannot be read.
        """
        if self.model.task != SEGMENTATION:
            raise UserError("This model classifies whole images; call predictor(images).")
        windows = windows or self.windows
        if windows.shape != height_and_width(self.model.image_size):
            raise UserError(
                f"Windows of {shown(windows.size)}; the model takes {shown(self.model.image_size)}."
            )
        reading = dataclasses.replace(self.reading(), on_error=on_error)
        return segmenting.segment(
            self.answer_windows,
            segmenting.open_any(images, reading),
            windows,
            patch_size=self.model.patch_size,
            batch=self._batch,
            probabilities=probabilities,
        )

    def answer_windows(self, images: Images) -> Predictions:
        """Answers windows of a segmenter with logits of patches, which `segment` puts together.

        Args:
          images: Windows of the model's size, as in `__call__`.

        Raises:
          UserError: The model is no segmenter, or images are unusable; see `__call__`.
        """
        if self.model.task != SEGMENTATION:
            raise UserError("This model classifies whole images; call predictor(images).")
        return self._answer(images, "stop", None, None)

    def _answer(
        self,
        images: Images,
        on_error: str,
        answered: Callable[[list[int], Predictions], Any] | None,
        progress: Callable[[int], Any] | None,
    ) -> Predictions:
        """Answers images of the model's size; arguments as in `__call__`."""
        source = self._open(images, on_error)
        job: Job | CascadeJob
        if self.thresholds is not None:
            stages = len(self.model.exit_tokens)
            job = CascadeJob(self._executables, stages, self.thresholds, source.count)
        else:
            job = Job(self._executables, self._policy, source.count)

        def tell(numbers: list[int]) -> None:
            if answered and numbers:
                answered(numbers, self._predictions(job, numbers))
            if progress:
                progress(len(numbers))

        if isinstance(job, CascadeJob):
            job.run(source, tell)
        else:
            job.run(decide_batches(self._executables, source, self.threshold), tell)
        job.logits[list(source.failed)] = np.nan
        return self._predictions(job, slice(None), source.failed)

    def _predictions(
        self,
        job: Job | CascadeJob,
        part: list[int] | slice,
        failed: Mapping[int, str] | None = None,
    ) -> Predictions:
        """Builds the predictions for some of a job's images."""
        known: dict[str, Any] = {"class_names": self.class_names, "failed": failed or {}}
        if isinstance(job, CascadeJob):
            tokens = self.model.exit_tokens[job.exit_index[part]].astype(np.int32)
            return Predictions(job.logits[part], tokens, exit_index=job.exit_index[part], **known)
        merge_maps = None if job.merge_maps is None else job.merge_maps[part]
        features = jax.tree.map(lambda x: x[part], job.features)
        made = Predictions(
            job.logits[part], job.tokens[part], merge_maps=merge_maps, features=features, **known
        )
        regions = self.model.region_grid
        if regions is None or job.coarse is None or job.probability is None:
            return made
        shape = (len(made), *regions)
        return dataclasses.replace(
            made,
            coarse=job.coarse[part].reshape(shape) > 0.5,
            coarse_probability=job.probability[part].reshape(shape),
        )

    def _cascade(self, source: ImageSource, thresholds: Sequence[float]) -> CascadeJob:
        stages = len(self.model.exit_tokens)
        job = CascadeJob(self._executables, stages, thresholds, source.count)
        job.run(source, lambda numbers: None)
        return job

    def calibrate_exits(self, images: Images, gmacs_budget: float) -> tuple[float, ...]:
        """Sets a cascade's thresholds for a mean cost on a sample of images.

        Uses the geometric scheme, which needs no labels (`exit_thresholds.geometric_within`), and
        takes the thresholds that come closest to the budget without exceeding it.

        Args:
          images: Sample of images, as in `__call__`; all exits are computed for all of them.
          gmacs_budget: Mean GMACs per image.

        Returns:
          The thresholds.

        Raises:
          UserError: The budget is below the first exit's cost, or the model is not a cascade.
        """
        _check_cascade(self.model)
        macs = self.model.exit_macs()
        exit_thresholds.check_budget(gmacs_budget * 1e9, macs)
        found = exit_thresholds.geometric_within(self.certainty(images), macs, gmacs_budget * 1e9)
        self.thresholds = found
        return found

    def certainty(self, images: Images) -> np.ndarray:
        """Computes all exits of a cascade for all images and returns their certainty, [N, stages].

        Raises:
          UserError: The model is not a cascade; see also `__call__`.
        """
        _check_cascade(self.model)
        never = [exit_thresholds.NEVER] * (len(self.model.exit_tokens) - 1)
        return self._cascade(self._open(images), never).certainty

    def _open(self, images: Images, on_error: str = "stop") -> ImageSource:
        return open_images(images, self.reading(on_error))

    def reading(self, on_error: str = "stop") -> Reading:
        """Returns how images are read for the model.

        Args:
          on_error: 'stop' at a file that cannot be read, or 'skip' it.
        """
        model = self.model
        return Reading(
            size=model.image_size,
            crop=self.crop,
            exif_orientation=self.exif_orientation,
            on_error=on_error,
            mean=model.mean,
            std=model.std,
        )

    def calibrate(
        self,
        images: Images,
        tokens: float = 100.0,
        *,
        on_error: str = "stop",
        fit_buckets: bool = False,
    ) -> Calibration:
        """Sets the gate's threshold so that a sample's images have `tokens` tokens on average.

        Takes the threshold whose mean comes closest to `tokens` without exceeding it. Only the gate
        runs.

        Args:
          images: Sample of images, as in `__call__`.
          tokens: Mean number of active patch tokens per image.
          on_error: 'stop' at a file that cannot be read, or 'skip' it.
          fit_buckets: Whether to choose the capacities of the "budget" shapes anew, as many as
            before, for the tokens that the sample's images then have: less padding, and programs
            that are compiled on their next use, or by `warm_up`.

        Returns:
          The threshold and the mean number of tokens that it gives on the sample.

        Raises:
          UserError: No threshold gives such a mean (the message states the range), the model has no
            threshold, no image can be read, or there are no buckets to fit.
        """
        self._check_adjustable()
        count = len(self.buckets)
        if fit_buckets and not count:
            raise UserError('fit_buckets is for layout="auto" or "budget"; the others have none.')
        batches = decide_batches(self._executables, self._open(images, on_error), self.threshold)
        probability = [
            np.asarray(batch.decisions.probability)[: len(batch.numbers)]
            for batch in batches
            if batch.decisions is not None
        ]
        if not probability:
            raise UserError("None of the images can be read, so there is nothing to calibrate on.")
        found = np.concatenate(probability)
        calibration = threshold_for(found, tokens)
        self.threshold = calibration.threshold
        if fit_buckets:
            needed = grid.count_tokens(found > calibration.threshold)
            # The whole grid is a bucket besides.
            fitted = shapes.fitted_buckets(self.model, needed, max(1, count - 1))
            self._policy = self._policy_for(buckets=fitted)
            self._executables.keep(self.programs)
        return calibration


def _check_cascade(model: ImageModel) -> None:
    if not model.is_cascade:
        raise UserError("This model is no cascade: it has one exit, so there are no thresholds.")


def _checked_names(names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    if names and len(names) != classes:
        raise UserError(f"{len(names)} class names were given; the model has {classes} classes.")
    return tuple(names or ())
