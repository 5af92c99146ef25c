"""Our dense model, and layouts of the mixed-scale one, beside timm's model on PyTorch.

    python studies/peers.py --batch=1,32 [--torch_python=PATH] [--layouts=budget] [--compile]

The same architecture, random weights, forward passes, the same number of threads (on a processor)
or the same device (on a GPU). PyTorch runs in a process of its own, under the interpreter
--torch_python, which needs torch and timm; the two processes take turns, so that one waits while
the other works. timm's attention is PyTorch's fused one; --compile measures torch.compile as well.
Both processes reuse freed memory (`process_tuning.keep_freed_memory`). Where torch or timm is
missing, that is said and our side is measured alone.

A table, then one JSON object as the last line, as of `python -m msvit_jax.benchmark`; records of
timm have the layout "timm" or "timm_compiled", their `speedup` is over our dense model, and
`dense_speedup` is our dense model's over them.
"""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from msvit_jax import errors, process_tuning
from msvit_jax.benchmark import Options, machine, report, sides, turns
from msvit_jax.config import split_override

_MODEL = flags.DEFINE_string(
    "model", "msvit_deit_small_patch16_224", "Name of a mixed-scale model."
)
_BATCH = flags.DEFINE_list("batch", ["1", "32"], "Batch sizes to measure, in images.")
_LAYOUTS = flags.DEFINE_list("layouts", [], "Layouts of the mixed-scale model to measure, too.")
_TOKENS = flags.DEFINE_float("tokens", 128, "Mean number of active patch tokens per image in them.")
_SPREAD = flags.DEFINE_float("spread", 30, "Standard deviation of that number.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Number type of both models."
)
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Number of turns of each side, after two to warm up.")
_SET = flags.DEFINE_multi_string(
    "set", [], "Attribute of the models, e.g. --set=depth=4; may be repeated."
)
_COMPILE = flags.DEFINE_bool("compile", False, "Whether to measure torch.compile, too.")
_THREADS = flags.DEFINE_integer(
    "threads", None, "Number of threads of each side; by default all cores."
)
_PYTHON = flags.DEFINE_string("torch_python", sys.executable, "Interpreter with torch and timm.")

_WORKER = pathlib.Path(__file__).with_name("timm_worker.py")
_REST = 0.25  # seconds between turns
# timm's names of what decides a model's size.
_TIMM_NAMES = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "width": "embed_dim",
    "depth": "depth",
    "heads": "num_heads",
    "num_classes": "num_classes",
}


class Peer:
    """A worker process that answers one request at a time.

    Attributes:
      about: what it told of itself.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Starts the process.

        Raises:
          UserError: it cannot be started.
        """
        environment = {**os.environ, **process_tuning.keep_freed_memory_environment()}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise errors.UserError(
                f"{command[0]!r} cannot be started ({error.strerror}); give --torch_python the "
                "path of a Python that has torch and timm."
            ) from error
        self.about = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer; {"error": ...} if it failed."""
        assert self._process.stdin
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return {"error": "the process has ended"}
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the process has ended"}

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def timm_sizes(overrides: Sequence[str]) -> dict[str, Any]:
    """The overrides of a dense model in timm's names; those of a gate are left out."""
    given = dict(map(split_override, overrides))
    return {_TIMM_NAMES[key]: int(value) for key, value in given.items() if key in _TIMM_NAMES}


def measure(options: Options, batch: int, peer: Peer | None, kinds: Sequence[str]) -> list[Any]:
    """Measures one batch size: our sides, then timm's."""

    def cases() -> list[sides.Case]:
        return sides.forward_sides(options, sides.draw(options, batch))

    return compare(options, batch, cases, peer, kinds)


