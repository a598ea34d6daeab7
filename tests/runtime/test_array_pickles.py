"""Pickles of arrays give arrays, or an error before anything is run or made that the file is too small for."""

import pickle

import numpy as np
import pytest

from osv_jax.runtime.array_pickles import read_arrays

ARRAYS = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.zeros(2)}


class Reduced:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_come_back(protocol):
    read = read_arrays(pickle.dumps(ARRAYS, protocol))
    np.testing.assert_array_equal(read["a"]["kernel"], ARRAYS["a"]["kernel"])
    np.testing.assert_array_equal(read["b"], ARRAYS["b"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        # Put away under the number 2^31 - 1, for which Python would make room for as many others.
        (b"\x80\x02}r\xff\xff\xff\x7f.", "it counts up to 2147483647"),
        (b"\x80\x02}p2147483647\n.", "it counts up to 2147483647"),
        (pickle.dumps({"a": Reduced(np.ndarray, ((2**40,), np.dtype("V1")))}), "it holds other things|damaged"),
        (pickle.dumps({"a": Reduced(np.ndarray, ((2**20,), np.dtype("f4")))}), "it holds other things"),
        (pickle.dumps({"a": np.array([None])}), "it holds other things|damaged"),
        (pickle.dumps({1: np.zeros(1)}), "it holds other things"),
        (pickle.dumps([np.zeros(1)]), "it holds other things"),
        (pickle.dumps({"a": print}), "'builtins.print' is not a NumPy array"),
        (pickle.dumps(ARRAYS)[:-30], "it is damaged"),
        (b"", "it is damaged"),
    ],
)
def test_what_is_none_is_refused(data, words):
    with pytest.raises(pickle.UnpicklingError, match=words):
        read_arrays(data)
