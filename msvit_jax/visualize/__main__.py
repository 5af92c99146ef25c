"""Draws where a trained model keeps fine tokens, which it merges, and which images exit early.

    python -m msvit_jax.visualize --workdir=DIR [--out=DIR] <images>

Each image is shown next to its mixed-scale grid and its gate's heat map (if the model has a gate),
and next to a map of its tokens after each layer that merges or drops some (if it has such layers),
in a PNG of its own and on a contact sheet. For a cascade the sheet shows images that leave at each
exit, --examples per exit. A segmenter's answer is laid over the image, beside its mask and tokens.
Without images, examples of the run's evaluation split are drawn.
"""

from collections.abc import Sequence

from absl import flags

from msvit_jax import checkpoint, errors, paths
from msvit_jax.models.interface import SEGMENTATION
from msvit_jax.visualize import examples, exits, segments

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Workdir of a trained run with a gate, a reducer or exits.", required=True
)
_OUT = flags.DEFINE_string("out", None, "Folder for the pictures; by default <workdir>/pictures.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "Checkpoint to use: 'best', 'latest' or a step."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of data sets; by default the run's.")
_EXAMPLES = flags.DEFINE_integer(
    "examples", 8, "Number of examples to draw if no images are given."
)
_GMACS_BUDGET = flags.DEFINE_float(
    "gmacs_budget", None, "Mean GMACs per image of a cascade, by thresholds that eval.py fitted."
)


def main(argv: Sequence[str]) -> None:
    """Runs the model, writes the pictures, and prints captions and paths."""
    checkpoint.quiet_orbax()
    run = checkpoint.load_run(_WORKDIR.value, _CHECKPOINT.value)
    if _DATA_DIR.value is not None:
        run.config.data.data_dir = _DATA_DIR.value
    out = _OUT.value or paths.parse(_WORKDIR.value) / "pictures"
    files, count = argv[1:], _EXAMPLES.value
    if run.model.is_cascade:
        drawn = exits.draw_run(
            run,
            out,
            workdir=_WORKDIR.value,
            gmacs_budget=_GMACS_BUDGET.value,
            files=files,
            count=count,
        )
    elif run.model.task == SEGMENTATION:
        drawn = segments.draw_run(run, out, files=files, count=count)
    else:
        drawn = examples.draw_run(run, out, files=files, count=count)
    for strip in drawn.strips:
        print(strip.caption)
    print(f"written to {drawn.sheet.parent}, together in {drawn.sheet}")


if __name__ == "__main__":
    errors.run(main)
