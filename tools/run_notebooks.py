"""Runs notebooks from top to bottom.

    python tools/run_notebooks.py notebooks/*.ipynb         # for real; outputs are kept
    python tools/run_notebooks.py --fast notebooks/*.ipynb  # few examples, elsewhere; files stay

In the fast mode programs are compiled without optimizations and once for all notebooks, which
share a temporary folder. For real they keep everything in `runs` beside them, the data set, too,
so that no path of this machine gets into their outputs. The first error ends it, with the cell that
failed.
"""

import argparse
import os
import pathlib
import tempfile
import time

import nbformat
from nbclient import NotebookClient

TIMEOUT = 1800  # seconds for a cell


def run(
    path: pathlib.Path, folder: pathlib.Path, environment: dict[str, str]
) -> nbformat.NotebookNode:
    """Executes a notebook in a folder and returns it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
        record_timing=False,  # would make every run another file
    )
    return client.execute(env=environment)


def fast(paths: list[pathlib.Path]) -> None:
    """Tries whether notebooks run."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        environment = {
            **os.environ,
            "MSVIT_NOTEBOOK_FAST": "1",
            "TFDS_DATA_DIR": str(folder / "data"),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        }
        for path in paths:
            timed(path, folder, environment)


def in_place(paths: list[pathlib.Path]) -> None:
    """Runs notebooks where they lie and writes them back."""
    environment = {**os.environ, "TFDS_DATA_DIR": "runs/data"}
    for path in paths:
        nbformat.write(timed(path, path.parent, environment), path)


def timed(
    path: pathlib.Path, folder: pathlib.Path, environment: dict[str, str]
) -> nbformat.NotebookNode:
    """Runs a notebook and says how long it took."""
    start = time.perf_counter()
    notebook = run(path, folder, environment)
    print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return notebook


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="few examples; writes nothing")
    parser.add_argument("notebooks", nargs="+", type=pathlib.Path)
    given = parser.parse_args()
    (fast if given.fast else in_place)(given.notebooks)
