"""Classifies images, or their pixels, with the functions in the directory of this file.

    python run.py photo.jpg folder/ images.npy [--batch=32] [--out=answers.npz] [--on_error=stop]

Needs jax and numpy, and Pillow for image files; .npy files hold pixels [N, h, w, 3] of 0 to 255.
Files that cannot be read are named and skipped, or, with --on_error=stop, end the program before
any image is classified. --threshold sets the threshold of a mixed-scale model's gate,
--thresholds=0.9,0.8 those of a cascade's exits. about.json describes the functions' inputs and
outputs. In Python: `Model().classify(pixels)`, and `Model().segment(pixels)` where the model
segments: then a line says which classes cover most of an image, and --out has the labels of pixels.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

HERE = pathlib.Path(__file__).resolve().parent
ABOUT, SHA256 = "about.json", "sha256"  # the description, and the entry with digests of the files
FLATBUFFERS = "flatbuffers.zip"  # JAX needs it to read exported functions; an installed copy wins


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads arrays by name: 8 bytes of header length, a JSON header, little-endian numbers."""
    raw = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        numbers = raw[start + first : start + end].view({"F32": np.float32}[entry["dtype"]])
        arrays[name] = numbers.reshape(entry["shape"])
    return arrays


def sealed(about: dict[str, Any], directory: pathlib.Path, files: Sequence[str]) -> dict[str, Any]:
    """Adds digests to a description: of the files that it names, and its own."""
    digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in files}
    plain = json.dumps(about, sort_keys=True).encode()
    return {**about, SHA256: {**digests, ABOUT: hashlib.sha256(plain).hexdigest()}}


def read_about(directory: pathlib.Path) -> dict[str, Any]:
    """Reads about.json, and checks it and the files that it names.

    Raises:
      ValueError: Something is not as it was exported.
    """
    about = json.loads((directory / ABOUT).read_text())
    found = about.pop(SHA256, None)
    if found is None:  # an older export
        return about
    now = sealed(about, directory, [name for name in found if name in os.listdir(directory)])
    changed = sorted(name for name in found if found[name] != now[SHA256].get(name))
    if changed or ABOUT not in found:
        raise ValueError(f"{', '.join(changed) or ABOUT} changed after the export")
    return about


def module(name: str, package: str) -> Any:
    """A module that exports hold a copy of: the library's own, or in an export that copy."""
    if __package__:
        return importlib.import_module(f"msvit_jax.{package}.{name}")
    sys.path.append(str(HERE))
    return importlib.import_module(name)


def image_files() -> Any:
    """The module that finds and decodes image files."""
    try:
        return module("image_files", "data")
    except ImportError as error:
        raise ValueError(f"image files need Pillow: pip install pillow ({error})") from error


