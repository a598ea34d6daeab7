"""A plugin of pytest that records how close to its bound every numeric comparison comes: `pytest -p margins`.

Recorded are `np.testing.assert_allclose`, `pytest.approx`, and every `<`, `<=`, `>` and `>=` of floating-point numbers
in an `assert`. The margin is error / bound; above 1 the test fails. Tests without such comparisons are left out.
`portable.py` runs this; the folder that it writes to is `OSV_JAX_MARGINS`.
"""

import ast
import collections
import hashlib
import inspect
import itertools
import json
import linecache
import operator
import os
import pathlib
import re
import sys
import tempfile

import numpy as np
from _pytest.approx import ApproxScalar
from _pytest.assertion import rewrite

_OPERATORS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_COMPARES = re.compile(r"relative_error|allclose|approx\(|differences\(|joint_error|assert_moved_alike| [<>]=? ")
_TESTS = pathlib.Path(__file__).parent

# (file, line) -> the largest margin there, what it was made of, and how many there were.
_worst = {}
_counts = collections.Counter()


def compared(kinds, *operands):
    """The value of `a < b <= c`, which `_Recorder` has put this in the place of."""
    result = True
    for kind, (left, right) in zip(kinds, itertools.pairwise(operands), strict=True):
        arrays = [np.asarray(x) for x in (left, right)]
        if any(np.issubdtype(x.dtype, np.floating) for x in arrays):
            _record(kind, *(arrays if kind[0] == "<" else arrays[::-1]))
        result = _COMPARE[kind](left, right)
        if len(kinds) > 1 and not result:
            break
    return result


class _Recorder(ast.NodeTransformer):
    """Has every comparison of sizes inside an `assert` made by `compared`."""

    def __init__(self):
        self.inside = False

    def visit_Assert(self, node):
        self.inside = True
        node = self.generic_visit(node)
        self.inside = False
        return node

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        if not self.inside or any(type(op) not in _OPERATORS for op in node.ops):
            return node
        kinds = tuple(_OPERATORS[type(op)] for op in node.ops)
        call = ast.parse(f"__import__('margins').compared({kinds})", mode="eval").body
        call.args += [node.left, *node.comparators]
        for made in (call, call.args[0], *ast.walk(call.func), *ast.walk(call.args[0])):
            ast.copy_location(made, node)
        return call


def _patch() -> None:
    """Puts the recording into the three kinds of comparisons."""
    rewrite_asserts, equals, allclose = rewrite.rewrite_asserts, ApproxScalar.__eq__, np.testing.assert_allclose

    def rewrite_and_record(module, source, module_path=None, config=None):
        _Recorder().visit(module)
        rewrite_asserts(module, source, module_path, config)

    def equals_and_record(self, actual):
        _record("approx", abs(float(actual) - self.expected), float(self.tolerance))
        return equals(self, actual)

    def allclose_and_record(actual, desired, rtol=1e-7, atol=0, **others):
        numbers, expected = (np.asarray(x, np.float64) for x in (actual, desired))
        with np.errstate(invalid="ignore"):  # Infinity from infinity, where it is expected, has no margin.
            error = np.abs(numbers - expected)
        _record("allclose", error, atol + rtol * np.abs(expected))
        allclose(actual, desired, rtol=rtol, atol=atol, **others)

    rewrite.rewrite_asserts, np.testing.assert_allclose = rewrite_and_record, allclose_and_record
    ApproxScalar.__eq__ = equals_and_record


def _record(kind: str, value, bound) -> None:
    """`value` must not exceed `bound`: of ">" the two are exchanged."""
    value, bound = (np.ravel(np.asarray(x, np.float64)) for x in np.broadcast_arrays(value, bound))
    margin = np.divide(value, bound, out=np.where(value > 0, np.inf, 0.0), where=bound > 0)
    if not np.isfinite(margin).any():
        return
    worst = int(np.nanargmax(margin))
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or _TESTS not in pathlib.Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    place = frame.f_code.co_filename, frame.f_lineno
    _counts[place] += 1
    if place not in _worst or margin[worst] > _worst[place]["margin"]:
        _worst[place] = {
            "kind": kind,
            "test": os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0],
            "text": linecache.getline(*place).strip(),
            "margin": margin[worst],
            "value": value[worst],
            "bound": bound[worst],
        }


def fingerprint() -> str:
    """Digests of a small program's machine code and of its results' last bits: what a variant of XLA really changes."""
    import jax
    import jax.numpy as jnp

    x = np.random.default_rng(0).standard_normal((64, 257), np.float32)
    program = jax.jit(lambda x: (jnp.sum(x, 1), jax.nn.softmax(x), x @ x.T, jnp.tanh(x))).lower(x)
    with tempfile.TemporaryDirectory() as folder:
        results = program.compile({"xla_dump_to": folder})(x)
        code = [path.read_bytes() for path in sorted(pathlib.Path(folder).glob("*.o"))]
    parts = code, [np.asarray(result).tobytes() for result in results]
    return " ".join(hashlib.sha256(b"".join(part)).hexdigest()[:6] for part in parts)


def pytest_configure(config):
    # Or the next run without this plugin would read what was compiled with it.
    sys.dont_write_bytecode = True
    _patch()


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if _COMPARES.search(inspect.getsource(item.function))]


def pytest_sessionfinish(session):
    if session.config.getoption("numprocesses", None):
        return  # Its workers have it.
    places = [
        {"file": str(pathlib.Path(file).relative_to(_TESTS)), "line": line, "count": _counts[file, line], **worst}
        for (file, line), worst in _worst.items()
    ]
    folder = pathlib.Path(os.environ["OSV_JAX_MARGINS"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.json"
    path.write_text(json.dumps({"program": fingerprint(), "places": places}, indent=1))
