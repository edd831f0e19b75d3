"""Counts kernels, bytes and arithmetic in the text of a compiled program.

The text is scheduled HLO, as `compiled.as_text()` returns it: a list of computations, each a list
of instructions. On a GPU nearly every instruction that computes or copies something is one kernel;
the exceptions are in `_FREE`. A loop whose trip count the compiler knows counts as often as it
runs. A TPU's text says in which memory an array is and how it is tiled: only arrays in the main
memory are traffic, and they are padded to whole tiles. It also has the cycles that the compiler
expects of most operations.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

# Instructions that launch nothing: they name, group, or wait for what others computed.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "add-dependency",
        "opt-barrier",
        "partition-id",
        "replica-id",
        "domain",
    ]
)
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
# Asynchronous copies, and which of their results are new: others are the source and a semaphore.
_COPIED = {"copy-start": slice(0, 1), "slice-start": slice(1, 2)}
_COLLECTIVES = frozenset(
    ["all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"]
)
# Instructions of which an element depends on several elements of an operand.
_MIXING = frozenset(
    [
        "convolution",
        "custom-call",
        "dot",
        "dynamic-update-slice",
        "fusion",
        "gather",
        "reduce",
        "reduce-window",
        "scatter",
        "sort",
        "tuple",
    ]
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_TILE = re.compile(r":T\(([\d,]+)\)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Array(NamedTuple):
    """Type and shape of an array."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""
    """Order of the axes, tiles and memory, such as `{1,0:T(8,128)S(1)}`; empty if not written."""

    @property
    def is_on_chip(self) -> bool:
        """True if the array is in the fast memory of a TPU, which the program fills itself."""
        return "S(1)" in self.layout

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> float:
        """Bytes, with the padding of tiles."""
        width = _BYTES.get(self.dtype)
        if width is None:
            width = int(re.sub(r"\D", "", self.dtype[1:3]) or 8) / 8
        tiles = _TILE.search(self.layout)
        if not tiles:
            return self.size * width
        # The last axis of a tile is that of neighbouring elements, which the order names first.
        order = [int(x) for x in re.findall(r"\d+", self.layout[: tiles.start()])]
        axes = [self.shape[axis] for axis in order]
        tile = [int(x) for x in tiles.group(1).split(",")][::-1]
        axes += [1] * (len(tile) - len(axes))
        padded = [math.ceil(n / x) * x for n, x in zip(axes, tile, strict=False)]
        return math.prod(padded + axes[len(tile) :]) * width


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    """Results: one array, or the leaves of a tuple."""
    operands: tuple[str, ...]
    number: int | None
    """Index of the argument that a parameter stands for, or value of an integer constant."""
    called: tuple[str, ...]
    """Computations that it runs: a fusion's, the body of a loop, or the branches of a conditional.
    """
    attributes: str
    trip_count: int | None
    """Number of times that a loop runs its body; None where it is not known."""

    @property
    def scope(self) -> tuple[str, ...]:
        """Names of the functions and scopes that it was traced in, the outermost first."""
        found = _OP_NAME.search(self.attributes)
        return tuple(found.group(1).split("/")) if found else ()


class Program(NamedTuple):
    """A module of HLO."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


class Work(NamedTuple):
    """Kernels, memory traffic, arithmetic and predicted time of some instructions."""

    kernels: float = 0.0
    bytes: float = 0.0
    """Bytes of the main memory that all kernels read and write."""
    flops: float = 0.0
    seconds: float = 0.0
    """Predicted time: `Device.kernel_seconds`, or on a TPU the cycles that its compiler estimates;
    at least that of the bytes."""
    collectives: float = 0.0
    """Kernels that exchange data with other devices. Their transfers are not part of the time."""
    collective_bytes: float = 0.0
    """Bytes of the results of these kernels, on one device."""

    def __add__(self, other: tuple) -> "Work":  # type: ignore[override]
        return Work(*(x + y for x, y in zip(self, other, strict=True)))

    def times(self, count: float) -> "Work":
        """Returns the work of `count` runs."""
        return Work(*(x * count for x in self))


class Device(NamedTuple):
    """Rates of an accelerator, for the model of time."""

    bytes_per_second: float
    flops_per_second: float
    launch_seconds: float
    hertz: float = math.nan
    """Clock of a TPU, whose compiler estimates cycles."""

    def kernel_seconds(self, num_bytes: float, flops: float) -> float:
        """Returns the largest of a launch, the transfer and the arithmetic."""
        return max(
            self.launch_seconds, num_bytes / self.bytes_per_second, flops / self.flops_per_second
        )


def parse(text: str) -> Program:
    """Parses scheduled HLO."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    lines: list[Instruction] = []
    entry = name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name, lines = found.group(2), []
            entry = name if found.group(1) else entry
        elif line.startswith("}"):
            computations[name] = tuple(lines)
        elif found := _INSTRUCTION.match(line):
            lines.append(_instruction(*found.groups()))
    for name, instructions in computations.items():
        computations[name] = tuple(_with_trip_count(x, computations) for x in instructions)
    return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    assert opcode, text
    close = _closing(text, opcode.end() - 1)
    arguments = text[opcode.end() : close]
    attributes = text[close + 1 :]
    called = tuple(
        part.strip().lstrip("%")
        for group in _CALLED.findall(attributes)
        for part in group.strip("{}").split(",")
    )
    arrays = tuple(
        Array(dtype, tuple(int(x) for x in re.findall(r"\d+", shape)), layout)
        for dtype, shape, layout in _ARRAY.findall(text[:end])
    )
    return Instruction(
        name,
        opcode.group(1),
        arrays,
        operands=tuple(_NAME.findall(arguments)),
        number=int(arguments) if _holds_number(opcode.group(1), arguments) else None,
        called=called,
        attributes=attributes,
        trip_count=None,
    )


