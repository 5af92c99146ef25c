"""The files of one checkpoint: each process reads them for itself, and checks what it reads.

`checkpoint` decides which checkpoints there are; this is what is inside of one.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from msvit_jax import digests, extras, paths
from msvit_jax.tree import path_name

with extras.needed("train"):
    import orbax.checkpoint as ocp
    from absl import logging

ITEMS = ("model", "trainer", "ema")
DIGESTS, SCORES, SHAPES = "digests", "scores", "shapes"  # keys of the description
_SCORE_FILE = "metrics/metrics"  # what Orbax reads


def read_about(directory: pathlib.Path) -> dict[str, Any]:
    """Reads the description in a checkpoint's directory.

    Raises:
      ValueError: It is damaged.
    """
    with quietly():
        found = ocp.Checkpointer(
            ocp.JsonCheckpointHandler(), multiprocessing_options=_alone()
        ).restore(directory / "about")
    about, sealed = digests.unseal(found)
    if (DIGESTS in about) != sealed:
        raise ValueError("its description changed after it was saved")
    return about


def check_digests(item: str, tree: Any, about: Mapping[str, Any]) -> None:
    """Raises ValueError where the arrays of an item are not those that were saved."""
    if DIGESTS not in about:  # a checkpoint from before there were digests
        return
    saved, found = about[DIGESTS].get(item, {}), digests.of_tree(tree)
    # Empty dicts are compared where they were noted; empty tuples are read back as such, too.
    found = {name: d for name, d in found.items() if name in saved or d != digests.EMPTY}
    changed = [name for name in {**saved, **found} if saved.get(name) != found.get(name)]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ValueError(f"{item}/{changed[0]}{more} changed after it was saved")


def shapes_of(tree: Any) -> dict[str, list[int]]:
    """Shapes of a tree's arrays by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): list(np.shape(leaf)) for path, leaf in leaves}


def _check_claims(listed: Any, shapes: Mapping[str, list[int]] | None) -> None:
    """Raises ValueError for arrays or chunks that are larger than what was saved.

    Reading takes the memory that they claim, and ends the process where there is not as much.
    """
    for path, array in jax.tree_util.tree_leaves_with_path(listed):
        name, shape = path_name(path), list(array.shape or ())
        if shapes is not None and shape != shapes.get(name):
            raise ValueError(f"{name} has the shape {shape}, {shapes.get(name)} was saved")
        storage = array.storage
        chunk = (storage.chunk_shape if storage is not None else None) or ()
        if len(chunk) > len(shape) or any(
            part > max(whole, 1) for part, whole in zip(chunk, shape, strict=False)
        ):
            raise ValueError(f"{name} has chunks of {list(chunk)} for a shape of {shape}")


def read_tree(path: pathlib.Path, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads an item as NumPy arrays, in dicts and lists.

    Args:
      path: Folder of the item.
      about: Description of the checkpoint, whose shapes the arrays must have; None: any shapes.
    """
    with quietly():
        checkpointer = ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone()),
            multiprocessing_options=_alone(),
        )
        listed = checkpointer.metadata(path).item_metadata
        if listed is None:
            raise ValueError(f"the list of arrays in {path.name} is damaged")
        tree = listed.tree
        _check_claims(tree, (about or {}).get(SHAPES, {}).get(path.name))
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, restore_args=as_numpy)


def score_of(directory: pathlib.Path) -> float | None:
    """Reads a checkpoint's score; None if it was not evaluated, or is damaged."""
    named = _named_score(directory)
    return None if named is None else next(iter(named.values()))


def _named_score(directory: pathlib.Path) -> dict[str, float] | None:
    """Reads the one figure that a checkpoint is compared by, with its name."""
    try:
        about = read_about(directory)
        found = about[SCORES] if SCORES in about else _read_scores(directory)
        return {name: float(value) for name, value in found.items()} if found else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_scores(directory: pathlib.Path) -> Any:
    return json.loads((directory / _SCORE_FILE).read_text())


def mend_score(directory: pathlib.Path) -> None:
    """Writes anew, or takes away, the file of a checkpoint's score where it is damaged.

    Orbax fails on such a file.
    """
    file, score = directory / _SCORE_FILE, _named_score(directory)
    try:
        read = _read_scores(directory)
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        read = None
    if score and read != score:
        paths.write_whole(file, json.dumps(score))
    elif not score:
        shutil.rmtree(file.parent, ignore_errors=True)


def _alone() -> Any:
    """Options with which this process reads without the others of its job."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"alone{index}"
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps Orbax quiet for a while: it warns of metadata that our checkpoints do without."""
    before = logging.get_verbosity()
    logging.set_verbosity(min(before, logging.ERROR))  # absl's levels fall with severity
    try:
        yield
    finally:
        logging.set_verbosity(before)