class Model:
    """The exported functions of a directory, their weights, and their description.

    Attributes:
      about: Contents of about.json.
    """

    def __init__(self, directory: str | pathlib.Path = HERE) -> None:
        """Reads the directory; a function is compiled for each batch size it is called with."""
        self._directory = pathlib.Path(directory)
        sys.path.append(str(self._directory / FLATBUFFERS))
        try:
            self.about = read_about(self._directory)
            weights = read_safetensors(self._directory / self.about["weights"])
            self._weights = {name: jax.device_put(value) for name, value in weights.items()}
            self._functions = [self._read(entry["file"]) for entry in self.about["functions"]]
        except Exception as error:  # damaged files raise nearly anything
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(
                f"{str(directory)!r} cannot be read, its files are damaged or not all there "
                f"({why}). Copy it or export anew."
            ) from error

    def _read(self, file: str) -> Any:
        exported = export.deserialize(bytearray((self._directory / file).read_bytes()))
        (names, *_), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        own = {name: self._weights[name] for name in names}
        call = jax.jit(exported.call)
        return lambda *inputs: call(own, *inputs)

    def classify(
        self,
        images: np.ndarray,
        *,
        batch: int = 32,
        threshold: float | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs the model on pixels [N, h, w, 3].

        Args:
          images: [N, h, w, 3], pixels of 0 to 255 in the type that about.json names.
          batch: Number of images run at a time; the last batch is padded with zeros.
          threshold: Threshold of a mixed-scale model's gate; None: about.json's.
          thresholds: Thresholds of a cascade's exits but the last; None: about.json's.

        Returns:
          The functions' outputs by name, each [N, ...]; for a cascade, `exit_index`, the exit at
          which each image left (from 0), and `logits` of that exit.
        """
        images = check_pixels(images, self.about)
        batch = min(batch, len(images))
        if self.about["kind"] == "cascade":
            return self._cascade(images, batch, thresholds or self.about["thresholds"])
        rest = []
        if self.about.get("threshold") is not None:
            rest = [np.float32(self.about["threshold"] if threshold is None else threshold)]
        answers = self._in_batches(self._functions[0], images, batch, rest)
        if not answers.get("within_capacity", np.ones(1, bool)).all():
            # The others run again where every image fits.
            left = np.flatnonzero(~answers["within_capacity"])
            again = self._in_batches(self._functions[1], images[left], batch, rest)
            for name, values in again.items():
                answers[name][left] = values
        return answers

    def segment(self, images: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
        """Runs a model that segments; arguments as in `classify`.

        Returns:
          The functions' outputs by name, and `labels` [N, h, w] uint8, each pixel's class. Logits
          are those of patches.
        """
        answers = self.classify(images, **options)
        upsample = module("upsampling", "segmentation").upsample
        labels = [upsample(x, images.shape[1:3]).argmax(axis=2) for x in answers["logits"]]
        return {**answers, "labels": np.stack(labels).astype(np.uint8)}

    def _in_batches(
        self, function: Any, images: np.ndarray, batch: int, rest: Sequence[Any]
    ) -> dict[str, np.ndarray]:
        parts = [
            jax.device_get(function(_filled(images[start : start + batch], batch), *rest))
            for start in range(0, len(images), batch)
        ]
        return {name: np.concatenate([p[name] for p in parts])[: len(images)] for name in parts[0]}

    def _cascade(
        self, images: np.ndarray, batch: int, thresholds: Sequence[float]
    ) -> dict[str, np.ndarray]:
        last = len(self._functions) - 1
        waiting: list[list[tuple[int, Any]]] = [[(i, None) for i in range(len(images))]]
        waiting += [[] for _ in range(last)]  # per stage: images and arrays of the stage before
        logits: list[Any] = [None] * len(images)
        exit_index = np.zeros(len(images), np.int32)
        while any(waiting):
            # The last stage that has a full batch, or else the first that has any image.
            full = [stage for stage in range(last + 1) if len(waiting[stage]) >= batch]
            stage = full[-1] if full else next(s for s in range(last + 1) if waiting[s])
            now, waiting[stage] = waiting[stage][:batch], waiting[stage][batch:]
            numbers, handed = zip(*now, strict=True)
            inputs = [_filled(images[list(numbers)], batch)]
            if stage:
                inputs.append(jax.tree.map(lambda *rows: _filled(np.stack(rows), batch), *handed))
            done = jax.device_get(self._functions[stage](*inputs))
            sure = softmax(done["logits"]).max(axis=1)
            for row, number in enumerate(numbers):
                if stage == last or sure[row] >= thresholds[stage]:
                    logits[number], exit_index[number] = done["logits"][row], stage
                else:
                    carried = jax.tree.map(lambda x: x[row], done["handed"])  # noqa: B023
                    waiting[stage + 1].append((number, carried))
        return {"logits": np.stack(logits), "exit_index": exit_index}


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Pads rows with zeros to `count`."""
    missing = np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)
    return np.concatenate([rows, missing]) if len(missing) else rows


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits [N, classes], in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def covered(answers: dict[str, np.ndarray]) -> np.ndarray:
    """Shares of the pixels that each class covers: [N, classes]."""
    classes = answers["logits"].shape[-1]
    pixels = answers["labels"].reshape(len(answers["labels"]), -1)
    return np.stack([np.bincount(x, minlength=classes) / len(x) for x in pixels])


def read_files(
    names: Sequence[str], about: dict[str, Any]
) -> tuple[list[str], list[np.ndarray], list[str]]:
    """Reads image files, the images below folders, and .npy files of pixels.

    Args:
      names: Files, folders or patterns.
      about: Contents of about.json.

    Returns:
      Names of images, pixels [h, w, 3] of each, and a message for each file that cannot be read.

    Raises:
      ValueError: A name matches no file.
    """
    named: list[str] = []
    images: list[np.ndarray] = []
    bad: list[str] = []
    for name in names:
        read = read_npy(name, about) if name.endswith(".npy") else read_images(name, about)
        for image, pixels in read:
            if isinstance(pixels, str):
                bad.append(f"{image}: {pixels}")
            else:
                named.append(image)
                images.append(pixels)
    return named, images, bad


