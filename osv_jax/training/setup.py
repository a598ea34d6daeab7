"""From a configuration to what a run needs: checked values, networks, parameters, the first state, the step."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import runpy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from osv_jax.convert import lora_files, weights
from osv_jax.convert.architectures import ARCHITECTURES, Config, expected_params
from osv_jax.diffusion.edm import BOUNDARIES
from osv_jax.errors import UserError
from osv_jax.models import groups, lora
from osv_jax.models.layers import ATTENTION_IMPLEMENTATIONS
from osv_jax.models.svd_unet import REMAT_POLICIES
from osv_jax.objectives import adversarial, finetune, osv_stage1, osv_stage2
from osv_jax.objectives.latents import batch_of_records
from osv_jax.objectives.networks import Networks, Params, build_networks, random_params
from osv_jax.objectives.pixels import encode_batch
from osv_jax.objectives.players import Student, TrainState, init_state, make_optimizer, start_state
from osv_jax.runtime import arguments, checkpoint, mesh
from osv_jax.runtime.finite import check_finite
from osv_jax.runtime.paths import Path
from osv_jax.runtime.ranges import PIXELS, WHOLE
from osv_jax.training import keys

OBJECTIVES = ("stage1", "stage2", "finetune")
# The student's, and the discriminator's where there is one.
Optimizers = tuple[optax.GradientTransformation, optax.GradientTransformation | None]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps `start` (done before) to `end` of a run, on clips of one size in pixels."""

    start: int
    end: int
    height: int
    width: int


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
    """What can be known to be wrong from the configuration alone.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    keys.check_keys(config.to_dict())
    flat = flatten_dict(config.to_dict(), sep=".")
    choices = {
        "objective": OBJECTIVES,
        "lora.targets": tuple(lora.TARGETS),
        "attention": ATTENTION_IMPLEMENTATIONS,
        "remat": REMAT_POLICIES,
        "boundary": BOUNDARIES,
        "discriminator_input": ("latents", "decoded"),
        "guidance.kind": osv_stage2.GUIDANCE_KINDS,
    }
    for name, allowed in choices.items():
        if name in flat and flat[name] not in allowed:
            raise UserError(f"config.{name}={flat[name]!r} is not one of {', '.join(allowed)}.")
    for name in config.trainable:
        if name not in groups.TRAINABLE:
            raise UserError(f"config.trainable has {name!r}, which is not one of {', '.join(groups.TRAINABLE)}.")
    if not config.trainable:
        raise UserError(f"config.trainable is empty; name some of {', '.join(groups.TRAINABLE)}.")
    if "solver_steps" in config and not 1 <= config.solver_steps < config.num_levels:
        raise UserError(f"config.solver_steps={config.solver_steps} must lie in 1 .. {config.num_levels - 1}.")
    if flat.get("discriminator_frames", 0) > config.data.num_frames:
        raise UserError(
            f"config.discriminator_frames={config.discriminator_frames} must lie in 1 .. {config.data.num_frames}"
            " (config.data.num_frames), or be 0 for all frames."
        )
    blocks = flat.get("discriminator_blocks")
    if blocks is not None and (not blocks or len(set(blocks)) < len(blocks)):
        raise UserError(f"config.discriminator_blocks={blocks} must name one block of DINOv2 or more, each once.")
    dropout = config.dropout.to_dict() if "dropout" in config else {}
    if sum(dropout.values()) > 1:
        raise UserError(f"config.dropout={dropout} must be probabilities with a sum of at most 1.")
    if not config.weights and not config.random_networks:
        raise UserError("Set config.weights (a folder of converted weights), config.random_networks, or both.")
    if config.weights and random_components(config) >= set(_components(config)):
        raise UserError(
            f"config.random_networks names all networks, so nothing of config.weights={config.weights} would be used;"
            " set one of them."
        )
    phases_of(config)


def phases_of(config: ConfigDict) -> list[Phase]:
    """The run's phases, from `config.data.resolutions`.

    Raises:
        UserError: on a malformed entry, steps out of order, or a size that the VAE cannot take.
    """
    where = f"config.data.resolutions={tuple(config.data.resolutions)}"
    try:
        entries = [(start, height, width) for start, height, width in config.data.resolutions]
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
    ends = [*starts[1:], config.num_steps]
    phases = [Phase(start, min(end, config.num_steps), h, w) for (start, h, w), end in zip(entries, ends, strict=True)]
    return [phase for phase in phases if phase.start < phase.end]


def check_layout(config: ConfigDict, networks: Networks, devices: jax.sharding.Mesh) -> None:
    """Whether batches and clips can be split over the devices.

    Raises:
        UserError: naming the key that must change.
    """
    parts, context = devices.shape["data"] * devices.shape["fsdp"], devices.shape["context"]
    if config.batch_size % (parts * config.grad_accum):
        raise UserError(
            f"config.batch_size={config.batch_size} does not split over {parts} devices x {config.grad_accum} parts"
            " (config.grad_accum); use a multiple of their product."
        )
    for phase in phases_of(config):
        rows = phase.height // networks.vae.config.downscale
        if rows % context:
            raise UserError(
                f"config.mesh.context={context} does not divide the {rows} rows of latents that clips of height"
                f" {phase.height} have; choose a divisor of {rows}."
            )


def networks_of(config: ConfigDict) -> Networks:
    """The modules, for the architectures beside the weights or those in the configuration.

    Raises:
        UserError: on missing weights, or a discriminator block that DINOv2 does not have.
    """
    architectures = architectures_of(config)
    blocks = ()
    if "dinov2" in architectures:
        blocks, depth = tuple(config.discriminator_blocks), architectures["dinov2"].num_hidden_layers
        if not all(0 <= block < depth for block in blocks):
            raise UserError(
                f"config.discriminator_blocks={blocks} must lie in 0 .. {depth - 1}, the blocks of this DINOv2."
            )
    return build_networks(
        architectures,
        discriminator_blocks=blocks,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        attention=config.attention,
        remat=config.remat,
    )


def architectures_of(config: ConfigDict) -> dict[str, Config]:
    """Those beside the weights, or in the configuration; DINOv2's only where there is a discriminator.

    Raises:
        UserError: on missing weights.
    """
    drawn = random_components(config)
    return {
        name: random_architecture(config.random_networks.to_dict(), name)
        if name in drawn
        else weights.load_config(config.weights, name)
        for name in _components(config)
    }


def random_components(config: ConfigDict | Mapping[str, Any]) -> set[str]:
    """The networks with random parameters: those that `random_networks` names, or all where there are no weights."""
    return set(config["random_networks"] if config["weights"] else ARCHITECTURES)


def random_architecture(random_networks: Mapping[str, Any], name: str) -> Config:
    """A network's architecture in a configuration, or in the JSON of one, which has lists where we have tuples."""
    fields = random_networks.get(name, {}).items()
    return ARCHITECTURES[name].config(**{key: tuple(x) if isinstance(x, list) else x for key, x in fields})


