"""tools/convert_weights.py as a function of its arguments."""

import pathlib
import runpy

from osv_jax.runtime import ending

_main = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "tools" / "convert_weights.py"))["main"]


def convert(arguments: list[str]) -> int:
    """Converts; returns the exit status."""
    return ending.exit_status(lambda: _main(arguments))
