"""The smallest teacher with random weights, and LoRAs of it that change what it makes."""

import pathlib

import jax
import numpy as np
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict

from osv_jax.convert import exporters, weights
from osv_jax.inference.pipeline import COMPONENTS
from osv_jax.models.lora import init_lora, target_modules
from osv_jax.objectives.random_networks import random_frozen


def save(folder: pathlib.Path, video: dict, loras: tuple[str, ...]) -> None:
    """A folder `weights`, which knows the size of its videos, and PEFT folders."""
    configs = {name: {**tiny.CONFIGS, "unet": tiny.ONE_LEVEL_UNET}[name] for name in COMPONENTS}
    params = random_frozen(configs, np.float32)
    for name in COMPONENTS:
        weights.save_component(folder / "weights" / name, name, configs[name], params[name], folder)
    weights.save_video(folder / "weights", video)
    lora = flatten_dict(init_lora(jax.random.key(0), params["unet"], 2, target_modules(params["unet"], "attention")))
    rng = np.random.default_rng(0)
    for name in loras:
        drawn = {path: 0.3 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in lora.items()}
        exporters.export_lora("peft", unflatten_dict(drawn), folder / name)
