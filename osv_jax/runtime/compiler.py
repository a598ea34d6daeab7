"""What XLA is told where this package compiles a program that runs for long."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

# XLA's other way to multiply takes up to 1.6 times as long for networks of these kinds; the pass splits every sum in
# two, which has to be compiled, and makes nothing faster: docs/performance.md.
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_disable_hlo_passes": "tree_reduction_rewriter",
}


def compiler_options() -> dict[str, Any]:
    """For `jax.jit(..., compiler_options=...)` and `lowered.compile(...)`.

    There are none but for CPUs, none that XLA_FLAGS sets, and none that the installed XLA does not know.
    """
    if jax.default_backend() != "cpu":
        return {}
    said = {flag.removeprefix("--").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in CPU_OPTIONS.items() if name not in said and _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x).lower(jnp.float32(0)).compile({name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
