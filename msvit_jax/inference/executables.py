"""The compiled programs of one model: each static shape is compiled once, before its first use."""

import collections
import threading
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding

from msvit_jax import sharding
from msvit_jax.inference.schedule import Shape
from msvit_jax.models.dvt import Exit
from msvit_jax.models.interface import SEGMENTATION, ImageModel
from msvit_jax.models.output import Features
from msvit_jax.pixels import normalize


@struct.dataclass
class Decisions:
    """The gate's decisions for a batch.

    Attributes:
      coarse: [B, R], 1 where a region is coarse.
      probability: [B, R], probability that a region stays coarse.
    """

    coarse: Array
    probability: Array


@struct.dataclass
class Answers:
    """The model's answers for a batch.

    Attributes:
      logits: [B, classes] float32, or [B, h, w, classes] for segmentation.
      tokens: [B] int32, number of active patch tokens.
      within_capacity: [B] bool, False if an image did not fit the shape and has no answer.
      merge_maps: [B, stages, rows, columns] int16, merge target of each patch after each reduction,
        see `Output.merge_maps`; None for models that do not reduce tokens.
      features: Features of a model without a head; None for models with one.
    """

    logits: Array
    tokens: Array
    within_capacity: Array
    merge_maps: Array | None = None
    features: Features | None = None