def compare(
    options: Options,
    batch: int,
    make_cases: Callable[[], Sequence[sides.Case]],
    peer: Peer | None,
    kinds: Sequence[str],
) -> list[dict[str, Any]]:
    """Measures cases of ours and timm's model in turns.

    Args:
      options: Options of the first case, a dense model, which all others are compared with.
      batch: Number of images.
      make_cases: Compiles our cases at that batch size; timm's are made at the same time.
      peer: timm's process; None measures our cases alone.
      kinds: "timm", "timm_compiled".
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_make_peers, options, batch, peer, kinds)
        ours = make_cases()
    made, calls = asked.result(), len(ours[0].calls)
    timed = [[lambda side=side: _rested(lambda: sum(c() for c in side.calls))] for side in ours]
    for kind in made:
        if "error" in made[kind]:
            print(f"{kind} is not measured: {made[kind]['error']}")
        else:
            timed.append([lambda kind=kind: _rested(lambda: _seconds(peer, kind, calls))])
    seconds = turns.time_interleaved(timed, options.rounds)
    records = [
        report.record(options, side, ours[0], column, seconds[:, 0])
        for side, column in zip(ours, seconds.T, strict=False)
    ]
    running = [kind for kind in made if "error" not in made[kind]]
    for kind, column in zip(running, seconds.T[len(ours) :], strict=True):
        records.append(_timm_record(records[0], kind, made[kind], column, seconds[:, 0]))
    return records


def _make_peers(
    options: Options, batch: int, peer: Peer | None, kinds: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Makes timm's models; returns what the process says of each."""
    return {
        kind: peer.ask(
            do="make",
            name=kind,
            model=options.dense,
            sizes=timm_sizes(options.overrides),
            batch=batch,
            compile=kind == "timm_compiled",
        )
        for kind in (kinds if peer else ())
    }


def _rested(call: turns.Timed) -> float:
    """Waits until the threads of the side that was on have stopped looking for work, then calls."""
    if jax.default_backend() == "cpu":
        time.sleep(_REST)
    return call()


def _seconds(peer: Peer, kind: str, calls: int) -> float:
    answer = peer.ask(do="time", name=kind, calls=calls)
    if "error" in answer:
        raise errors.UserError(f"{kind} stopped: {answer['error']}")
    return answer["seconds"]


def _timm_record(
    dense: dict[str, Any], kind: str, made: dict[str, Any], seconds: np.ndarray, ours: np.ndarray
) -> dict[str, Any]:
    """A record like our dense model's, whose architecture and multiply-accumulates it has."""
    speedup = turns.spread("speedup", ours / seconds)
    return {
        **{key: dense[key] for key in ("what", "model", "batch", "dtype", "gmacs", "mac_ratio")},
        **{key: dense[key] for key in ("overrides", "images_per_round", "rounds")},
        "layout": kind,
        **turns.spread("images_per_second", dense["images_per_round"] / seconds),
        **speedup,
        "realized": speedup["speedup"],
        **turns.spread("dense_speedup", seconds / ours),
        **made,
    }


def start_peer(device: str, dtype: str, python: str) -> Peer | None:
    """Starts timm's process, or says why it cannot be measured.

    Args:
      device: "cpu" or "cuda".
      dtype: Number type of the computation.
      python: Interpreter with torch and timm.
    """
    arguments = (f"--threads={machine.cores()}", f"--device={device}", f"--dtype={dtype}")
    peer = Peer([python, str(_WORKER), *arguments])
    if "error" not in peer.about:
        return peer
    print(f"timm is not measured: {peer.about['error']} (interpreter: --torch_python).")
    peer.close()
    return None


def main(argv: Sequence[str]) -> None:
    """The command."""
    errors.refuse_arguments(argv)
    logging.set_verbosity(logging.ERROR)
    process_tuning.keep_freed_memory()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared
    if _THREADS.value:
        process_tuning.use_cores(_THREADS.value)
    options = Options(
        model=_MODEL.value,
        batches=tuple(map(int, _BATCH.value)),
        layouts=tuple(_LAYOUTS.value),
        dtype=_DTYPE.value,
        tokens=_TOKENS.value,
        spread=_SPREAD.value,
        rounds=_ROUNDS.value,
        overrides=tuple(_SET.value),
    )
    about = machine.describe()
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    peer = start_peer(device, _DTYPE.value, _PYTHON.value)
    kinds = ("timm", "timm_compiled") if _COMPILE.value else ("timm",)
    records = []
    report.print_headings()
    for batch in options.batches:
        for record in measure(options, batch, peer, kinds):
            report.print_row(record)
            records.append(record)
    if peer:
        peer.close()
    print(json.dumps({**about, "peer": peer.about if peer else None, "records": records}))


if __name__ == "__main__":
    errors.run(main)
