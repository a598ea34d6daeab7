"""From a configuration to what a run needs: networks, parameters, the objective, the first state, the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from osv_jax.codec import check_tiny_decoder, parameter_dtype
from osv_jax.convert import weights
from osv_jax.convert.architectures import ENCODERS
from osv_jax.errors import UserError
from osv_jax.models.dinov2 import EMBEDDING
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Metrics, Objective, find
from osv_jax.objectives.options import from_config
from osv_jax.objectives.players import TrainState, first_state
from osv_jax.objectives.random_networks import fill_randomly, random_architecture, random_components, shapes_of
from osv_jax.objectives.text_networks import AnyNetworks
from osv_jax.runtime import mesh
from osv_jax.training.config import phases_of


def with_num_frames(config: ConfigDict) -> ConfigDict:
    """The configuration with `data.num_frames` filled in: where it is 0, the number that the UNet was trained on.

    Raises:
        UserError: on missing weights, or options that do not fit so many frames.
    """
    if config.data.num_frames:
        return config
    config = config.copy_and_resolve_references()
    config.data.num_frames = _architecture_of(config, "unet").num_frames
    chosen = find(config.objective)
    chosen.check(from_config(chosen.Options, config), config.data.num_frames)
    return config


def check_layout(config: ConfigDict, networks: AnyNetworks, devices: jax.sharding.Mesh) -> None:
    """Checks that batches and clips can be split over the devices.

    Raises:
        UserError: naming the key that must change.
    """
    parts, context = devices.shape["data"] * devices.shape["fsdp"], devices.shape["context"]
    accumulated = config.get("grad_accum", 1)
    if config.batch_size % (parts * accumulated):
        raise UserError(
            f"config.batch_size={config.batch_size} does not split over {parts} devices x {accumulated} parts"
            " (config.grad_accum); use a multiple of their product."
        )
    for phase in phases_of(config):
        rows = phase.height // networks.vae.config.downscale
        if rows % context:
            raise UserError(
                f"config.mesh.context={context} does not divide the {rows} rows of latents that clips of height"
                f" {phase.height} have; choose a divisor of {rows}."
            )


def networks_of(config: ConfigDict) -> AnyNetworks:
    """The modules, with the architectures of the weights or of the configuration.

    Raises:
        UserError: on missing weights, a discriminator block that DINOv2 does not have, or another VAE's tiny decoder.
    """
    architectures, chosen = architectures_of(config), find(config.objective)
    options: dict[str, Any] = {}
    if "dinov2" in architectures:
        blocks, depth = tuple(config.discriminator_blocks), architectures["dinov2"].num_hidden_layers
        if not all(EMBEDDING <= block < depth for block in blocks):
            raise UserError(
                f"config.discriminator_blocks={blocks} must lie in 0 .. {depth - 1}, the blocks of this DINOv2, or be"
                f" {EMBEDDING}, its embedding."
            )
        options["discriminator_blocks"] = blocks
    if config.preview_decoder == "tiny":
        architectures["tiny_decoder"] = weights.load_config(config.weights, "tiny_decoder")
        check_tiny_decoder(architectures["tiny_decoder"], architectures[chosen.vae])
    return chosen.make_networks(
        architectures,
        **options,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        attention=config.attention,
        remat=config.remat,
    )


def architectures_of(config: ConfigDict) -> dict[str, Any]:
    """The architectures of the networks that the objective needs: of the weights, or in the configuration.

    Raises:
        UserError: on missing weights.
    """
    return {name: _architecture_of(config, name) for name in find(config.objective).components}


def _architecture_of(config: ConfigDict, name: str) -> Any:
    if name in random_components(config):
        return random_architecture(config.random_networks.to_dict(), name)
    return weights.load_config(config.weights, name)


def frozen_shapes(config: ConfigDict, networks: AnyNetworks) -> dict[str, Params]:
    """Shapes and dtypes of the frozen parameters that a step takes; CLIP's only where clips are to be encoded."""
    left_out = ENCODERS if config.data.dataset else ()
    shapes = shapes_of({name: made for name, made in networks.architectures.items() if name not in left_out})

    def held(name: str) -> Params:
        dtype = parameter_dtype(name, config.dtype)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes[name])

    return {name: held(name) for name in shapes}


def load_frozen(config: ConfigDict, networks: AnyNetworks, devices: jax.sharding.Mesh) -> dict[str, Params]:
    """The frozen parameters of `frozen_shapes`, each read onto the devices that hold it."""
    shapes = frozen_shapes(config, networks)
    shardings = mesh.parameter_shardings(devices, shapes)
    random = random_components(config)
    drawn = {name: tree for name, tree in shapes.items() if name in random}
    drawn = jax.device_put(fill_randomly(drawn, config.dtype), {name: shardings[name] for name in drawn})

    def load(name: str) -> Params:
        return weights.load_params(config.weights, name, shardings[name], parameter_dtype(name, config.dtype))

    # In the order of the shapes.
    return {name: drawn[name] if name in drawn else load(name) for name in shapes}


def objective_of(config: ConfigDict, networks: AnyNetworks) -> Objective:
    """The objective of a configuration, with its options and networks.

    Raises:
        UserError: as `check_config`.
    """
    cls = find(config.objective)
    return cls(networks, from_config(cls.Options, config))


def make_init(objective: Objective) -> Callable[[jax.Array, Params], TrainState]:
    """`(key, frozen parameters) -> state` before the first step, ready for `jit`."""

    def init(key: jax.Array, frozen: Params) -> TrainState:
        return first_state(objective.init(key, frozen))

    return init


def make_train_step(config: ConfigDict, objective: Objective) -> Callable:
    """`(state, frozen, clips) -> (state, metrics)`: the objective's batch and its step, ready for `jit`."""

    def train_step(state: TrainState, frozen: Params, clips: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        # All randomness is a function of the seed and the step: a resumed run repeats it.
        batch_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        batch = objective.batch(frozen, clips, batch_key, config.data)
        return objective.step(state, frozen, batch, step_key)

    return train_step


def describe(
    config: ConfigDict, objective: Objective, state: TrainState, frozen: Mapping[str, Any], num_clips: int
) -> str:
    """A few lines about the run that is about to start."""

    def size(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    frozen_sizes = ", ".join(f"{name} {size(params) / 1e6:.2f} M" for name, params in frozen.items())
    learning = ", ".join(f"{name} {size(player.params) / 1e6:.2f} M" for name, player in state.players.items())
    warnings = "".join(f"\n  warning   {sentence}" for sentence in objective.warnings())
    sizes = ", ".join(f"{p.height} x {p.width} to step {p.end}" for p in phases_of(config))
    data = config.data
    return (
        f"{config.objective} on {jax.device_count()} {jax.devices()[0].platform} device(s)\n"
        f"  data      {num_clips} clips of {data.num_frames} frames at {data.fps:g} fps; {sizes}\n"
        f"  frozen    {frozen_sizes}, {config.dtype}\n"
        f"  training  {learning}\n"
        f"{objective.parameter_table(frozen, state.players['student'].params)}\n"
        f"  steps     {int(state.step)} of {config.num_steps} done, batch {config.batch_size}{warnings}"
    )
