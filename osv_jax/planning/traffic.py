"""What a program reads from and writes to a device's memory, counted from its optimised HLO.

Every instruction that is not inside a fusion reads its operands and writes its results, as often as the loops around it
run. A slice is what of an array is read, and an update in place is what of it is written. This is what the program asks
for: an array that is still in a cache when it is read again costs less, one that a convolution reads for every
kernel element may cost more.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

from osv_jax.planning.program import Instruction, Program, array_bytes, parse

PRODUCTS = "products, convolutions"
ATTENTION = "attention kernels"
LOOPS = "elementwise loops"
REDUCTIONS = "reductions"
MOVES = "copies, casts, slices"
CUSTOM = "other custom calls"
COLLECTIVES = "collectives"

_NOTHING = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "add-dependency"),
    *("partition-id", "replica-id", "domain"),
}
_COLLECTIVE = re.compile("all-|reduce-scatter|collective-|ragged-|send|recv")
_SLICES = {"slice", "dynamic-slice", "gather"}
_MOVES = {
    *("copy", "copy-start", "transpose", "reshape", "convert", "concatenate", "pad", "broadcast", "reverse", "iota"),
    *("dynamic-update-slice", "bitcast-convert"),
    *_SLICES,
}
# Integers that say where to slice.
_INDICES = {"add", "multiply", "subtract", "compare", "select", "clamp", "minimum", "maximum", "and", "or"}
_VIEWS = {"bitcast", "reshape", "get-tuple-element"}


@dataclasses.dataclass(frozen=True)
class Cause:
    """Instructions of one kind from one place in the code.

    Attributes:
        operation: JAX's name for it, with the modules around it.
        source: FILE:LINE, or nothing.
        bytes: that all of them read and write in a step.
        runs: how often one of them runs in a step.
    """

    kind: str
    operation: str
    source: str
    bytes: float
    runs: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes by kind of instruction, the largest first; what causes most of them; loops that were counted once."""

    by_kind: Mapping[str, float]
    causes: list[Cause]
    unknown_loops: int

    @property
    def total(self) -> float:
        return sum(self.by_kind.values())

    @property
    def beside_operations(self) -> float:
        """Bytes of the kernels that do the matrix operations, which are read while these are computed."""
        return sum(self.by_kind.get(kind, 0.0) for kind in (PRODUCTS, ATTENTION))

    def seconds(self, flops: float, peak: float, bandwidth: float) -> float:
        """The roofline: matrix kernels take as long as their operations or their bytes, all others as their bytes."""
        rest = self.total - self.beside_operations
        return max(flops / peak, self.beside_operations / bandwidth) + rest / bandwidth


def traffic_of(text: str, largest: int = 10) -> Traffic:
    """What a program, given as XLA's text of it, reads and writes.

    Args:
        largest: how many causes to tell.
    """
    program = parse(text)
    by_kind: dict[str, float] = {}
    causes: dict[tuple[str, str, str], tuple[float, int]] = {}
    unknown = 0
    for instruction, size, times in _executed(program, program.entry, 1):
        if times is None:
            unknown += 1
        elif size:
            kind = _kind(program, instruction)
            by_kind[kind] = by_kind.get(kind, 0.0) + size * times
            named = _named(program, instruction)
            key = kind, _operation(named), program.source(named)
            total, runs = causes.get(key, (0.0, 0))
            causes[key] = total + size * times, runs + times
    ordered = sorted(causes.items(), key=lambda item: -item[1][0])[:largest]
    return Traffic(
        dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        [Cause(*key, *counts) for key, counts in ordered],
        unknown,
    )


def _executed(program: Program, name: str, times: int) -> Iterator[tuple[Instruction, int, int | None]]:
    """All instructions that a computation runs, with their bytes and how often; None for a loop of unknown length."""
    instructions = program.computations[name]
    by_name = {instruction.name: instruction for instruction in instructions}
    for instruction in instructions:
        if instruction.opcode in _NOTHING or instruction.opcode.endswith(("-done", "-update")):
            continue
        if instruction.opcode == "while":
            trips = _trips(program, instruction)
            if trips is None:
                yield instruction, 0, None
            yield from _executed(program, instruction.attribute(r"body=%?([\w.-]+)"), times * (trips or 1))
        elif instruction.opcode == "conditional":
            branches = [list(_executed(program, branch, times)) for branch in instruction.called]
            yield from max(branches, key=lambda branch: sum(size * (runs or 1) for _, size, runs in branch))
        elif instruction.opcode in ("call", "async-start"):
            for called in instruction.called[:1]:
                yield from _executed(program, called, times)
        else:
            yield instruction, _bytes(program, instruction, by_name), times


