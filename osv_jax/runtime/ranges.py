"""Which numbers are allowed: the same for arguments, keys of a configuration and Python. Imports no JAX either."""

from __future__ import annotations

import argparse
import dataclasses
import math
import numbers
from typing import Any

from osv_jax.errors import UserError

# Of integers: no float can be made of larger ones, and no number here is so large.
_LARGEST = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers between two bounds; as the `type` of an argument of argparse, it reads them from text.

    Attributes:
        low, high: the bounds, which belong to it; no range has only an upper one.
        above_low, below_high: whether the bound itself does not belong to it.
        whole: whether only integers do. (`True` and `False` are no numbers.)
        also: one more number that belongs to it, which means something else.
    """

    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False
    below_high: bool = False
    whole: bool = False
    also: float | None = None

    def __contains__(self, value: object) -> bool:
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        number: Any = value  # `numbers` does not say that they compare to floats.
        # Compared, because `math.isfinite` fails for the largest integers.
        if not -math.inf < number < math.inf or (isinstance(number, int) and abs(number) > _LARGEST):
            return False
        if number == self.also:
            return True
        above = self.low < number if self.above_low else self.low <= number
        below = number < self.high if self.below_high else number <= self.high
        return bool(above and below)  # NumPy's numbers compare to NumPy's.

    def __str__(self) -> str:
        return self._bounds() + (f", or {self.also:g}" if self.also is not None else "")

    def _bounds(self) -> str:
        is_bounded = math.isfinite(self.high)
        kind = "a whole number" if self.whole else "a number" if is_bounded else "a finite number"
        low = f"above {self.low:.10g}" if self.above_low else f"of at least {self.low:.10g}"
        if not is_bounded:
            return f"{kind} {low}" if math.isfinite(self.low) else kind
        if self.above_low or self.below_high:
            return f"{kind} {low} and {'below' if self.below_high else 'at most'} {self.high:.10g}"
        return f"{kind} from {self.low:.10g} to {self.high:.10g}"

    def __call__(self, text: str) -> Any:
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            value = None
        if value not in self:
            raise argparse.ArgumentTypeError(f"{text} must be {self}")
        return value

    def check(self, name: str, value: object) -> None:
        """Raises UserError, with the name of the option, unless its value is one of these."""
        if value not in self:
            raise UserError(f"{name}={value!r} must be {self}.")


FINITE = Range()
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above_low=True)
PROBABILITY = Range(0, 1)
DECAY = Range(0, 1, below_high=True)
COUNT = Range(1, whole=True)
WHOLE = Range(0, whole=True)
# What `jax.random.key` and Grain tell apart: JAX takes 2^32 for 0, and -1 for 2^32 - 1.
SEED = Range(0, 2**32 - 1, whole=True)
# What containers and players follow.
FPS = Range(0.1, 240)
# SVD's own are 1 to 255; people go beyond.
MOTION_BUCKET_ID = Range(0, 1023)
# Of videos: a mistyped size would take all of the machine's memory.
PIXELS = Range(1, 8192, whole=True)
NUM_FRAMES = Range(1, 1000, whole=True)