def read_npy(name: str, about: dict[str, Any]) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yields the images of a file, each with its name; for a bad file, its name and the error."""
    try:
        pixels = np.load(name)
        pixels = check_pixels(pixels[None] if pixels.ndim == 3 else pixels, about)
    except Exception as error:  # damaged files make NumPy raise nearly anything
        yield name, " ".join(str(error).split()) or type(error).__name__
        return
    for number, image in enumerate(pixels):
        yield name if len(pixels) == 1 else f"{name}[{number}]", image


def read_images(name: str, about: dict[str, Any]) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yields the names of image files, each with its pixels or the reason it cannot be read."""
    images = image_files()
    found = images.find([name])
    for line in images.passed_over_lines(found.passed_over):
        print(f"passed over: {line}", file=sys.stderr)
    how = (about["image_size"], about["crop"], about.get("exif_orientation", True))
    for file in found.files:
        try:
            yield images.shown(file), images.read_image(file, *how)
        except images.ImageError as error:
            yield images.shown(file), str(error)


def check_pixels(images: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """Checks pixels and converts them to the type that the functions take.

    Raises:
      ValueError: The shape is not [N, h, w, 3], there are no images, or the type does not fit.
    """
    height, width = np.broadcast_to(about["image_size"], 2).tolist()  # one number or two
    dtype = np.dtype(about["pixels"])
    if images.ndim != 4 or not len(images) or images.shape[1:] != (height, width, 3):
        raise ValueError(f"images are [N, {height}, {width}, 3], not {images.shape}")
    if not np.can_cast(images.dtype, dtype):
        raise ValueError(f"images are {dtype} of 0 to 255, not {images.dtype}")
    return images.astype(dtype, copy=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Classifies the images named on the command line and prints a line for each."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("files", nargs="+", help="image files, folders, or .npy files of pixels")
    parser.add_argument("--batch", type=int, default=32, help="images run at a time")
    parser.add_argument("--threshold", type=float, help="of a mixed-scale model's gate")
    parser.add_argument("--thresholds", help="of a cascade's exits: 0.9,0.8")
    parser.add_argument("--out", help=".npz file for all outputs")
    parser.add_argument(
        "--on_error", choices=("skip", "stop"), default="skip", help="what to do with bad files"
    )
    given = parser.parse_args(arguments)
    if given.batch < 1:
        raise ValueError(f"--batch={given.batch}: at least 1 is needed")
    if not given.out:
        run_files(given)
        return
    with whole_file(given.out if given.out.endswith(".npz") else f"{given.out}.npz") as file:
        np.savez(file, allow_pickle=False, **run_files(given))


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[Any]:
    """Opens a temporary file that replaces `path` at the end, unless there is an error."""
    try:
        with open(f"{path}.part", "wb") as file:
            yield file
        os.replace(file.name, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.part")


def run_files(given: argparse.Namespace) -> dict[str, np.ndarray]:
    """Reads and classifies images and prints the results."""
    model = Model()
    named, images, bad = read_files(given.files, model.about)
    for line in bad:
        print(f"skipped {line}" if given.on_error == "skip" else line, file=sys.stderr)
    if bad and given.on_error == "stop":
        raise ValueError(f"{len(bad)} files cannot be read; nothing was classified")
    if not images:
        raise ValueError("none of the files can be read")
    thresholds = [float(t) for t in given.thresholds.split(",")] if given.thresholds else None
    segments = model.about["task"] == "segmentation"
    answers: dict[str, Any] = (model.segment if segments else model.classify)(
        np.stack(images), batch=given.batch, threshold=given.threshold, thresholds=thresholds
    )
    shares = covered(answers) if segments else softmax(answers["logits"])
    classes = model.about["class_names"] or range(shares.shape[1])
    for row, name in enumerate(named):
        most = np.argsort(-shares[row], kind="stable")[: 3 if segments else 1]
        found = [f"{classes[c]}  {shares[row, c]:.4f}" for c in most if shares[row, c]]
        more = [f"{key} {answers[key][row]}" for key in ("tokens", "exit_index") if key in answers]
        print("  ".join([name, *found, *more]))
    return answers


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # file names need not be text
        if isinstance(stream, io.TextIOWrapper):  # notebooks have others
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
