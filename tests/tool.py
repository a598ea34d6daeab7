"""osv_jax.convert_weights as a function of its arguments."""

from osv_jax import convert_weights
from osv_jax.runtime import ending


def convert(arguments: list[str]) -> int:
    """Converts; returns the exit status."""
    return ending.exit_status(lambda: convert_weights.main(arguments))
