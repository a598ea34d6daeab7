"""What the programs that take a configuration share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from osv_jax.errors import UserError
from osv_jax.runtime import arguments, ending


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a program; for how it ends see `ending.exit_status`."""
    keep_compiled_programs()

    def checked(argv: list[str]) -> int | None:
        if argv[1:]:
            raise UserError(f"Unexpected argument {argv[1]!r}; options look like --config.batch_size=4.")
        return main(argv)

    ending.run(lambda: app.run(checked, flags_parser=parse))


def keep_compiled_programs() -> None:
    """What is compiled once need not be compiled again by the next start."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", arguments.compilation_cache())


def read_config(arguments: Sequence[str]) -> ConfigDict:
    """The configuration of `--config=FILE --config.KEY=VALUE ...`, for programs that have no flags of absl's.

    Raises:
        UserError: as `parse`; there is no --config, or something else.
    """
    argv, values = ["", *arguments], flags.FlagValues()
    located = [_locate_config(argument) for argument in argv]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=located)
    if left := parse(argv, values)[1:]:
        raise UserError(f"Unexpected argument {left[0]!r}; options look like --config.batch_size=4.")
    if holder.value is None:
        raise UserError("--config is needed, a file of configs/.")
    return holder.value


def parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """The arguments that are no flags.

    Raises:
        UserError: a flag, a key of the configuration or a value that does not exist.
    """
    try:
        return values([_locate_config(argument) for argument in argv])
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
