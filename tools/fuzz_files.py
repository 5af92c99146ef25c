"""Damages the files that the library reads, one by one, and says what reading them ends in.

    python tools/fuzz_files.py [--count=770] [--seed=0] [--kinds=run,ours] [--out=malformed.json]

Weights of every format, workdirs, exports, data sets and descriptions are changed by hand and at
random. Reading a changed file must give what the whole one gives, or what another well-formed file
says with answers that are finite, or one line of text; within 10 s and 1 GB of memory, without
writing, deleting or starting anything. Images have a tool of their own, `fuzz_images.py`.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

COUNT = 770
SECONDS = 10.0
# What a case may take beyond its process, which takes 400 here: 1 GB in all. Inside a long test run
# the process itself may be larger than that.
MEGABYTES = 600.0
_SPACE = 6 * 2**30  # bytes of addresses that a case may take beyond those of its process
_PATIENCE = 200.0  # seconds for what is not judged: imports, and reading a whole example
_LONGEST = 1000  # letters of a line
# Events of Python's audit that would show that a file does something.
_ACTS = ("os.", "shutil.", "subprocess.", "ctypes.", "webbrowser.", "ftplib.", "urllib.")
_ACTS += ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo")
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr")


@dataclasses.dataclass
class Case:
    """A changed example.

    Attributes:
      kind: Kind of the file, a key of `file_kinds.KINDS`.
      number: Number within its kind; the special cases come first.
      change: Name of what was changed.
      outcome: 'same', 'other' for another well-formed file, 'refused', or 'failed'.
      said: The line of a refusal, or what is wrong.
      seconds: Time that reading took.
      megabytes: Most memory that its process took, of which `before` at the start of the case.
      before: Memory at the start of the case.
    """

    kind: str
    number: int
    change: str = ""
    outcome: str = "failed"
    said: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0
    before: float = 0.0


class Acts:
    """Notes what a process opens to write, deletes, starts or connects to while it watches."""

    def __init__(self) -> None:
        import jax

        self.seen: list[str] = []
        self._watching = False
        # JAX's own cache of compiled programs, if there is one.
        self._cache = jax.config.jax_compilation_cache_dir or os.devnull
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            writes = writes or set(str(mode or "")) & set("wax+")
            if writes and str(path) != os.devnull and not str(path).startswith(self._cache):
                self.seen.append(f"opens {path!r} to write")
        elif event.startswith(_ACTS) and event not in _HARMLESS:
            self.seen.append(f"{event}{arguments!r}"[:200])

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[str]]:
        """Watches for a while."""
        self.seen, self._watching = [], True
        try:
            yield self.seen
        finally:
            self._watching = False


def held(folder: pathlib.Path) -> dict[str, str]:
    """Digests of all files in a folder, by name."""
    return {
        str(file.relative_to(folder)): hashlib.sha1(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def make_examples(root: pathlib.Path, names: list[str]) -> None:
    """Writes the example of each kind into a folder of its own."""
    from tools.file_kinds import KINDS

    for name in names:
        (root / name).mkdir(parents=True)
        KINDS[name].make(root / name)


def change(case: Case, folder: pathlib.Path, seed: int) -> None:
    """Changes the example in a folder, and says how."""
    from tools import mutations
    from tools.file_kinds import KINDS

    special = list(KINDS[case.kind].special.items())
    if case.number < len(special):
        case.change, way = special[case.number]
        way(folder)
        return
    digest = hashlib.sha256(f"{seed} {case.kind} {case.number}".encode()).digest()
    rng = np.random.default_rng(list(digest))
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    # Code of an export is what is run, not what is read.
    files = [file for file in files if file.suffix not in (".py", ".zip")]
    file = files[int(rng.integers(len(files)))]
    way = mutations.replace(file, files, rng) if rng.integers(8) == 0 else ""
    case.change = f"{file.relative_to(folder)}: {way or mutations.change(file, rng)}"


def read(case: Case, folder: pathlib.Path, wanted: dict[str, Any] | None) -> dict[str, Any]:
    """Reads the example in a folder; fills in the case's outcome and returns what was read."""
    from tools.file_kinds import KINDS

    kind = KINDS[case.kind]
    # A remark that is meant.
    warnings.filterwarnings("ignore", ".*is all zeros: every class gets the same answer")
    try:
        answer = kind.read(folder)
        if wanted is None or _equal(answer.values, wanted):
            case.outcome = "same"
        else:
            case.outcome = "other"
            if not np.isfinite(answer.use()).all():
                case.outcome, case.said = "failed", "answers that are not finite"
        return answer.values
    except kind.raised as error:
        from msvit_jax.errors import UserError, describe

        line = str(error) if isinstance(error, UserError) else describe(error)
        case.outcome, case.said = "refused", line
        if not _is_clear(line):
            case.outcome, case.said = "failed", f"no clear line: {line[:_LONGEST]!r}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "/msvit_jax/" in frame.filename] or where
        place = f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"
        case.said = f"traceback, {place}: {type(error).__name__}: {str(error)[:300]}"
    return {}


