"""Ranges tell numbers that are allowed from all others, in the same words everywhere."""

import argparse
import math

import numpy as np
import pytest

from osv_jax.errors import UserError
from osv_jax.runtime.ranges import COUNT, DECAY, FINITE, FPS, POSITIVE, SEED, Range


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (SEED, [0, 1, 2**32 - 1, np.int64(7)], [-1, 2**32, 2**64 - 1, 1.0, True]),
        (COUNT, [1, 10**15], [10**400, 0, -1, 1.5, "1", None, math.nan]),
        (FPS, [0.1, 7, np.float32(24), 240.0], [0.0999, 241, 1e10, math.inf, math.nan, "7"]),
        (POSITIVE, [5e-324, 1e300], [0, 0.0, -1, math.inf, math.nan]),
        (DECAY, [0, 0.0, 0.999], [1, 1.0, -0.1, math.nan]),
        (FINITE, [-1e300, 0, 2**62], [10**400, math.inf, -math.inf, math.nan, True, 1j]),
    ],
)
def test_what_is_allowed(allowed, inside, outside):
    assert [value for value in inside if value not in allowed] == []
    assert [value for value in outside if value in allowed] == []


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (SEED, "a whole number from 0 to 4294967295"),
        (COUNT, "a whole number of at least 1"),
        (FPS, "a number from 0.1 to 240"),
        (POSITIVE, "a finite number above 0"),
        (DECAY, "a number of at least 0 and below 1"),
        (FINITE, "a finite number"),
        (Range(0, 1, above_low=True), "a number above 0 and at most 1"),
    ],
)
def test_what_is_allowed_is_said(allowed, words):
    with pytest.raises(UserError) as error:
        allowed.check("config.x", math.nan)
    assert str(error.value) == f"config.x=nan must be {words}."
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=allowed)
    with pytest.raises(argparse.ArgumentError, match=f"argument --x: nan must be {words}"):
        parser.parse_args(["--x=nan"])


def test_arguments_become_numbers():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=COUNT)
    parser.add_argument("--fps", type=FPS)
    args = parser.parse_args(["--count=3", "--fps=12"])
    assert (args.count, args.fps) == (3, 12.0) and isinstance(args.count, int) and isinstance(args.fps, float)
