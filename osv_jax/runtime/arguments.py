"""What the programs with plain arguments share. Imports no JAX, for `osv_jax.prepare`."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any, NoReturn

from osv_jax.errors import UserError
from osv_jax.runtime.paths import as_path, user_cache

# Those that come with the package: of an installed one, of a checkout.
_PACKAGE = pathlib.Path(__file__).parents[1]
_CONFIGS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


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

    Args:
        name: its path; or, where nothing has that, the name of one that comes with osv_jax, such as `stage1` or
            `configs/stage1.py`.

    Raises:
        UserError: there is none of that name.
    """
    file = as_path(name)
    if file.is_file():
        return file
    known = {path.stem: path for folder in _CONFIGS for path in sorted(folder.glob("*.py"))}
    parts = pathlib.PurePath(name).parts
    if parts[:-1] in ((), ("configs",)) and parts and (found := known.get(parts[-1].removesuffix(".py"))):
        return found
    raise UserError(
        f"The configuration file {file} does not exist; give the path of yours, or one of {', '.join(known)}."
    )