def _holds_number(opcode: str, arguments: str) -> bool:
    return opcode in ("parameter", "constant") and arguments.lstrip("-").isdigit()


def _with_trip_count(
    loop: Instruction, computations: Mapping[str, Sequence[Instruction]]
) -> Instruction:
    """Returns a loop with its trip count, and any other instruction as it is.

    The compiler for GPUs writes the count. The one for TPUs does not; there it is the constant that
    the condition compares the counter with, because loops of JAX count from 0.
    """
    if loop.opcode != "while":
        return loop
    if found := _TRIP_COUNT.search(loop.attributes):
        return loop._replace(trip_count=int(found.group(1)))
    condition = _CONDITION.search(loop.attributes)
    lines = computations[condition.group(1)] if condition else ()
    numbers = [line.number for line in lines if line.opcode == "constant"]
    less = any(x.opcode == "compare" and "direction=LT" in x.attributes for x in lines)
    return loop._replace(trip_count=numbers[0]) if less and len(numbers) == 1 else loop


def _closing(text: str, start: int) -> int:
    """Returns the position of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket in {text}")


def loops(program: Program, computation: str) -> Iterator[Instruction]:
    """Yields the loops of a computation and of those that it calls, the outer ones first."""
    for instruction in program.computations[computation]:
        if instruction.opcode == "while":
            yield instruction
        if instruction.opcode in ("while", "call", "conditional"):
            for name in instruction.called:
                yield from loops(program, name)


def work(
    program: Program,
    computation: str,
    device: Device,
    stages: Sequence[str],
    outer_stage: str = "other",
) -> dict[str, Work]:
    """Returns the work of a computation by stage.

    Args:
      program: the module.
      computation: its name.
      device: rates for the model of time.
      stages: names of scopes, of which an instruction has the innermost.
      outer_stage: stage of the instructions that are in none of these scopes. Within a loop it is
        the stage of the loop.
    """
    instructions = program.computations[computation]
    results = {instruction.name: instruction.arrays for instruction in instructions}
    total: dict[str, Work] = {}

    def add(stage: str, part: Work) -> None:
        total[stage] = total.get(stage, Work()) + part

    for instruction in instructions:
        own = next((name for name in reversed(instruction.scope) if name in stages), outer_stage)
        opcode = instruction.opcode
        if opcode in ("while", "call", "conditional", "async-start"):
            # An unknown trip count is counted once; `unknown_loops` lists such loops.
            count = (instruction.trip_count or 1) if opcode == "while" else 1
            branches = [work(program, name, device, stages, own) for name in instruction.called]
            # One branch of a conditional runs: the largest, at most.
            if opcode == "conditional":
                branches = [max(branches, key=lambda x: sum(w.seconds for w in x.values()))]
            for branch in branches:
                for name, part in branch.items():
                    add(name, part.times(count))
        elif not _is_free(instruction):
            read = [results.get(name, ()) for name in instruction.operands]
            num_bytes = _bytes(program, instruction, read)
            flops = _flops(program, instruction, read)
            seconds = device.kernel_seconds(num_bytes, flops)
            if cycles := _CYCLES.search(instruction.attributes):
                seconds = int(cycles.group(1)) / device.hertz
            elif opcode in _COPIED:
                seconds = 0.0  # beside other operations, but see below
            is_collective = opcode.removesuffix("-start") in _COLLECTIVES
            sent = _num_bytes(instruction.arrays) if is_collective else 0.0
            add(own, Work(1.0, num_bytes, flops, seconds, float(is_collective), sent))
    # Asynchronous copies take time where the main memory is the limit.
    return {
        name: part._replace(seconds=max(part.seconds, part.bytes / device.bytes_per_second))
        for name, part in total.items()
    }


def unknown_loops(program: Program, computation: str) -> list[str]:
    """Returns the names of the loops whose trip count the compiler does not know."""
    return [loop.name for loop in loops(program, computation) if loop.trip_count is None]


def _is_free(instruction: Instruction) -> bool:
    """Returns whether an instruction neither computes nor copies anything."""
    return (
        instruction.opcode in _FREE
        or instruction.opcode.endswith("-done")
        or any(f'custom_call_target="{x}"' in instruction.attributes for x in _FREE_CALLS)
    )


def _bytes(program: Program, instruction: Instruction, read: Sequence[tuple[Array, ...]]) -> float:
    """Returns the bytes that a kernel reads and writes; only the slice of a sliced array counts."""
    new = instruction.arrays[_COPIED.get(instruction.opcode, slice(None))]
    written = _main_bytes(new)
    whole = [_main_bytes(arrays) for arrays in read]
    if instruction.opcode in ("slice", "slice-start", "dynamic-slice", "gather"):
        whole[0] = min(whole[0], _num_bytes(new))
    if instruction.opcode == "dynamic-update-slice":
        written, whole[0] = min(written, _num_bytes(read[1])), 0.0
    if instruction.opcode != "fusion":
        return written + sum(whole)
    body = program.computations[instruction.called[0]]
    results = {line.name: line.arrays for line in body}
    needed = _needed_bytes(body)
    for line in body:
        if line.opcode == "parameter" and line.number is not None:
            whole[line.number] = min(whole[line.number], needed[line.name])
    for line in body:
        if line.opcode == "dynamic-update-slice" and not line.arrays[0].is_on_chip:
            written -= _num_bytes(line.arrays) - _num_bytes(results[line.operands[1]])
    return max(written, 0.0) + sum(whole)


def _num_bytes(arrays: Iterable[Array]) -> float:
    return sum(array.num_bytes for array in arrays)


def _main_bytes(arrays: Iterable[Array]) -> float:
    return _num_bytes(array for array in arrays if not array.is_on_chip)


def _needed_bytes(body: Sequence[Instruction]) -> dict[str, float]:
    """Returns how much of each result the other instructions of a fusion make use of, in bytes.

    A fusion computes only what its own results need: of an array of which slices are taken, now or
    after elementwise operations, only these slices.
    """
    users: dict[str, list[Instruction]] = {line.name: [] for line in body}
    for line in body:
        for name in set(line.operands) & users.keys():
            users[name].append(line)
    needed: dict[str, float] = {}
    for line in reversed(body):  # users come after what they use
        whole = _num_bytes(line.arrays)
        parts = [_needed_share(line, user, needed[user.name]) for user in users[line.name]]
        needed[line.name] = min(1.0, sum(parts)) * whole if parts else whole
    return needed


def _needed_share(line: Instruction, user: Instruction, needed_of_user: float) -> float:
    """Returns the share of a result that one user needs."""
    size, user_size = (sum(array.size for array in x.arrays) for x in (line, user))
    is_first = user.operands[0] == line.name
    if user.opcode in ("dynamic-slice", "slice", "gather") and is_first:
        return user_size / max(size, 1)
    if user.opcode == "dynamic-update-slice" and is_first and line.opcode == "parameter":
        return 0.0  # updated in place, and not read at all
    if user.opcode not in _MIXING and user_size == size > 0:
        return needed_of_user / _num_bytes(user.arrays)
    return 1.0


def _flops(program: Program, instruction: Instruction, read: Sequence[tuple[Array, ...]]) -> float:
    """Returns the arithmetic of a kernel: products exactly, all else one per element."""
    if instruction.opcode == "custom-call":
        return _product_flops(instruction, read)
    if instruction.opcode != "fusion":
        return sum(array.size for array in instruction.arrays)
    body = program.computations[instruction.called[0]]
    results = {line.name: line.arrays for line in body}
    return sum(
        _product_flops(line, [results.get(name, ()) for name in line.operands])
        if line.opcode == "dot"
        else sum(array.size for array in line.arrays)
        for line in body
        if line.opcode not in _FREE
    )


def _product_flops(instruction: Instruction, read: Sequence[tuple[Array, ...]]) -> float:
    """Returns 2 · M · N · K of a matrix product, inside a fusion or of a library."""
    found = re.search(
        r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[\[{]([^\]}]*)', instruction.attributes
    )
    if not found or not read or not read[0]:
        return sum(array.size for array in instruction.arrays)
    axes = [int(x) for x in re.findall(r"\d+", found.group(1))]
    contracted = math.prod(read[0][0].shape[axis] for axis in axes)
    return 2.0 * instruction.arrays[0].size * contracted
