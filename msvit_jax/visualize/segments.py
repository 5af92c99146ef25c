"""Draws what a segmenter answers beside where its tokens went."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from msvit_jax import checkpoint, paths
from msvit_jax.data import decode, pipeline, segmentation, sources
from msvit_jax.data.image_files import shown
from msvit_jax.errors import UserError
from msvit_jax.inference import Predictor
from msvit_jax.inference.segmenting import Segmented
from msvit_jax.pictures.maps import GATE_COLUMNS, enlarge, gate_strip, mask_overlay, merge_map
from msvit_jax.pictures.sheet import Column, Strip, panel, save
from msvit_jax.segmentation import IGNORED, Windows, palette
from msvit_jax.tokens.grid import REGION
from msvit_jax.visualize.examples import ON_SHEET, SHEET, Drawn, reducing_layers, shown_stages


@dataclasses.dataclass(frozen=True)
class MaskedExample:
    """An image to draw: uint8 [h, w, 3] pixels, its name, and its mask [h, w] if it is known."""

    image: np.ndarray
    name: str
    mask: np.ndarray | None = None


def draw_run(
    run: checkpoint.Run, out: pathlib.Path | str, *, files: Sequence[str] = (), count: int = 8
) -> Drawn:
    """Draws a segmenter's answers for image files, or for examples of its evaluation split.

    The center of each image is drawn, of a window's shape and resized to it.

    Args:
      run: A run of a segmenter.
      out: Folder for the pictures and the contact sheet.
      files: Paths of images; empty: examples of the evaluation split.
      count: Number of examples if there are no files.

    Raises:
      UserError: The folder cannot be written, or images are unusable.
    """
    config = run.config.data
    paths.check_writable(out, make=False)  # before the work
    examples = _from_files(files, config) if files else _from_dataset(config, count)
    predictor = Predictor(
        run.model,
        run.variables,
        batch_size=min(ON_SHEET, len(examples)),
        layout="slots",
        class_names=run.class_names or None,
    )
    windows = Windows(config.image_size)
    answers = list(predictor.segment([e.image for e in examples], windows=windows))
    layers = reducing_layers(run.model)
    strips = [_strip(e, a, predictor) for e, a in zip(examples, answers, strict=True)]
    titles = _headings(examples[0], answers[0], layers)
    out = paths.check_writable(out)
    for number, (strip, example) in enumerate(zip(strips, examples, strict=True)):
        stem = pathlib.Path(example.name).stem.replace(" ", "_")
        save(panel([strip], titles), out / f"{number:03d}_{stem}.png")
    return Drawn(strips, save(panel(strips[:ON_SHEET], titles), out / SHEET))


def _from_files(files: Sequence[str], config: ConfigDict) -> list[MaskedExample]:
    how = (config.image_size, 1.0, config.exif_orientation)
    return [
        MaskedExample(decode.read_file(file, *how), shown(pathlib.Path(file).name))
        for file in files
    ]


def _from_dataset(config: ConfigDict, count: int) -> list[MaskedExample]:
    """Takes examples evenly spaced over the evaluation split."""
    if count < 1:
        raise UserError(f"The number of examples must be at least 1, not {count}.")
    builder = sources.open_dataset(config.name, config.data_dir, config.target)
    split = sources.open_split(builder, config.eval_split, config.target)
    classes = segmentation.mask_classes(builder, config)
    found = []
    for index in np.unique(np.linspace(0, len(split) - 1, count).astype(int)):
        pixels, mask = segmentation.read(split[index], classes, config.exif_orientation)
        image = pipeline.center_crop({**split[index], "image": pixels}, config.image_size, 1.0)
        center = decode.decode_mask(mask, config.image_size, 1.0)
        found.append(MaskedExample(image, f"{config.eval_split} {index}", center))
    return found


def _strip(example: MaskedExample, answer: Segmented, predictor: Predictor) -> Strip:
    colors = palette(predictor.model.num_classes)
    pictures = [enlarge(example.image), mask_overlay(example.image, answer.labels, colors)]
    caption = example.name
    if example.mask is not None:
        pictures.append(mask_overlay(example.image, example.mask, colors))
        counted = example.mask != IGNORED
        right = (answer.labels == example.mask)[counted]
        caption += f" · {right.mean():.1%} of the pixels right" if counted.any() else " · no class"
    coarse, probability = answer.coarse, answer.coarse_probability
    tokens = f"{int(answer.tokens[0])} tokens"
    if coarse is not None and probability is not None:
        decided = coarse[0].reshape(-1), probability[0].reshape(-1)
        pictures += gate_strip(example.image, *decided, coarse.shape[1:]).pictures[1:]
        tokens = f"{int(answer.tokens[0])} of {REGION**2 * coarse[0].size} tokens"
    if answer.merge_maps is not None:
        regions = None if coarse is None else coarse[0]
        pictures += [
            merge_map(example.image, answer.merge_maps[0, stage], coarse=regions)
            for stage in shown_stages(answer.merge_maps.shape[1])
        ]
    return Strip(pictures, f"{caption} · {tokens}")


def _headings(example: MaskedExample, answer: Segmented, layers: Sequence[int]) -> list[Column]:
    columns = [Column("image"), Column("answer")]
    if example.mask is not None:
        columns.append(Column("mask"))
    if answer.coarse is not None:
        columns += GATE_COLUMNS[1:]
    if answer.merge_maps is not None:
        columns += [Column(f"layer {layers[stage]}") for stage in shown_stages(len(layers))]
    return columns
