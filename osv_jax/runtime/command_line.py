"""What the programs that take a configuration share: parsing, refusing, and ending."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging

from osv_jax.errors import UserError
from osv_jax.runtime import arguments, distributed


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a program; what the user can mend is one sentence on stderr and exit status 2, SIGTERM status 143."""
    keep_compiled_programs()

    def quietly(argv: list[str]) -> int | None:
        logging.set_verbosity(logging.ERROR)  # Orbax tells 20 lines about every checkpoint.
        if argv[1:]:
            raise UserError(f"Unexpected argument {argv[1]!r}; options look like --config.batch_size=4.")
        return main(argv)

    try:
        app.run(quietly, flags_parser=parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except distributed.Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(distributed.EXIT_STATUS)


def keep_compiled_programs() -> None:
    """What is compiled once need not be compiled again by the next start."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(arguments.COMPILED_PROGRAMS))


def parse(argv: list[str]) -> list[str]:
    """The arguments that are no flags.

    Raises:
        UserError: a flag, a key of the configuration or a value that does not exist.
    """
    try:
        return flags.FLAGS([_locate_config(argument) for argument in argv])
    except AttributeError as error:
        raise UserError(f"The configuration has no key {error}; see the file given with --config.") from error
    except (flags.Error, ValueError) as error:
        # What a configuration file raises arrives as a whole traceback, its last line being the message.
        raise UserError(str(error).strip().splitlines()[-1]) from error


def _locate_config(argument: str) -> str:
    """`--config=FILE` or `--config=FILE:VARIANT` with the file's whole name; other arguments as they are."""
    option, _, name = argument.partition("=")
    if option != "--config":
        return argument
    file, *variant = name.split(":", 1)
    return f"{option}={':'.join([os.fspath(arguments.config_file(file)), *variant])}"
