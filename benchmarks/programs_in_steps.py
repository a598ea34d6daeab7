"""Calls of the package's programs, one after the other, by a benchmark that goes on where it was stopped."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

from osv_jax.errors import UserError
from osv_jax.runtime import paths
from osv_jax.runtime.arguments import Parser

SizeT = TypeVar("SizeT")


@dataclasses.dataclass(frozen=True)
class Step:
    """A call of one of the package's programs.

    Attributes:
        name: unique.
        program: one of `PROGRAMS`.
        arguments: its command line.
        after: names of the steps whose results it needs.
    """

    name: str
    program: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """As one would give it."""
        program = {"merge": "-m osv_jax.convert_weights merge", "text_world": "benchmarks/text_world.py"}
        named = program.get(self.program, f"-m osv_jax.{self.program}")
        return f"python {named} {shlex.join(self.arguments)}"


def begin(
    parser: Parser, sizes: Mapping[str, SizeT], files: Sequence[str], without: str, given: Sequence[str] | None
) -> tuple[SizeT, pathlib.Path, argparse.Namespace]:
    """Reads a benchmark's command line, and tries what it needs hours from now.

    Args:
        files: that it writes at its end.
        without: what there is without weights for FVD.
        given: the command line.

    Returns:
        The size, the folder for everything that is made, and the whole command line: `fvd_weights` is the folder with
        I3D or nothing.

    Raises:
        UserError: on anything the user can fix.
    """
    parser.add_argument("--size", choices=sizes, required=True, help="full: hours; tiny: to see that it works")
    parser.add_argument("--output", required=True, metavar="DIR", help="for everything that is made")
    parser.add_argument("--fvd_weights", default="", metavar="DIR", help=f"folder with i3d; without: {without}")
    args = parser.parse_args(given)
    from osv_jax.convert import weights
    from osv_jax.runtime import command_line

    command_line.keep_compiled_programs()
    output = pathlib.Path(args.output)
    if args.fvd_weights:
        weights.load_config(args.fvd_weights, "i3d")
    (output / "steps").mkdir(parents=True, exist_ok=True)
    for name in files:
        paths.check_file(output / name, "--output")
    return sizes[args.size], output, args


def do_all(steps: Sequence[Step], output: pathlib.Path) -> None:
    """Does what has not been done, one step after the other; raises what `do` raises."""
    done: dict[str, str] = {}
    for step in steps:
        do(step, output, done)


def do(step: Step, output: pathlib.Path, done: dict[str, str]) -> None:
    """Does a step, or finds that it has been done.

    Args:
        done: fingerprints of the steps before, to which this one's is added.

    Raises:
        UserError: it was begun with other settings; and what the programs raise.
    """
    description = json.dumps([step.program, step.arguments, [done[name] for name in step.after]])
    done[step.name] = hashlib.sha256(description.encode()).hexdigest()[:16]
    file = output / "steps" / f"{step.name}.json"
    stored = json.loads(file.read_text()) if file.exists() else {"fingerprint": done[step.name], "done": False}
    if stored["fingerprint"] != done[step.name]:
        raise UserError(f"{output} was begun with other settings ({step.name}): give another --output, or delete it.")
    if stored["done"]:
        print(f"{step.name} is done.")
        return
    paths.write_text(file, json.dumps(stored))
    print(f"\n{step.command}", flush=True)
    PROGRAMS[step.program](step.arguments)
    paths.write_text(file, json.dumps(stored | {"done": True}))


def _prepare(arguments: Sequence[str]) -> None:
    from osv_jax import prepare

    prepare.main(arguments)


def _train(arguments: Sequence[str]) -> None:
    import jax

    from osv_jax import train
    from osv_jax.runtime import command_line

    (workdir,) = (argument for argument in arguments if argument.startswith("--workdir="))
    config = command_line.read_config([argument for argument in arguments if argument != workdir])
    train.train(config, paths.as_path(workdir.partition("=")[2]))
    jax.clear_caches()  # A dozen programs are compiled, and none is needed again.


def _merge(arguments: Sequence[str]) -> None:
    # On its own, for it keeps JAX from using any accelerator.
    subprocess.run([sys.executable, "-m", "osv_jax.convert_weights", "merge", *arguments], check=True)


def _text_world(arguments: Sequence[str]) -> None:
    import text_world

    text_world.main(arguments)


PROGRAMS = {"prepare": _prepare, "train": _train, "merge": _merge, "text_world": _text_world}
