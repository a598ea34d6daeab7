"""What `dtype=float32` means for matrix products and convolutions."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp


def matmul_precision(dtype: Any) -> contextlib.AbstractContextManager[None]:
    """A context in which programs are traced that compute in `dtype`: products of float32 are float32's.

    Without it, TPUs round their factors to bfloat16 and GPUs to TF32, which has 10 bits, too.
    """
    return jax.default_matmul_precision("highest") if jnp.dtype(dtype) == jnp.float32 else contextlib.nullcontext()
