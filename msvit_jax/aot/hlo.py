"""Reads cost estimates and transfers from the text of the TPU compiler's HLO modules.

Every instruction that the compiler has a cost model for states its estimated cycles; Pallas kernels
and some others do not. A kernel states what its author says that it computes and moves.
"""

import collections
import dataclasses
import math
import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
PALLAS = "tpu_custom_call"
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_STATED = re.compile(
    r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"(\d+)","bytes_accessed":"(\d+)"'
)
_VMEM = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)
_CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: `name = type opcode(rest`."""

    name: str
    type: str
    opcode: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A module's computations by name, and the name of its entry computation."""

    computations: dict[str, list[Instruction]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Pallas kernels of a program, with loops multiplied by their trip counts.

    Attributes:
      calls: Number of calls.
      flops: Floating point operations of their products, as stated by their authors.
      transcendentals: Number of exponentials and the like, as stated by their authors.
      moved_bytes: Bytes moved from and to the chip's main memory, as stated by their authors.
      vmem: Bytes of the chip's fast memory that the largest uses, as the compiler allots it.
    """

    calls: int = 0
    flops: int = 0
    transcendentals: int = 0
    moved_bytes: int = 0
    vmem: int = 0

    def __add__(self, other: "Kernels") -> "Kernels":
        return Kernels(
            self.calls + other.calls,
            self.flops + other.flops,
            self.transcendentals + other.transcendentals,
            self.moved_bytes + other.moved_bytes,
            max(self.vmem, other.vmem),
        )

    def times(self, trips: int) -> "Kernels":
        """The same calls repeated `trips` times."""
        return Kernels(
            self.calls * trips,
            self.flops * trips,
            self.transcendentals * trips,
            self.moved_bytes * trips,
            self.vmem,
        )


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Estimated cycles of a program.

    Attributes:
      total: Sum of all estimates, with loops multiplied by their trip counts.
      kernels: Calls of Pallas kernels, which have no estimates.
      loops: Number of loops in the program.
      unknown: Number of loops whose trip count is unknown; their cycles are counted once.
    """

    total: int = 0
    kernels: Kernels = Kernels()
    loops: int = 0
    unknown: int = 0

    def __add__(self, other: "Cycles") -> "Cycles":
        return Cycles(
            self.total + other.total,
            self.kernels + other.kernels,
            self.loops + other.loops,
            self.unknown + other.unknown,
        )

    def times(self, trips: int) -> "Cycles":
        """The same work repeated `trips` times; a loop inside still counts as one loop."""
        return Cycles(self.total * trips, self.kernels.times(trips), self.loops, self.unknown)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Transfers of one kind between chips.

    Attributes:
      count: Number of operations in a step.
      bytes: Bytes of their results on each chip.
    """

    count: int
    bytes: int


def parse(text: str) -> Module:
    """Parses a module's text, as returned by `compiled.as_text()`.

    Raises:
      ValueError: The text has no ENTRY computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(Instruction(*match.groups()))
    if entry is None:
        raise ValueError("The text is no HLO module: it has no ENTRY computation.")
    return Module(computations, entry)


def cycles(module: Module) -> Cycles:
    """Estimated cycles of the entry computation, with loops multiplied by their trip counts."""
    return _cycles(module, module.entry)


def _cycles(module: Module, name: str) -> Cycles:
    total = Cycles()
    for instruction in module.computations.get(name, ()):
        if estimate := _CYCLES.search(instruction.rest):
            total += Cycles(int(estimate[1]))
        elif instruction.opcode == "while":
            total += _loop(module, instruction)
        elif instruction.opcode == "conditional":
            branches = [_cycles(module, branch) for branch in _called(instruction)]
            total += max(branches, key=lambda c: c.total, default=Cycles())
        elif instruction.opcode in ("call", "async-start"):
            for called in _called(instruction):
                total += _cycles(module, called)
        elif f'custom_call_target="{PALLAS}"' in instruction.rest:
            total += Cycles(kernels=_kernel(instruction))
    return total


def _kernel(instruction: Instruction) -> Kernels:
    stated, vmem = _STATED.search(instruction.rest), _VMEM.search(instruction.rest)
    flops, transcendentals, moved = map(int, stated.groups()) if stated else (0, 0, 0)
    return Kernels(1, flops, transcendentals, moved, int(vmem[1]) if vmem else 0)


def _called(instruction: Instruction) -> list[str]:
    branches = _BRANCHES.search(instruction.rest)
    names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
    return names + _CALLED.findall(instruction.rest)


def _loop(module: Module, instruction: Instruction) -> Cycles:
    parts = [re.search(rf"{part}=%?([\w.\-]+)", instruction.rest) for part in ("condition", "body")]
    condition, body = (part[1] if part else "" for part in parts)
    work = _cycles(module, body)
    trips = _trips(module, instruction, condition)
    if trips is None:
        return work + Cycles(loops=1, unknown=1)
    return work.times(trips) + Cycles(loops=1)


def _trips(module: Module, instruction: Instruction, condition: str) -> int | None:
    """Trip count of a loop: stated by XLA, or the bound of a counter from 0 by 1, as in JAX."""
    if known := _TRIPS.search(instruction.rest):
        return int(known[1])
    inside = module.computations.get(condition, [])
    constants = {
        i.name: int(i.rest.partition(")")[0])
        for i in inside
        if i.opcode == "constant" and i.type.startswith("s32[]")
    }
    compared = [i for i in inside if i.opcode == "compare" and "direction=LT" in i.rest]
    if len(compared) != 1 or len(inside) > len(constants) + 3:
        return None
    bounds = [constants[n] for n in re.findall(r"[\w.\-]+", compared[0].rest) if n in constants]
    return bounds[0] if bounds else None


def collectives(module: Module) -> dict[str, Collective]:
    """Transfers between chips by kind; those inside a loop are counted once."""
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    for instructions in module.computations.values():
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                counts[kind] += 1
                sizes[kind] += _result_bytes(instruction)
    return {kind: Collective(counts[kind], sizes[kind]) for kind in sorted(counts)}


def _result_bytes(instruction: Instruction) -> int:
    """Bytes of a collective's result; the type of some start operations includes operands."""
    shapes = _SHAPE.findall(instruction.type)
    if instruction.opcode == "all-gather-start":
        shapes = shapes[len(shapes) // 2 :]
    if instruction.opcode == "collective-permute-start":
        shapes = shapes[:1]
    return sum(shape_bytes(dtype, dims) for dtype, dims in shapes)


def shape_bytes(dtype: str, dims: str) -> int:
    """Bytes of an array, given for example 'bf16' and '128,197'."""
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.ceil(math.prod(int(d) for d in dims.split(",") if d) * bits / 8)
