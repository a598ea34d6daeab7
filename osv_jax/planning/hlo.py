"""What a traced and a compiled program need: operations, memory and its traffic, what is sent between devices."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params

from osv_jax.planning.program import array_bytes
from osv_jax.planning.traffic import Traffic, traffic_of

_COLLECTIVE = re.compile(
    r" = (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\((?:.*channel_id=(\d+))?"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device needs for a step; bytes, operations, seconds.

    Attributes:
        results: those that take the place of an argument need no memory of their own, and are not counted.
        collectives: kind -> (how many in the program, bytes of their results); those in loops are counted once.
        traffic: with the device's memory.
    """

    arguments: float
    temporaries: float
    results: float
    flops: float
    collectives: Mapping[str, tuple[int, float]]
    traffic: Traffic

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries + self.results


# Of jax.nn.dot_product_attention, whose arrays are [batch, length, heads, dim].
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def operations(jaxpr: Jaxpr) -> float:
    """Multiplications and additions of all matrix products and convolutions, those in loops as often as they run.

    Attention's kernel by cuDNN is two products of queries with all keys, and its gradient five, one of them again.

    XLA's own count has the body of a loop once, and stage 2's solver is one.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        inner = sum(operations(child) for child in jaxprs_in_params(equation.params))
        if equation.primitive.name == "scan":
            inner *= equation.params["length"]
        elif equation.primitive.name == "shard_map":
            inner *= equation.params["mesh"].size
        elif equation.primitive.name == "pallas_call":
            inner *= np.prod(equation.params["grid_mapping"].grid)
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = _array(equation.invars[0]).shape
            inner = 2.0 * _array(equation.outvars[0]).size * np.prod([left[axis] for axis in contracted])
        elif equation.primitive.name == "conv_general_dilated":
            kernel, numbers = _array(equation.invars[1]).shape, equation.params["dimension_numbers"]
            inner = 2.0 * _array(equation.outvars[0]).size * np.prod(kernel) / kernel[numbers.rhs_spec[0]]
        elif (products := _CUDNN_PRODUCTS.get(equation.primitive.name)) is not None:
            queries, keys = (_array(variable) for variable in equation.invars[:2])
            inner = 2.0 * products * queries.size * keys.shape[1]
        total += inner
    return total


def _array(variable: Any) -> Any:
    """Shape and size of a variable, which not all that JAX declares to stand there have."""
    return variable.aval


def analyse(compiled: jax.stages.Compiled, flops: float) -> Plan:
    """What the compiler knows about its program, which is one device's.

    Args:
        flops: of one device.
    """
    memory, program = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and program is not None, "the compiler tells nothing about its program"
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, results
    return Plan(*sizes, flops, collectives_of(program), traffic_of(program))


def collectives_of(program: str) -> dict[str, tuple[int, float]]:
    """Kind -> (number, bytes of their results) of the collectives in an HLO program."""
    found: dict[str, tuple[int, float]] = {}
    seen = set()
    in_fusion = False
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            in_fusion = "fus" in line.split(" ", 1)[0]
        if not (match := _COLLECTIVE.search(line)):
            continue
        shapes, kind, start, channel = match.groups()
        # Without layouts: what a TPU keeps on the chip itself is sent, too.
        sizes = array_bytes(re.sub(r"\{[^}]*\}", "", shapes))
        # What starts a gathering returns its operand beside its result; several that were combined return them all.
        size = max(sizes, default=0) if start and kind != "all-reduce" else sum(sizes)
        if in_fusion and channel:
            # A TPU's compiler hides one behind several computations, and writes it into the fusion of each.
            if (kind, channel, size) in seen:
                continue
            seen.add((kind, channel, size))
        count, total = found.get(kind, (0, 0.0))
        found[kind] = (count + 1, total + size)
    return found


def assigned_memory(assignment: str) -> tuple[float, float, float]:
    """Arguments, temporaries and results that are no argument [bytes] of XLA's text about a program's buffers."""
    sizes = {"arguments": 0.0, "temporaries": 0.0, "results": 0.0}
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (.*)$", assignment, re.MULTILINE):
        # A colour is another memory, on the chip's own die.
        if kind.startswith("color") or "thread-local" in kind:
            continue
        where = "arguments" if "parameter" in kind else "results" if "maybe-live-out" in kind else "temporaries"
        sizes[where] += float(size)
    return sizes["arguments"], sizes["temporaries"], sizes["results"]


def read_assignment(folder: pathlib.Path, flops: float) -> Plan | None:
    """What XLA has written of a step into `--xla_dump_to` by the time it has assigned all memory; None before."""
    # The last one of them.
    if not list(folder.glob("*train_step*-memory-usage-report.txt")):
        return None
    (assignment,) = folder.glob("*train_step*-buffer-assignment.txt")
    (program,) = folder.glob("*train_step*after_optimizations.txt")
    text = program.read_text()
    return Plan(*assigned_memory(assignment.read_text()), flops, collectives_of(text), traffic_of(text))