def _components(config: ConfigDict) -> list[str]:
    return [name for name in ARCHITECTURES if not (config.objective == "finetune" and name == "dinov2")]


def random_frozen(architectures: Mapping[str, Config], dtype: Any) -> dict[str, Params]:
    """Parameters of the embedded networks, as NumPy arrays; the same for every seed of a run, and for preparing."""
    return fill_randomly(_shapes_of(architectures), dtype)


def fill_randomly(shapes: Mapping[str, Params], dtype: Any) -> dict[str, Params]:
    """Each network is drawn by itself, or else which there are would decide what the others are."""
    return {name: random_params(tree, 0, dtype) for name, tree in shapes.items()}


def _shapes_of(architectures: Mapping[str, Config]) -> dict[str, Params]:
    return {name: unflatten_dict(expected_params(name, made)) for name, made in architectures.items()}


def frozen_shapes(config: ConfigDict, networks: Networks) -> dict[str, Params]:
    """Shapes of the frozen parameters that a step takes; CLIP's only where clips are to be encoded."""
    needed = [name for name in ARCHITECTURES if not (config.data.dataset and name == "image_encoder")]
    modules = {name: getattr(networks, name) for name in needed}
    return _shapes_of({name: module.config for name, module in modules.items() if module is not None})


def load_frozen(config: ConfigDict, networks: Networks, devices: jax.sharding.Mesh) -> dict[str, Params]:
    """The frozen parameters of `frozen_shapes`, each read onto the devices that hold it."""
    shapes = frozen_shapes(config, networks)
    shardings = mesh.parameter_shardings(devices, shapes)
    dtype, random = jnp.dtype(config.dtype), random_components(config)
    drawn = {name: tree for name, tree in shapes.items() if name in random}
    drawn = jax.device_put(fill_randomly(drawn, dtype), {name: shardings[name] for name in drawn})
    # In the order of the shapes.
    return {
        name: drawn[name] if name in drawn else weights.load_params(config.weights, name, shardings[name], dtype)
        for name in shapes
    }


def optimizers_of(config: ConfigDict) -> Optimizers:
    """Adam for the student and for the discriminator, where there is one."""
    chosen = config.optimizer
    shared = (chosen.b1, chosen.b2, chosen.max_grad_norm or None)
    student = make_optimizer(chosen.learning_rate, *shared)
    return student, None if config.objective == "finetune" else make_optimizer(chosen.disc_learning_rate, *shared)


