"""What the programs with plain arguments share. Imports no JAX, for `osv_jax.prepare`."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any, NoReturn

from osv_jax.errors import UserError
from osv_jax.runtime.paths import as_path, user_cache


def compilation_cache() -> str | None:
    """The folder for compiled programs where JAX_COMPILATION_CACHE_DIR names none, so that the next start has them.

    None where nothing can be kept for the user; programs are compiled anew then.
    """
    folder = user_cache("jax")
    return str(folder) if folder else None


class Parser(argparse.ArgumentParser):
    """Of a program `python -m osv_jax.NAME`, whose help begins with its docstring; mistakes are `UserError`s."""

    def __init__(self, name: str = "", description: str | None = None, **options: Any):
        """`options` are argparse's own, which gives its sub-commands a `prog` this way."""
        options = {"prog": f"python -m osv_jax.{name}", **options}
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}; see --help.")


def config_file(name: str) -> pathlib.Path:
    """A configuration file, which is Python code.

    Raises:
        UserError: there is none of that name.
    """
    file = as_path(name)
    if not file.is_file():
        raise UserError(f"The configuration file {file} does not exist; see the folder configs/.")
    return file
