"""A weights folder in which the UNet is what a run trained, for other runs to start from as their teacher."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from osv_jax import experiment
from osv_jax.convert import weights
from osv_jax.convert.architectures import ARCHITECTURES, Config, expected_params
from osv_jax.convert.exporters import new_folder
from osv_jax.convert.importers import DTYPES
from osv_jax.errors import UserError
from osv_jax.runtime.trained import Trained


def merge_run(
    trained: Trained,
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    base: str | pathlib.Path | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> list[str]:
    """Writes a weights folder: the UNet with LoRA and tuned layers merged, the other networks as they were.

    Args:
        trained: the student; see `runtime.trained.load_trained`.
        source: the workdir it comes from, for messages and for the UNet's config.json.
        base: the weights folder it was trained from; by default the one that the run names. A run that began with
            random networks has none: they are made again.
        dtype: stored dtype of the UNet (and of random networks): "bfloat16", "float32" or "float16".

    Returns:
        The networks that the folder holds. DINOv2 is among them if `base` has it.

    Raises:
        UserError: if `output` exists, unless it may be overwritten, or the base is missing or another one.
    """
    folder = base or trained.config.get("weights")
    if not folder and not trained.config.get("random_networks"):
        raise UserError("The run has no weights folder of its own: give the base's with --weights.")
    with new_folder(output, overwrite) as partial:
        if folder:
            copied = [name for name in ARCHITECTURES if name != "unet" and (pathlib.Path(folder) / name).is_dir()]
            config = weights.load_config(folder, "unet")
            shapes = expected_params("unet", config)
            trained.check_fits(shapes, source)
            params = jax.tree.map(np.asarray, weights.load_params(folder, "unet", dtype=np.float32))
            for name in copied:
                weights.load_config(folder, name)  # Complains about an incomplete one.
                shutil.copytree(pathlib.Path(folder) / name, partial / name)
        else:
            architectures = _random_architectures(trained.config)
            shapes = {name: expected_params(name, made) for name, made in architectures.items()}
            trained.check_fits(shapes["unet"], source)
            trees = {name: unflatten_dict(flat) for name, flat in shapes.items()}
            made = experiment.fill_randomly(trees, DTYPES[trained.config["dtype"]])
            config, params = architectures.pop("unet"), made["unet"]
            copied = list(architectures)
            for name in copied:
                weights.save_component(partial / name, name, architectures[name], made[name], pathlib.Path(source))
        merged = trained.merge_into(jax.tree.map(lambda x: x.astype(np.float32), params))
        merged = jax.tree.map_with_path(
            lambda path, x: weights.cast(np.asarray(x), DTYPES[dtype], "/".join(key.key for key in path)), merged
        )
        weights.save_component(partial / "unet", "unet", config, merged, pathlib.Path(source))
    return ["unet", *copied]


def _random_architectures(config: Mapping[str, Any]) -> dict[str, Config]:
    """Of a run with `random_networks`. DINOv2, which not every run has, is among them if the configuration names it."""
    chosen, architectures = config["random_networks"], {}
    for name, known in ARCHITECTURES.items():
        if name != "dinov2" or name in chosen:
            # The run's config.json has lists where architectures have tuples.
            fields = {key: tuple(x) if isinstance(x, list) else x for key, x in chosen.get(name, {}).items()}
            architectures[name] = known.config(**fields)
    return architectures
