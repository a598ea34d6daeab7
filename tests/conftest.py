"""Shared by all tests: eight fake devices, checked shapes, cheap compilation, and the comparison ports are held to."""

import functools
import gc
import os
import pathlib
import subprocess
import sys

# jaxtyping would keep what checked modules import under the name of checked code, which it is not: see `test_typing`.
sys.dont_write_bytecode = True

# Most of a test's time is XLA's; slow code that is built fast takes a third of it. The pass that is left out splits
# every sum in two, which is half of what compiling a step takes, with its norms of hundreds of parameters. The
# environment's flags come after these, for the last one counts: see `portable.py`.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1 --xla_disable_hlo_passes=tree_reduction_rewriter"
)
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

import flax.struct  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# NumPy's arrays may stand for JAX's, as everywhere in JAX, and an int for a float.
jaxtyping.Array = jax.Array | np.ndarray


def check_signatures(*modules: str) -> None:
    """Every shape and type in a signature of these modules, imported later, holds, or the test that called it fails."""
    checker = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    jaxtyping.install_import_hook(list(modules), checker)


# Not the networks': tracing them would take half as long again. `test_typing` has a process in which they are checked.
_PACKAGE = pathlib.Path(__file__).parents[1] / "osv_jax"
check_signatures(*(f"osv_jax.{path.stem}" for path in _PACKAGE.iterdir() if path.stem not in ("__init__", "models")))
_struct_dataclass = flax.struct.dataclass


def _unchecked_dataclass(cls):
    """Not so the fields of pytrees: JAX fills them with shapes, shardings and stacked arrays too."""
    cls = _struct_dataclass(cls)
    cls.__no_type_check__ = True
    return cls


flax.struct.dataclass = _unchecked_dataclass
# Tracing makes millions of small objects that live on; looking through them so often is for nothing.
gc.set_threshold(200_000, 50, 50)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
_CACHE = pathlib.Path(os.environ.get("OSV_JAX_TEST_CACHE", pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Why a test is left out where its mark is not asked for, by `-m`.
_LEFT_OUT = {
    "integration": "runs whole programs, or compiles for long: run `make test-integration`, as CI does",
    "slow": "takes many minutes or 16 GiB of memory: run `make test-slow`",
}


def pytest_collection_modifyitems(config, items):
    for name, reason in _LEFT_OUT.items():
        if name not in config.option.markexpr:
            for item in items:
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=reason))


class Stopped(Exception):
    """See `stop`."""


def stop(*_: object) -> None:
    """Ends a program where a test has seen enough, in the place of what comes then."""
    raise Stopped


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected|| over all elements, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def flat(tree) -> np.ndarray:
    """All leaves of a tree as one vector, in float64; of JAX's own, every shape would be a program to compile."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


# Compiled with the least effort on every machine, whatever flags `portable.py` or anyone gives: for what a test begins
# with and what it compares with. What it is about is compiled by `jax.jit`, as the flags say.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def small_disk(tmp_path, request) -> pathlib.Path:
    """A disk of its own, of 1 MB if not parametrized."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={getattr(request, 'param', '1m')}"]
    if sys.platform != "linux" or subprocess.run(["mount", *options, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root on Linux; test_ending.py has the errors of a full one")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="session")
def float16():
    """Skips where XLA has none."""
    try:
        return jax.jit(lambda x: x.astype(jnp.float16))(jnp.ones(3)).dtype
    except jax.errors.JaxRuntimeError:
        pytest.skip("XLA has no float16 on a processor without instructions for it; bfloat16 is tested there")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
