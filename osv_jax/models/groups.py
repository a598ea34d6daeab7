"""Named groups of the SVD UNet's parameters, so that a run can say which layers it trains."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Params = Mapping[str, Any]

# In this order: the first pattern that is found in a parameter's path decides. Every path matches the last.
GROUPS = {
    "spatial_transformer": r"/transformer_blocks_\d+/",
    "temporal_transformer": r"/temporal_transformer_blocks_\d+/",
    "spatial_resnet": r"/spatial_res_block/",
    "temporal_resnet": r"/temporal_res_block/",
    "other": r"",
}

# With one key in cross-attention these have no gradient, ever: training them would only cost memory.
_NO_GRADIENT = re.compile(r"/norm2/|/attn2/to_[qk]/")

TRAINABLE = ("lora", *GROUPS, "all")


def group_of(path: Sequence[str]) -> str:
    """The one group that the parameter at `path` belongs to."""
    joined = "/".join(path)
    return next(name for name, pattern in GROUPS.items() if re.search(pattern, joined))


def select(params: Params, trainable: Sequence[str]) -> dict[str, Any]:
    """The part of the UNet's parameters that the named groups train (`lora` names none of them, `all` every one).

    Raises:
        ValueError: on a name that is not in `TRAINABLE`.
    """
    unknown = [name for name in trainable if name not in TRAINABLE]
    if unknown:
        raise ValueError(f"trainable groups must be among {TRAINABLE}, got {unknown[0]!r}.")
    chosen = set(GROUPS) if "all" in trainable else set(trainable)
    flat = flatten_dict(params)
    kept = {path for path in flat if group_of(path) in chosen and not _has_no_gradient(path)}
    return unflatten_dict({path: flat[path] for path in flat if path in kept})


def _has_no_gradient(path: Sequence[str]) -> bool:
    # The residual blocks have a norm2, too, which does take part.
    return "res_block" not in "/".join(path) and bool(_NO_GRADIENT.search("/".join(path)))


def count_table(params: Params, trainable: Sequence[str], lora_size: int) -> str:
    """Lines that say for each group how many parameters it has and how many of them are trained."""
    sizes = dict.fromkeys(GROUPS, 0)
    trained = dict(sizes)
    for path, leaf in flatten_dict(params).items():
        sizes[group_of(path)] += math.prod(leaf.shape)
    for path, leaf in flatten_dict(select(params, trainable)).items():
        trained[group_of(path)] += math.prod(leaf.shape)
    rows = [("lora", lora_size, lora_size), *((name, sizes[name], trained[name]) for name in GROUPS)]
    lines = [f"  {'group':<22}{'parameters':>14}{'trained':>14}"]
    lines += [f"  {name:<22}{size / 1e6:>12.3f} M{used / 1e6:>12.3f} M" for name, size, used in rows]
    return "\n".join(lines)