def _is_clear(text: str) -> bool:
    """Tells whether a message is one line; a list of what does not fit may follow, indented."""
    first, *rest = text.split("\n")
    listed = all(line.startswith("  ") or line.startswith("Unused") for line in rest)
    return bool(first.strip()) and listed and len(first) <= _LONGEST and "object at 0x" not in text


def _equal(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(
        np.array_equal(value, theirs[name]) for name, value in ours.items()
    )


class Reader:
    """Reads cases in this process, under limits."""

    def __init__(self, examples: pathlib.Path, scratch: pathlib.Path, seed: int) -> None:
        """Prepares for it.

        Args:
          examples: Folder of the whole examples.
          scratch: Folder for changed copies; becomes the current one, as a file may name files.
          seed: Seed of the changes.
        """
        self._examples, self._scratch, self._seed = examples, scratch, seed
        self._wanted: dict[str, dict[str, Any]] = {}
        self._acts = Acts()
        os.chdir(scratch)

    def read_whole(self, kind: str) -> None:
        """Reads the example of a kind, with which its cases are compared; once."""
        if kind not in self._wanted:
            whole = Case(kind, -1)
            self._wanted[kind] = read(whole, self._examples / kind, None)
            assert whole.outcome == "same", f"the example of {kind} cannot be read: {whole.said}"

    def try_case(self, case: Case) -> Case:
        """Changes an example, reads it, and judges what happened."""
        self.read_whole(case.kind)
        folder = self._scratch / f"{case.kind}{case.number}".replace(" ", "_")
        shutil.copytree(self._examples / case.kind, folder)
        change(case, folder, self._seed)
        before, case.before = held(self._scratch), _restart_peak()
        with _limited_space(), _output() as printed, self._acts.watched() as acts:
            start = time.perf_counter()
            read(case, folder, self._wanted[case.kind])
            case.seconds = time.perf_counter() - start
        case.megabytes = _memory("VmHWM")
        wrong = [f"does {act}" for act in acts]
        wrong += [f"prints {text[:300]!r}" for text in printed]
        if held(self._scratch) != before:
            wrong.append("writes files")
        if case.seconds > SECONDS:
            wrong.append(f"takes {case.seconds:.0f} s")
        if (taken := case.megabytes - case.before) > MEGABYTES:
            wrong.append(f"takes {taken:.0f} MB")
        if wrong:
            case.outcome = "failed"
            case.said = "; ".join([*wrong, case.said])
        case.said = case.said.replace(f"{self._scratch}/", "")
        shutil.rmtree(folder)
        return case


def _memory(field: str) -> float:
    """A figure of this process's memory, in MB."""
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1000


def _restart_peak() -> float:
    """Makes the kernel note the peak of this process's memory anew; returns what it is now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


@contextlib.contextmanager
def _limited_space() -> Iterator[None]:
    """Refuses memory far beyond the limit, so that no case takes the machine's."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    now = int(_memory("VmSize") * 1000 * 1024)
    resource.setrlimit(resource.RLIMIT_AS, (now + _SPACE, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@contextlib.contextmanager
def _output() -> Iterator[list[str]]:
    """Collects what is printed meanwhile, also by C libraries."""
    printed: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield printed
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in enumerate(kept, start=1):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            if text := file.read().decode(errors="replace").strip():
                printed.append(text)


def _work(pipe: Any, examples: pathlib.Path, scratch: pathlib.Path, seed: int) -> None:
    """Reads the cases that come through a pipe; runs in a process of its own."""
    sys.dont_write_bytecode = True
    from msvit_jax import checkpoint

    checkpoint.quiet_orbax()  # as commands do
    reader = Reader(examples, scratch, seed)
    while (case := pipe.recv()) is not None:
        reader.read_whole(case.kind)
        pipe.send("ready")
        pipe.send(reader.try_case(case))


class Worker:
    """A process that reads cases; a new one takes over when one dies or takes too long."""

    def __init__(self, *given: Any) -> None:
        self._given = given
        self._process: Any = None

    def try_case(self, case: Case) -> Case:
        """Has a case read; one that ends the process, or does not end, has failed."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_work, args=(other, *self._given), daemon=True)
            self._process.start()
            other.close()
        self._pipe.send(case)
        try:
            if not self._pipe.poll(_PATIENCE):
                raise TimeoutError(f"nothing can be read within {_PATIENCE:.0f} s")
            self._pipe.recv()  # the process has started, and read the whole example
            if self._pipe.poll(2 * SECONDS):
                return self._pipe.recv()
            case.said = f"does not end within {2 * SECONDS:.0f} s"
        except EOFError:
            self._process.join()
            case.said = f"ends the process with code {self._process.exitcode}"
        self.close()
        return case

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def cases(count: int, names: list[str]) -> list[Case]:
    """Shares cases out to kinds; every special one is among them if there is room."""
    from tools.file_kinds import KINDS

    shares = {name: KINDS[name].share for name in names}
    whole = sum(shares.values())
    return [
        Case(name, number)
        for name, share in shares.items()
        for number in range(max(1, round(count * share / whole)))
    ]


def summary(done: list[Case]) -> dict[str, dict[str, Any]]:
    """Counts outcomes by kind."""
    rows = {}
    for name in dict.fromkeys(case.kind for case in done):
        own = [case for case in done if case.kind == name]
        counts = collections.Counter(case.outcome for case in own)
        rows[name] = {
            "cases": len(own),
            **{outcome: counts[outcome] for outcome in ("refused", "same", "other", "failed")},
            "seconds": round(max(case.seconds for case in own), 2),
            "megabytes": round(max(case.megabytes for case in own)),
        }
    return rows


def _json(seed: int, rows: dict[str, dict[str, Any]], done: list[Case]) -> str:
    """Everything that is known, a line for each kind and case."""
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    tried = [json.dumps(_rounded(dataclasses.asdict(case))) for case in done]
    kinds, each = (",\n  ".join(part) for part in (lines, tried))
    return f'{{"seed": {seed},\n "kinds": {{\n  {kinds}}},\n "cases": [\n  {each}]}}\n'


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    """Tries all cases."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    from tools.file_kinds import KINDS

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--count", type=int, default=COUNT, help="cases of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help="only these, separated by commas")
    parser.add_argument("--out", help=".json file for all cases")
    given = parser.parse_args()
    names = given.kinds.split(",") if given.kinds else list(KINDS)
    with tempfile.TemporaryDirectory() as root:
        examples, scratch = pathlib.Path(root, "examples"), pathlib.Path(root, "scratch")
        scratch.mkdir()
        make_examples(examples, names)
        worker, done = Worker(examples, scratch, given.seed), []
        for case in cases(given.count, names):
            done.append(worker.try_case(case))
            if done[-1].outcome == "failed":
                print(f"{case.kind} {case.number} ({done[-1].change}): {done[-1].said}", flush=True)
        worker.close()
    rows = summary(done)
    for name, row in rows.items():
        print(f"{name:18}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    if given.out:
        pathlib.Path(given.out).write_text(_json(given.seed, rows, done))
    sys.exit(any(case.outcome == "failed" for case in done))


if __name__ == "__main__":
    main()
