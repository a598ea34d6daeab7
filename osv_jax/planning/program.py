"""An optimised HLO program, read from the text that XLA writes of it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_DTYPE_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|called_computations|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|[^\s,]+)"
)
_FRAMES = {
    "FileNames": re.compile(r'^(\d+) "(.*)"$'),
    "FileLocations": re.compile(r"^(\d+) \{.*?file_name_id=(\d+).*?\bline=(\d+)"),
    "StackFrames": re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"),
}


def array_bytes(shapes: str) -> list[int]:
    """The sizes of all arrays in a type's text; on a TPU, those that are kept on the chip itself take nothing."""
    return [
        0 if "T(" in layout and "S(1)" in layout else _DTYPE_BYTES.get(dtype, 4) * math.prod(map(int, dims.split(",")))
        for dtype, dims, layout in (match.groups("") for match in _ARRAY.finditer(shapes.replace("[]", "[1]")))
        if dtype != "token"
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        shape: the text of its type, such as `(bf16[8,4]{1,0}, f32[])`.
        arguments: what stands in its brackets: operands, or the number of a parameter.
        attributes: what follows these.
        is_root: whether it is the result of its computation.
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of its operands."""
        if self.opcode in ("parameter", "constant", "iota"):
            return []
        return [operand.split()[-1].lstrip("%") for operand in _top_level(self.arguments) if operand.strip()]

    @property
    def bytes(self) -> int:
        """Of its results."""
        return sum(array_bytes(self.shape))

    @property
    def called(self) -> list[str]:
        """The names of the computations that it runs."""
        names = [name for group in _CALLED.findall(self.attributes) for name in group.strip("{}").split(",")]
        return [name.strip().lstrip("%") for name in names if name.strip()]

    def attribute(self, pattern: str) -> str:
        """What the group of a pattern matches in its attributes, or nothing."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, the first one to run, and the line of our code by the number of a stack frame."""

    computations: Mapping[str, list[Instruction]]
    entry: str
    frames: Mapping[str, str]

    def source(self, instruction: Instruction) -> str:
        """FILE:LINE that an instruction comes from, or nothing."""
        if frame := instruction.attribute(r"stack_frame_id=(\d+)"):
            return self.frames.get(frame, "")
        file = instruction.attribute(r'source_file="([^"]+)"')
        return f"{_shortened(file)}:{instruction.attribute(r'source_line=([0-9]+)')}" if file else ""


def parse(text: str) -> Program:
    """The program of XLA's text.

    Raises:
        ValueError: it has no entry.
    """
    computations: dict[str, list[Instruction]] = {}
    tables: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in _FRAMES}
    entry = table = ""
    inside: list[Instruction] | None = None
    for line in text.splitlines():
        if inside is not None and (match := _INSTRUCTION.match(line)):
            inside.append(_instruction(match[2], match[3], bool(match[1])))
        elif line.startswith("}"):
            inside = None
        elif not line.startswith(("HloModule", " ")) and (match := _COMPUTATION.match(line)):
            inside = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif line.isalpha():
            table = line if line in _FRAMES else ""
        elif table and (match := _FRAMES[table].match(line)):
            tables[table][match[1]] = match.groups("")[1:]
    if not entry:
        raise ValueError("This is no HLO program: it has no entry.")
    return Program(computations, entry, _lines_of_frames(tables))


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    opening = call.index("(")
    end = _closing(call, opening)
    return Instruction(name, shape, call[:opening], call[opening + 1 : end - 1], call[end:], is_root)


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _top_level(arguments: str) -> Iterator[str]:
    """The arguments one by one: commas in brackets separate none."""
    depth = start = 0
    arguments = re.sub(r"/\*.*?\*/", "", arguments)
    for match in re.finditer(r"[(){}\[\],]", arguments):
        if match[0] != ",":
            depth += 1 if match[0] in "({[" else -1
        elif depth == 0:
            yield arguments[start : match.start()]
            start = match.end()
    yield arguments[start:]


def _shortened(file: str) -> str:
    """The part of a path that says whose file it is."""
    _, folder, rest = file.rpartition("/osv_jax/")
    return f"osv_jax/{rest}" if folder else file


def _lines_of_frames(tables: Mapping[str, Mapping[str, tuple[str, ...]]]) -> dict[str, str]:
    """The innermost line of this package in each stack, or where there is none the innermost line."""
    lines = {
        location: f"{_shortened(tables['FileNames'][file][0])}:{line}"
        for location, (file, line) in tables["FileLocations"].items()
    }
    found = {}
    for frame in tables["StackFrames"]:
        stack: list[str] = []
        current = frame
        while current in tables["StackFrames"]:
            location, parent = tables["StackFrames"][current]
            stack.append(lines[location])
            # XLA writes the number of the frame around one plus 1, and no number or 1 where there is none.
            current = str(int(parent or 1) - 1)
        found[frame] = next((line for line in stack if line.startswith("osv_jax/")), stack[0])
    return found