class ExecutableCache:
    """Compiles and starts a model's programs; safe to use from several threads.

    Methods do not wait for the devices: they return while results are still being computed.
    """

    def __init__(self, model: ImageModel, variables: Any, batch: int, mesh: Mesh) -> None:
        """Puts the variables on every device.

        Args:
          model: A model of the registry, in the slots layout if it has a gate.
          variables: Variables for `model.apply`.
          batch: Number of images of every call, a multiple of the number of devices.
          mesh: Devices to run on.

        Attributes:
          batch: Number of images of every call.
          answer_shape: Shape of an image's logits: [classes], or [h, w, classes] for segmentation.
          gated: Whether the model has a gate.
        """
        self._model, self._mesh = model, mesh
        self.gated = model.has_gate
        self._split, self._whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._variables = jax.device_put(variables, self._whole)
        self.batch, self.answer_shape = batch, _answer_shape(model)
        self._compiled: dict[str, Callable[..., Any]] = {}
        # All devices must receive the programs of all threads in the same order.
        self._starting = threading.Lock()
        # One lock per program: other programs can run or compile while one compiles.
        self._compiling: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)

    @property
    def compiled(self) -> tuple[str, ...]:
        """Names of the programs compiled so far."""
        return tuple(self._compiled)

    def keep(self, names: Collection[str]) -> None:
        """Forgets all programs but those of these names; calls that still run are not disturbed."""
        with self._starting:
            self._compiled = {name: x for name, x in self._compiled.items() if name in names}

    def upload(self, images: np.ndarray) -> Array:
        """Puts images on the devices: [B, S, S, 3], beginning with them, then zeros.

        Args:
          images: At most B images, of uint8 pixels or normalized floats.
        """
        if len(images) < self.batch:
            padding = np.zeros((self.batch - len(images), *images.shape[1:]), images.dtype)
            images = np.concatenate([images, padding])
        return jax.device_put(images, self._split)

    def normalized(self, batch: Array) -> Array:
        """Normalizes a batch on the devices: float32; floats are normalized already."""
        if batch.dtype != np.uint8:
            return batch
        return self._start("normalize", self._normalized, batch)

    def _normalized(self, images: Array) -> Array:
        if images.dtype != jnp.uint8:
            return images
        return normalize(images, self._model.mean, self._model.std)

    def empty_slots(self, count: int, like: Array) -> Array:
        """Makes an array on every device with slots for images like those of a batch."""
        return jax.device_put(np.zeros((count, *like.shape[1:]), like.dtype), self._whole)

    def store(self, slots: Array, batch: Array, at: np.ndarray) -> Array:
        """Copies a batch's images into slots.

        Args:
          slots: [C, S, S, 3] from `empty_slots` or `store`; it cannot be used any more.
          batch: Batch from `upload`.
          at: [B] int32, slot of each image; C or more leaves it out.
        """
        program = lambda slots, batch, at: slots.at[at].set(batch, mode="drop")  # noqa: E731
        place = jax.device_put(at, self._whole)
        name = kept_name("store", batch)
        return self._start(name, program, slots, batch, place, donated=0, to=self._whole)

    def take(self, slots: Array, at: np.ndarray) -> Array:
        """Gathers a batch, normalized.

        Args:
          slots: [C, S, S, 3] from `store`.
          at: [B] int32, slots of the images; C or more for zeros.
        """

        def program(slots: Array, at: Array) -> Array:
            return self._normalized(slots.at[at].get(mode="fill", fill_value=0))

        name = kept_name("take", slots)
        return self._start(name, program, slots, jax.device_put(at, self._split))

    def run_gate(self, images: Array, threshold: float | None) -> Decisions:
        """Runs the gate alone.

        Args:
          images: Normalized batch on the devices.
          threshold: Probability above which a region is coarse. None for a gate without a
            threshold, then in all calls.
        """
        model = self._model

        def program(variables: Any, images: Array, threshold: Array | None) -> Decisions:
            gate = model.apply(variables, images, threshold=threshold, method="gate_only")
            return Decisions(gate.coarse, jax.nn.sigmoid(gate.logits))

        if threshold is not None:
            threshold = jax.device_put(np.float32(threshold), self._whole)
        return self._start("gate", program, self._variables, images, threshold)

    def answer(self, shape: Shape, images: Array, coarse: np.ndarray | None) -> Answers:
        """Runs the model in a static shape.

        Args:
          shape: Static shape to run the batch in.
          images: Normalized batch on the devices.
          coarse: [B, R] float32, the gate's decisions; None for a model without a gate.
        """
        model = in_shape(self._model, shape)

        def program(variables: Any, images: Array, coarse: Array | None) -> Answers:
            decided = {} if coarse is None else {"coarse": coarse}
            output = model.apply(variables, images, train=False, **decided)
            merge_maps = output.merge_maps(model.patch_grid)
            if merge_maps is not None:
                merge_maps = merge_maps.astype(jnp.int16)  # kept for every image of a call
            return Answers(
                output.logits, output.tokens, output.answered, merge_maps, output.features
            )

        if coarse is not None:
            coarse = jax.device_put(coarse, self._split)
        return self._start(shape.name, program, self._variables, images, coarse)

    def run_stage(self, stage: int, images: Array, handed: Any) -> Exit:
        """Runs one stage of a cascade.

        Args:
          stage: Index of the stage, from 0.
          images: Normalized batch on the devices.
          handed: Arrays that the previous stage returned for these images; None for stage 0.
        """
        model = self._model

        def program(variables: Any, images: Array, handed: Any) -> Exit:
            return model.apply(variables, images, handed, stage=stage, method="run_stage")

        return self._start(stage_name(stage), program, self._variables, images, handed)

    def carry(self, stage: int, old: Any, new: Any, index: np.ndarray) -> tuple[Any, Any]:
        """Gathers rows of two batches into two new batches.

        Args:
          stage: Index of the stage that will use the rows.
          old: Arrays of one batch.
          new: Arrays of another batch, with the same structure.
          index: [2 B] int32, row numbers; numbers below B select from `old`, others from `new`.

        Returns:
          The rows of the first half of the index, and those of the second half.
        """
        if not jax.tree.leaves(new):  # nothing is reused
            return new, new

        def program(old: Any, new: Any, index: Array) -> tuple[Any, Any]:
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), old, new)
            halves = index.reshape(2, -1)
            first, second = (jax.tree.map(lambda x: x[half], both) for half in halves)  # noqa: B023
            return first, second

        batch = jax.device_put(index, self._whole)
        return self._start(carry_name(stage), program, old, new, batch)

    def _start(
        self,
        name: str,
        function: Callable[..., Any],
        *arguments: Any,
        donated: int | tuple[()] = (),
        to: NamedSharding | None = None,
    ) -> Any:
        with self._starting:
            compiling = self._compiling[name]
        with compiling:
            compiled = self._compiled.get(name)
            if compiled is None:
                with jax.set_mesh(self._mesh):
                    split = to or self._split
                    jitted = jax.jit(function, out_shardings=split, donate_argnums=donated)
                    compiled = jitted.lower(*arguments).compile()
                with self._starting:
                    self._compiled[name] = compiled
        with self._starting:
            return compiled(*arguments)


def _answer_shape(model: ImageModel) -> tuple[int, ...]:
    if model.task != SEGMENTATION:
        return (model.num_classes,)
    cells = [
        -(-side // model.side_multiple) * model.side_multiple // model.patch_size
        for side in model.image_shape[:2]
    ]
    return (*cells, model.num_classes)


def kept_name(name: str, images: Any) -> str:
    """Display name of a program for images of pixels, or for images of floats."""
    return name if images.dtype == np.uint8 else f"{name} floats"


def stage_name(stage: int) -> str:
    """Display name of the program for a cascade's stage; displayed stages count from 1."""
    return f"stage {stage + 1}"


def carry_name(stage: int) -> str:
    """Display name of the program that gathers the arrays a stage reuses."""
    return f"carry to stage {stage + 1}"


def in_shape(model: ImageModel, shape: Shape) -> ImageModel:
    """The same model, for the same variables, in the layout of a shape."""
    if shape.layout == "dense":
        return model
    sizes: dict[str, Any] = {"row_groups": shape.groups}
    if shape.layout == "budget":
        sizes["token_capacity"] = shape.tokens
    if shape.layout == "rows":
        sizes |= {"rows": shape.rows, "row_width": shape.row_width}
    return model.clone(layout=shape.layout, **sizes)