def _trips(program: Program, loop: Instruction) -> int | None:
    """How often a loop runs: as XLA says, or as the only number in its condition does."""
    if known := loop.attribute(r'known_trip_count"?:\{"?n"?:"?(\d+)'):
        return int(known)
    names = [loop.attribute(r"condition=%?([\w.-]+)")]
    numbers = set()
    while names:
        for instruction in program.computations[names.pop()]:
            names += instruction.called
            if instruction.opcode == "constant" and re.fullmatch(r"\d+", instruction.arguments):
                numbers.add(int(instruction.arguments))
    return numbers.pop() if len(numbers) == 1 else None


def _bytes(program: Program, instruction: Instruction, others: Mapping[str, Instruction]) -> int:
    """What one instruction reads and writes."""
    if instruction.opcode == "fusion":
        body = program.computations[instruction.called[0]]
        parameters = (part for part in body if part.opcode == "parameter")
        # An operand that is given twice is read once.
        reads = {instruction.operands[int(part.arguments)]: _read(part, body) for part in parameters}
        return sum(reads.values()) + _written(body)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * others[instruction.operands[1]].bytes
    if instruction.opcode in _SLICES:
        return 2 * instruction.bytes
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        # Its result holds its operands, too.
        return instruction.bytes
    results = array_bytes(instruction.shape)
    if instruction.opcode == "custom-call" and re.search(r"\b[su]8\[\d+\]\{0\}\)$", instruction.shape):
        results = results[:-1]  # The last one is scratch memory.
    return sum(results) + sum(others[name].bytes for name in dict.fromkeys(instruction.operands))


def _read(parameter: Instruction, body: list[Instruction]) -> int:
    """What a fusion reads of one of its operands: all of it, or what is sliced out of it."""
    sizes, names = [], [parameter.name]
    while names:
        name = names.pop()
        for user in (part for part in body if name in part.operands):
            is_first = user.operands[0] == name
            if user.opcode in _VIEWS:
                names.append(user.name)
            elif user.opcode in _SLICES and is_first:
                sizes.append(user.bytes)
            elif user.opcode == "dynamic-update-slice" and is_first:
                sizes.append(0)
            else:
                return parameter.bytes
    return min(parameter.bytes, sum(sizes))


def _written(body: list[Instruction]) -> int:
    """What a fusion writes: its results, of which an update in place is what is new."""
    by_name = {part.name: part for part in body}
    (root,) = (part for part in body if part.is_root)
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for result in results:
        origin = result
        while origin.opcode in _VIEWS:
            origin = by_name[origin.operands[0]]
        total += by_name[origin.operands[1]].bytes if origin.opcode == "dynamic-update-slice" else result.bytes
    return total


def _opcodes(program: Program, instruction: Instruction) -> set[str]:
    """Of an instruction and of all that is fused into it, but for integers that say where things are."""
    if instruction.opcode not in ("fusion", "async-start"):
        is_index = instruction.opcode in _INDICES and re.match(r"(s|u|pred)\d*\[\]", instruction.shape)
        return set() if is_index else {instruction.opcode}
    return set().union(*(_opcodes(program, part) for name in instruction.called for part in program.computations[name]))


def _kind(program: Program, instruction: Instruction) -> str:
    opcodes = _opcodes(program, instruction) - _NOTHING
    if any(map(_COLLECTIVE.match, opcodes)):
        return COLLECTIVES
    target = instruction.attribute(r'custom_call_target="([^"]+)"')
    if re.search("fmha|flash|splash", target + instruction.attribute(r'op_name="([^"]+)"')) and target:
        return ATTENTION
    if opcodes & {"dot", "convolution"} or re.search("matmul|gemm|conv", target):
        return PRODUCTS
    if target:
        return CUSTOM
    if opcodes & {"reduce", "reduce-window", "sort"}:
        return REDUCTIONS
    return MOVES if opcodes <= _MOVES else LOOPS


def _named(program: Program, instruction: Instruction) -> Instruction:
    """The instruction itself, or where a fusion has no name, the last one in it that has one."""
    body = program.computations[instruction.called[0]] if instruction.opcode == "fusion" else []
    # Equal constants are one, with the name of any of them.
    parts = [part for part in body if part.opcode not in (*_NOTHING, "broadcast")]
    return next((part for part in (instruction, *reversed(parts)) if "op_name=" in part.attributes), instruction)


def _operation(instruction: Instruction) -> str:
    """JAX's name of an operation without what is the same for all: equal layers have one name."""
    parts = instruction.attribute(r'op_name="([^"]+)"').split("/")
    wrappers = r"jit\(.*\)|jvp\(\)|transpose\(jvp\(\)\)|while|body|closed_call|checkpoint|rematted_computation|vmap\(\)"
    kept = [re.sub(r"\d+", "*", part) for part in parts if part and not re.fullmatch(wrappers, part)]
    return "/".join(kept) or instruction.opcode
