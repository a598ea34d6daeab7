"""Runs to be exported, weights that they do not fit, how ComfyUI takes a LoRA, and the lines of cards."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import micro_stage1
import numpy as np
import tiny_pipeline
from conftest import quick_jit
from flax.traverse_util import flatten_dict, unflatten_dict

from osv_jax.convert.architectures import expected_params
from osv_jax.convert.weights import load_params, save_component
from osv_jax.models import groups
from osv_jax.objectives.players import Player, Student, TrainState
from osv_jax.objectives.random_networks import random_params
from osv_jax.runtime import checkpoint
from osv_jax.training import setup

SHAPES = expected_params("unet", tiny_pipeline.UNET)
SCALE = 3.0


def python_lines(page):
    """The Python lines of a page, by block."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def make_home(home):
    """A folder as the README has it: `svd`, `weights/svd`, and `runs/stage2`, a run's last checkpoint.

    LoRA is on every kind of module, alpha is not the rank, and every leaf of the student and of its EMA is random:
    what a run has trained has no zeros either.
    """
    tiny_pipeline.save_pipeline(home / "svd")
    tiny_pipeline.save_dinov2(home / "svd" / "dinov2")
    tiny_pipeline.import_all(home / "svd", home / "weights" / "svd")
    config = micro_stage1.get_config()
    config.weights, config.random_networks = str(home / "weights" / "svd"), {}
    config.lora.targets, config.lora.rank, config.lora.alpha = "all", 2, 2 * SCALE
    init = setup.make_init(setup.objective_of(config, setup.networks_of(config)))
    rng = np.random.default_rng(0)

    def drawn(leaf):
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32))

    state = quick_jit(init)(jax.random.key(0), {"unet": load_params(config.weights, "unet")})
    student = state.players["student"]
    student = student.replace(params=jax.tree.map(drawn, student.params), ema=jax.tree.map(drawn, student.ema))
    state = state.replace(players=state.players | {"student": student})
    checkpoint.write_config(home / "runs" / "stage2", config.to_dict())
    with checkpoint.open_checkpoints(home / "runs" / "stage2", 1) as checkpoints:
        checkpoint.save(checkpoints, 3, state, {})
    return home


def make_tuned_run(home, state):
    """The same run, as if it had trained the temporal transformers of one block as well."""
    trainable = flatten_dict(groups.select(unflatten_dict(SHAPES), ["temporal_transformer"]))
    shapes = {path: leaf.shape for path, leaf in trainable.items() if "mid_block" in path}
    rng = np.random.default_rng(3)
    tuned = {path: 0.1 * rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    student = Student(lora=state["params"]["lora"], tuned=unflatten_dict(tuned))
    workdir = home / "runs" / "tuned"
    checkpoint.write_config(workdir, json.loads((home / "runs" / "stage2" / "config.json").read_text()))
    with checkpoint.open_checkpoints(workdir, 1) as checkpoints:
        players = {"student": Player(student, {}, (), student)}
        checkpoint.save(checkpoints, 5, TrainState(np.int32(5), players), {})
    return workdir, student


def comfyui_patched(state_dict, lora):
    """A UNet's tensors with a LoRA added as ComfyUI does it: by the names of the tensors that a checkpoint has."""
    patched = dict(state_dict)
    modules = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in state_dict}
    for name in [name for name in lora if name.endswith(".lora_up.weight")]:
        module = name.removesuffix(".lora_up.weight")
        up, down, alpha = (lora[f"{module}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        target = modules[module]
        product = up.reshape(len(up), -1) @ down.reshape(len(down), -1) * (alpha / len(down))
        patched[target] = patched[target] + product.reshape(patched[target].shape)
    return patched


def save_other_weights(folder):
    """A UNet with another width."""
    config = dataclasses.replace(tiny_pipeline.UNET, block_out_channels=(32, 64))
    params = random_params(unflatten_dict(expected_params("unet", config)), 0, np.float32)
    save_component(folder / "unet", "unet", config, params, folder)
