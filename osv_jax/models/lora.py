"""LoRA for the UNets of SVD and AnimateDiff: which modules take part, initial values, merging into the base weights.

A LoRA tree mirrors the parameter tree down to the modules it covers; each holds `a` [*window, in, rank] and `b`
[rank, out] (PEFT's convention: `a` has the base kernel's window, `b` is pointwise). It is passed to the network as the
variable collection `lora`; see `layers.Dense` and `layers.Conv`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Params = Mapping[str, Any]
Path = tuple[str, ...]

_ATTENTION = r"attn[12]/to_(q|k|v|out_0)"
_OTHERS = (
    r"proj_in|proj_out|(ff|ff_in)/(net_0/proj|net_2)|conv1|conv2|conv_shortcut|(down|up)samplers_0/conv|time_emb_proj"
)
TARGETS = {"attention": rf"(^|/)({_ATTENTION})$", "all": rf"(^|/)({_ATTENTION}|{_OTHERS})$"}
_QUERY_OR_KEY = re.compile(r"attn2/to_[qk]$")


def target_modules(params: Params, targets: str) -> list[Path]:
    """Paths of the modules that the target set (a key of `TARGETS`) covers, in sorted order."""
    if targets not in TARGETS:
        raise ValueError(f"LoRA targets must be one of {sorted(TARGETS)}, got {targets!r}.")
    pattern = re.compile(TARGETS[targets])
    modules = [path[:-1] for path in flatten_dict(params) if path[-1] == "kernel"]
    idle = without_effect(modules)
    return sorted(path for path in modules if pattern.search("/".join(path)) and path not in idle)


def without_effect(modules: Iterable[Path]) -> set[Path]:
    """Of all modules of a UNet those whose gradient is identically zero: SVD's cross-attention has a single key.

    Its q and k therefore have no effect. AnimateDiff's UNet attends to a text's tokens, and along frames.
    """
    modules = list(modules)
    if not any("temporal_transformer_blocks" in name for path in modules for name in path):
        return set()
    return {path for path in modules if _QUERY_OR_KEY.search("/".join(path))}


def init_lora(key: jax.Array, params: Params, rank: int, modules: Iterable[Path]) -> dict[str, Any]:
    """A float32 LoRA tree that changes nothing yet: `a` as PEFT (uniform, bound 1/sqrt(fan in)), `b` zero.

    Args:
        params: the base parameters (arrays or shapes), whose kernels give the sizes.
    """
    flat, modules = flatten_dict(params), list(modules)
    shapes = [(*flat[(*path, "kernel")].shape[:-1], rank) for path in modules]
    ends = list(itertools.accumulate(map(math.prod, shapes)))
    # One draw for all: XLA takes minutes to compile a draw of its own for each of hundreds of modules.
    # (The barrier keeps it from repeating the draw in every module's fusion.)
    pool = jax.lax.optimization_barrier(jax.random.uniform(key, (ends[-1],), minval=-1.0))
    lora = {}
    for path, shape, end in zip(modules, shapes, ends, strict=True):
        bound = 1.0 / math.sqrt(math.prod(shape[:-1]))
        lora[(*path, "a")] = bound * pool[end - math.prod(shape) : end].reshape(shape)
        lora[(*path, "b")] = jnp.zeros((rank, flat[(*path, "kernel")].shape[-1]))
    return unflatten_dict(lora)


def scale_lora(lora: Params, scale: float) -> Params:
    """Folds PEFT's alpha / rank into `b`."""
    if scale == 1.0:
        return lora
    return jax.tree.map_with_path(lambda path, leaf: leaf * scale if path[-1].key == "b" else leaf, lora)


