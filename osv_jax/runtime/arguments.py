"""What the programs with plain arguments share: parsing, and ending. Imports no JAX, for `osv_jax.prepare`."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

from osv_jax.errors import UserError
from osv_jax.runtime.paths import as_path

# Where compiled programs are kept unless JAX_COMPILATION_CACHE_DIR says otherwise.
COMPILED_PROGRAMS = pathlib.Path("~/.cache/osv_jax/jax").expanduser()


class Parser(argparse.ArgumentParser):
    """Of a program `python -m osv_jax.NAME`, whose help begins with its docstring; mistakes are `UserError`s."""

    def __init__(self, name: str, description: str):
        super().__init__(
            prog=f"python -m osv_jax.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}; see --help.")


def run(main: Callable[[], None]) -> None:
    """Runs a program; what the user can mend is one sentence on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def config_file(name: str) -> pathlib.Path:
    """A configuration file, which is Python code.

    Raises:
        UserError: there is none of that name.
    """
    file = as_path(name)
    if not file.is_file():
        raise UserError(f"The configuration file {file} does not exist; see the folder configs/.")
    return file
