"""Configurations, checked before anything is loaded.

A configuration's keys are the fields of `RunOptions` and of its objective's `Options`; files in `configs/` start from
`default_config` and say what differs.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import runpy
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from osv_jax.errors import UserError
from osv_jax.models import groups
from osv_jax.objectives import objective
from osv_jax.objectives.options import RunOptions, from_config, to_config
from osv_jax.objectives.random_networks import random_components
from osv_jax.runtime import arguments
from osv_jax.runtime.ranges import COUNT, PIXELS, POSITIVE, WHOLE

# Fields of networks that are not sizes.
_ARCHITECTURE_RANGES = {
    "layer_norm_eps": POSITIVE,
    "norm_eps": POSITIVE,
    "mlp_ratio": POSITIVE,
    "scaling_factor": POSITIVE,
    "num_register_tokens": WHOLE,
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps `start` (done before) to `end` of a run, on clips of one size in pixels."""

    start: int
    end: int
    height: int
    width: int


def default_config(name: str) -> ConfigDict:
    """Every key of a run with the objective `name`, with its default.

    Raises:
        UserError: if there is no such objective.
    """
    return ConfigDict(to_config(RunOptions) | to_config(objective.find(name).Options) | {"objective": name})


def read_config(name: str) -> ConfigDict:
    """A training configuration, `FILE` or `FILE:VARIANT`.

    Raises:
        UserError: if the file does not exist, or has no such variant.
    """
    file, _, variant = name.partition(":")
    get_config = runpy.run_path(os.fspath(arguments.config_file(file)))["get_config"]
    try:
        return get_config(variant) if variant else get_config()
    except ValueError as error:
        raise UserError(str(error)) from error


def check_config(config: ConfigDict) -> None:
    """Finds what is wrong with a configuration, as far as it alone can tell.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    if "resolutions" in config.get("data", {}):
        check_resolutions(config.data.resolutions)
    run = from_config(RunOptions, config)
    chosen = objective.find(run.objective)
    options = from_config(chosen.Options, config)
    known = {field.name for cls in (RunOptions, chosen.Options) for field in dataclasses.fields(cls)}
    if unknown := sorted(set(config) - known):
        raise UserError(f"config.{unknown[0]} is no key of {run.objective}; its keys are {', '.join(sorted(known))}.")
    check_architectures(config.random_networks.to_dict(), "config.random_networks.")
    chosen.check(options, run.data.num_frames)
    if "trainable" in known and not config.trainable:
        raise UserError(f"config.trainable is empty; name some of {', '.join(groups.TRAINABLE)}.")
    if not run.weights and not run.random_networks:
        raise UserError("Set config.weights (a folder of converted weights), config.random_networks, or both.")
    if run.preview_decoder == "tiny" and not run.weights:
        raise UserError("config.preview_decoder='tiny' is in a weights folder: set config.weights, or choose 'vae'.")
    if run.weights and random_components(config) >= set(chosen.components):
        raise UserError(
            f"config.random_networks names all networks, so nothing of config.weights={run.weights} would be used;"
            " set one of them."
        )


def check_architectures(architectures: Mapping[str, Any], where: str) -> None:
    """Checks the numbers among fields of networks: sizes, but for a few.

    Args:
        architectures: fields by name, nested or not.
        where: what stands before a key in a message.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    for key, value in flatten_dict(dict(architectures), sep=".").items():
        allowed = _ARCHITECTURE_RANGES.get(key.rpartition(".")[2], COUNT)
        elements = value if isinstance(value, (tuple, list)) else [value]
        sizes = [x for x in elements if isinstance(x, (int, float)) and not isinstance(x, bool)]
        if any(size not in allowed for size in sizes):
            raise UserError(f"{where}{key}={value!r} must be {allowed}.")


def phases_of(config: ConfigDict) -> list[Phase]:
    """The run's phases, from `config.data.resolutions`.

    Raises:
        UserError: as `check_resolutions`.
    """
    entries = check_resolutions(config.data.resolutions)
    ends = [*(start for start, _, _ in entries[1:]), config.num_steps]
    phases = [Phase(start, min(end, config.num_steps), h, w) for (start, h, w), end in zip(entries, ends, strict=True)]
    return [phase for phase in phases if phase.start < phase.end]


def check_resolutions(resolutions: Any) -> list[tuple[int, int, int]]:
    """The (from step, height, width) triples of `config.data.resolutions`.

    Raises:
        UserError: on a malformed entry, steps out of order, or a size that the VAE cannot take.
    """
    where = f"config.data.resolutions={resolutions!r}"
    try:
        entries = [(start, height, width) for start, height, width in resolutions]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} must be (from step, height, width) triples, e.g. ((0, 320, 576),).") from error
    for start, height, width in entries:
        if start not in WHOLE or height not in PIXELS or width not in PIXELS:
            raise UserError(f"{where}: a step must be {WHOLE}, heights and widths {PIXELS}.")
    starts = [start for start, _, _ in entries]
    if not entries or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
        raise UserError(f"{where} must begin with step 0 and rise from entry to entry.")
    for _, height, width in entries:
        if height % 8 or width % 8:
            raise UserError(f"{where}: {height} x {width} is not divisible by 8, and the VAE needs that.")
    return entries