def make_init(config: ConfigDict, networks: Networks, optimizers: Optimizers) -> Callable[..., TrainState]:
    """`(key, UNet parameters) -> state` before the first step, of a student equal to the teacher."""

    def init(key: jax.Array, unet_params: Params) -> TrainState:
        return init_state(
            key,
            networks,
            unet_params,
            *optimizers,
            config.lora.rank,
            config.lora.targets,
            tuple(config.trainable),
        )

    return init


def start_from(workdir: Path, state: TrainState, optimizers: Optimizers) -> TrainState:
    """`state`, with the student's LoRA, its tuned parameters and the discriminator of another run's last checkpoint.

    The optimizers start afresh, and so does the average, from the student (OSV section 4). What the other run did not
    train starts as in a run from the teacher.

    Args:
        workdir: one that `check_origin` accepts.

    Raises:
        UserError: when the checkpoint does not fit, saying what differs, or is not finite.
    """
    step = checkpoint.latest_step(workdir)
    stored = checkpoint.stored_shapes(workdir, step)["student"]
    own, tuned = flatten_dict(state.student.lora), flatten_dict(state.student.tuned)
    adapter, inherited = (flatten_dict(stored.get(part) or {}) for part in ("lora", "tuned"))
    lost = sorted({groups.group_of(path) for path in inherited.keys() - tuned.keys()})
    if adapter and not own:
        lost = ["lora", *lost]
    if lost:
        raise UserError(
            f"The run in {workdir} trained the groups {', '.join(lost)}, whose changes would be lost; add them to"
            " config.trainable."
        )
    like: dict[str, Any] = {"student": {}}
    if adapter:
        like["student"]["lora"] = state.student.lora
    if inherited:
        like["student"]["tuned"] = unflatten_dict({path: tuned[path] for path in inherited})
    if state.disc:
        like["disc"] = state.disc
    parts = checkpoint.restore_parts(workdir, step, like)
    check_finite(parts, f"The checkpoint of step {step} in {workdir}")
    own |= flatten_dict(parts["student"].get("lora", {}))
    tuned |= flatten_dict(parts["student"].get("tuned", {}))
    student = state.student.replace(lora=unflatten_dict(own), tuned=unflatten_dict(tuned))
    return _begin(state, student, parts.get("disc", {}), optimizers)