def merge_lora(params: Params, lora: Params, dtype: Any = None) -> dict[str, Any]:
    """Base parameters with `a b` added to every covered kernel in float32, and then rounded once.

    Args:
        dtype: of the covered kernels in the result; by default that of each in the base.
    """
    merged = flatten_dict(params)
    flat = flatten_dict(lora)
    for path in {path[:-1] for path in flat}:
        kernel = merged[(*path, "kernel")]
        update = flat[(*path, "a")].astype(jnp.float32) @ flat[(*path, "b")].astype(jnp.float32)
        merged[(*path, "kernel")] = (kernel.astype(jnp.float32) + update).astype(dtype or kernel.dtype)
    return unflatten_dict(merged)


def truncate_lora(lora: Params, rank: int) -> tuple[dict[str, Any], float]:
    """The LoRA of a smaller rank whose products `a b` are closest to those given, alpha = rank.

    Args:
        rank: at most the given one. Where a kernel itself has less, `a` and `b` are filled up with zeros.

    Returns:
        The LoRA, as NumPy arrays, and how far its products are from those given: ||difference|| / ||given|| over all
        modules.

    Raises:
        ValueError: a rank that is not in 1 .. the given one.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(lora).items()}
    smaller, lost, whole = {}, 0.0, 0.0
    for path in sorted({path[:-1] for path in flat}):
        a, b = flat[(*path, "a")], flat[(*path, "b")]
        if not 1 <= rank <= len(b):
            raise ValueError(f"rank must be in 1 .. {len(b)}, got {rank}.")
        # Of the two small factors, not of the product, which is as large as the kernel.
        q_a, r_a = np.linalg.qr(a.reshape(-1, len(b)).astype(np.float64))
        q_b, r_b = np.linalg.qr(b.T.astype(np.float64))
        left, values, right = np.linalg.svd(r_a @ r_b.T)
        kept = min(rank, len(values))
        root = np.sqrt(values[:kept])
        empty = ((0, 0), (0, rank - kept))
        new_a, new_b = np.pad((q_a @ left[:, :kept]) * root, empty), np.pad((q_b @ right[:kept].T) * root, empty).T
        smaller[(*path, "a")] = new_a.reshape(*a.shape[:-1], rank).astype(a.dtype)
        smaller[(*path, "b")] = new_b.astype(b.dtype)
        lost, whole = lost + (values[kept:] ** 2).sum(), whole + (values**2).sum()
    return unflatten_dict(smaller), math.sqrt(lost / whole) if whole else 0.0


def closest_lora(changes: Mapping[Path, np.ndarray], rank: int) -> tuple[dict[str, Any], float]:
    """The LoRA of a rank whose products are closest to changes of whole kernels, alpha = rank.

    Args:
        changes: by the module's path, [*window, in, out].
        rank: where a kernel itself has less, `a` and `b` are filled up with zeros.

    Returns:
        The LoRA, float32 NumPy arrays, and the norm of what is left of the changes without it.
    """
    found, left = {}, 0.0
    for path, change in changes.items():
        matrix = change.reshape(-1, change.shape[-1]).astype(np.float64)
        wide = matrix.shape[0] < matrix.shape[1]
        matrix = matrix if wide else matrix.T
        # Of the shorter side, many times smaller than the kernel: singular vectors, the largest last.
        squares, vectors = np.linalg.eigh(matrix @ matrix.T)
        kept = min(rank, len(squares))
        vectors = vectors[:, ::-1][:, :kept]
        # Halves of equal size, so that neither is beyond a stored dtype.
        root = np.sqrt(np.sqrt(np.maximum(squares[::-1][:kept], 0)))
        short, long = vectors * root, (vectors.T @ matrix) / np.where(root > 0, root, 1)[:, None]
        short, long = np.pad(short, ((0, 0), (0, rank - kept))), np.pad(long, ((0, rank - kept), (0, 0)))
        a, b = (short, long) if wide else (long.T, short.T)
        found[(*path, "a")] = a.reshape(*change.shape[:-1], rank).astype(np.float32)
        found[(*path, "b")] = b.astype(np.float32)
        left += max(squares[: len(squares) - kept].sum(), 0.0)
    return unflatten_dict(found), math.sqrt(left)