def _begin(state: TrainState, student: Student, disc: dict[str, Params], optimizers: Optimizers) -> TrainState:
    """The first state of `student` and `disc`, laid out as `state`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    begin = jax.jit(lambda student, disc: start_state(student, disc, *optimizers), out_shardings=shardings)
    return begin(student, disc)


def read_lora(path: Path, config: ConfigDict, networks: Networks) -> lora_files.LoraFile:
    """A LoRA trained elsewhere, for `start_from_lora`.

    Args:
        path: a PEFT adapter folder or a LoRA file.

    Raises:
        UserError: a file that does not fit the UNet, or of which this configuration would lose a part.
    """
    if "lora" not in config.trainable:
        raise UserError(f"config.init_from={path} is a LoRA, so config.trainable must name lora.")
    shapes = expected_params("unet", networks.unet.config)
    read = lora_files.read_lora(path, shapes)
    ranks = lora_files.ranks(read.lora)
    wrong = sorted(set(ranks.values()) - {config.lora.rank})
    if wrong:
        raise UserError(
            f"{path} has LoRA of rank {', '.join(map(str, wrong))}, but config.lora.rank={config.lora.rank}: they must"
            " be the same, for all modules."
        )
    own = lora.target_modules(unflatten_dict(shapes), config.lora.targets)
    lost = ["/".join(module) for module in ranks if module not in own]
    if lost:
        raise UserError(
            f"{path} covers {len(lost)} modules that config.lora.targets={config.lora.targets!r} does not:"
            f" {', '.join(lost[:10])}; their changes would be lost, so choose other targets or another LoRA."
        )
    return read


def start_from_lora(given: Params, config: ConfigDict, state: TrainState, optimizers: Optimizers) -> TrainState:
    """`state`, with a student whose LoRA was trained elsewhere: what can replace stage 1 (OSV section 4).

    Modules that it does not cover keep their initial LoRA, which changes nothing; the discriminator is fresh.

    Args:
        given: the LoRA, with its own alpha = rank; see `read_lora`.
    """
    scaled = lora.scale_lora(given, config.lora.rank / config.lora.alpha)
    own = flatten_dict(state.student.lora) | flatten_dict(scaled)
    return _begin(state, state.student.replace(lora=unflatten_dict(own)), state.disc, optimizers)


def check_origin(workdir: Path, config: ConfigDict) -> None:
    """Whether the run in `workdir` can be continued from with this configuration.

    Raises:
        UserError: not a workdir, nothing trained there yet, or values that must agree and do not.
    """
    try:
        before = json.loads((workdir / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"config.init_from={workdir} is not the workdir of a run; train that first (stage 2's is stage 1,"
            " configs/stage1.py)."
        ) from error
    if checkpoint.latest_step(workdir) is None:
        raise UserError(f"config.init_from={workdir} has no checkpoint yet; let that run reach its first one.")
    now = json.loads(json.dumps(config.to_dict()))
    if (before.get("objective") == "finetune") != (config.objective == "finetune"):
        raise UserError(
            f"config.init_from={workdir} is a run of {before.get('objective')}, which {config.objective} cannot"
            f" continue; `python tools/convert_weights.py merge {workdir} OUTPUT` makes weights of it to start"
            " from, with config.weights=OUTPUT."
        )
    keys = ["discriminator_blocks", "weights", "random_networks"]
    if any("lora" in trained.get("trainable", ()) for trained in (before, now)):
        keys.append("lora")
    for key in keys:
        if before.get(key) != now.get(key):
            raise UserError(
                f"config.{key} is {now.get(key)}, but the run in {workdir} has {before.get(key)}; they must be the same"
                " to continue from it."
            )


def to_batch(
    config: ConfigDict, networks: Networks, frozen: Params, clips: Mapping[str, jax.Array], key: jax.Array
) -> adversarial.Batch:
    """What an objective takes, of what `clips.open_clips` gives: videos are encoded, latents need not be."""
    motion = config.data.motion_bucket_id
    if config.data.dataset:
        return batch_of_records(clips, key, motion)
    return encode_batch(networks, frozen, clips["video"], clips["fps"], key, motion)


def make_train_step(config: ConfigDict, networks: Networks, optimizers: Optimizers) -> Callable:
    """`(state, frozen, clips) -> (state, metrics)`: `to_batch` and the objective, ready for `jit`."""
    objective = _make_objective(config, networks, optimizers)

    def train_step(
        state: TrainState, frozen: Params, clips: Mapping[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # All randomness is a function of the seed and the step: a resumed run repeats it.
        encode_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        batch = to_batch(config, networks, frozen, clips, encode_key)
        return objective(state, frozen, batch, step_key)

    return train_step


def _make_objective(config: ConfigDict, networks: Networks, optimizers: Optimizers) -> adversarial.Step:
    lora_scale = config.lora.alpha / config.lora.rank
    if config.objective == "finetune":
        chosen = finetune.FinetuneOptions(
            sigma_log_mean=config.sigma.log_mean,
            sigma_log_std=config.sigma.log_std,
            min_snr_gamma=config.min_snr_gamma,
            drop_embedding=config.dropout.embedding,
            drop_latents=config.dropout.latents,
            drop_both=config.dropout.both,
            ema_decay=config.ema_decay,
            lora_scale=lora_scale,
            grad_accum=config.grad_accum,
        )
        return finetune.make_step(networks, optimizers[0], chosen)
    options = adversarial.AdversarialOptions(
        adversarial_weight=config.adversarial_weight,
        huber_c=config.huber_c,
        ema_decay=config.ema_decay,
        lora_scale=lora_scale,
        boundary=config.boundary,
        grad_accum=config.grad_accum,
        decode=config.discriminator_input == "decoded",
        disc_frames=config.discriminator_frames,
    )
    if config.objective == "stage1":
        return osv_stage1.make_step(networks, *optimizers, options, config.num_levels)
    own = osv_stage2.Stage2Options(
        num_levels=config.num_levels,
        solver_steps=config.solver_steps,
        guidance_kind=config.guidance.kind,
        guidance_min=config.guidance.min,
        guidance_max=config.guidance.max,
        weight_exponent=config.weight_exponent,
    )
    return osv_stage2.make_step(networks, *optimizers, options, own)


def describe(config: ConfigDict, state: TrainState, frozen: Mapping[str, Any], num_clips: int) -> str:
    """What is about to run, in a few lines."""

    def size(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    frozen_sizes = ", ".join(f"{name} {size(params) / 1e6:.2f} M" for name, params in frozen.items())
    disc = f", discriminator {size(state.disc) / 1e6:.2f} M" if state.disc else ""
    sizes = ", ".join(f"{p.height} x {p.width} to step {p.end}" for p in phases_of(config))
    data = config.data
    return (
        f"{config.objective} on {jax.device_count()} {jax.devices()[0].platform} device(s)\n"
        f"  data      {num_clips} clips of {data.num_frames} frames at {data.fps:g} fps; {sizes}\n"
        f"  frozen    {frozen_sizes}, {config.dtype}\n"
        f"  training  student {size(state.student) / 1e6:.2f} M{disc}\n"
        f"{groups.count_table(frozen['unet'], config.trainable, size(state.student.lora))}\n"
        f"  steps     {int(state.step)} of {config.num_steps} done, batch {config.batch_size}"
    )
