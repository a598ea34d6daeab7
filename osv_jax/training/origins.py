"""What a run starts from instead of its teacher: another run's workdir, or a LoRA trained elsewhere."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from osv_jax.convert import lora_files
from osv_jax.convert.architectures import expected_params
from osv_jax.convert.json_files import read_json
from osv_jax.errors import UserError
from osv_jax.models import groups, lora
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Objective, find
from osv_jax.objectives.players import Player, Student, TrainState, first_state, start
from osv_jax.objectives.text_networks import AnyNetworks
from osv_jax.runtime import checkpoint
from osv_jax.runtime.finite import check_finite
from osv_jax.runtime.paths import Path


def start_from(workdir: Path, state: TrainState, objective: Objective) -> TrainState:
    """`state` with the players of another run's last checkpoint: LoRA, tuned parameters, discriminator.

    The optimizers are fresh, and the EMA starts as a copy of the student (OSV section 4). What the other run did not
    train starts as in a run from the teacher.

    Args:
        workdir: one that `check_origin` accepts.

    Raises:
        UserError: when the checkpoint does not fit, saying what differs, or is not finite.
    """
    step = checkpoint.latest_step(workdir)
    assert step is not None, "`check_origin` has found a checkpoint"
    stored = checkpoint.stored_shapes(workdir, step).get("players", {})
    student = state.players["student"].params
    own, tuned = flatten_dict(student.lora), flatten_dict(student.tuned)
    adapter, inherited = (flatten_dict(stored["student"]["params"].get(part) or {}) for part in ("lora", "tuned"))
    lost = sorted({groups.group_of(path) for path in inherited.keys() - tuned.keys()})
    if adapter and not own:
        lost = ["lora", *lost]
    if lost:
        raise UserError(
            f"The run in {workdir} trained the groups {', '.join(lost)}, whose changes would be lost; add them to"
            " config.trainable."
        )
    like: dict[str, Any] = {"student": {"params": {}}}
    if adapter:
        like["student"]["params"]["lora"] = student.lora
    if inherited:
        like["student"]["params"]["tuned"] = unflatten_dict({path: tuned[path] for path in inherited})
    for name, player in state.players.items():
        if name != "student" and name in stored:
            like[name] = {"params": player.params, "stats": player.stats}
    parts = checkpoint.restore_parts(workdir, step, {"players": like})["players"]
    check_finite(parts, f"The checkpoint of step {step} in {workdir}")
    own |= flatten_dict(parts["student"]["params"].get("lora", {}))
    tuned |= flatten_dict(parts["student"]["params"].get("tuned", {}))
    players = {name: dataclasses.replace(state.players[name], **part) for name, part in parts.items()}
    students = Student(lora=unflatten_dict(own), tuned=unflatten_dict(tuned))
    players["student"] = dataclasses.replace(players["student"], params=students)
    return _begin(state, players, objective)


def _begin(state: TrainState, given: Mapping[str, Player], objective: Objective) -> TrainState:
    """The first state with the parameters and statistics of `given`, laid out as `state`."""

    def begin(players: Mapping[str, Player]) -> TrainState:
        return first_state(
            {
                name: start(player.params, objective.optimizers[name], player.stats, ema=player.ema is not None)
                for name, player in players.items()
            }
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(begin, out_shardings=shardings)(state.players | dict(given))


def read_lora(path: Path, config: ConfigDict, networks: AnyNetworks) -> lora_files.LoraFile:
    """A LoRA trained elsewhere, for `start_from_lora`.

    Args:
        path: a PEFT adapter folder or a LoRA file.

    Raises:
        UserError: a file that does not fit the UNet, or of which this configuration would lose a part.
    """
    if "lora" not in config.get("trainable", ()):
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


def start_from_lora(given: Params, config: ConfigDict, state: TrainState, objective: Objective) -> TrainState:
    """`state`, with a student whose LoRA was trained elsewhere: it can take the place of stage 1 (OSV section 4).

    Modules that it does not cover keep their initial LoRA, which changes nothing; the discriminator is fresh.

    Args:
        given: the LoRA, with its own alpha = rank; see `read_lora`.
    """
    scaled = lora.scale_lora(given, config.lora.rank / config.lora.alpha)
    player = state.players["student"]
    own = flatten_dict(player.params.lora) | flatten_dict(scaled)
    params = dataclasses.replace(player.params, lora=unflatten_dict(own))
    return _begin(state, {"student": dataclasses.replace(player, params=params)}, objective)


def check_origin(workdir: Path, config: ConfigDict) -> None:
    """Checks that a run with this configuration can start from the workdir of another.

    Raises:
        UserError: not a workdir, nothing trained there yet, or values that must agree and do not.
    """
    try:
        before = read_json(workdir / "config.json")
    except UserError as error:
        raise UserError(
            f"config.init_from={workdir} is not the workdir of a run; train that first (stage 2's is stage 1,"
            " configs/stage1.py)."
        ) from error
    if checkpoint.latest_step(workdir) is None:
        raise UserError(f"config.init_from={workdir} has no checkpoint yet; let that run reach its first one.")
    now = json.loads(json.dumps(config.to_dict()))
    if not find(config.objective).may_start_from(before.get("objective", "")):
        raise UserError(
            f"config.init_from={workdir} is a run of {before.get('objective')}, which {config.objective} cannot"
            f" continue; `python -m osv_jax.convert_weights merge {workdir} OUTPUT` makes weights of it to start"
            " from, with config.weights=OUTPUT."
        )
    keys = ["weights", "random_networks"]
    # Of a run without a discriminator there is none to go on with.
    made_for = ("discriminator_blocks", "discriminator_read", "boundary")
    keys = [key for key in made_for if key in before and key in now] + keys
    if any("lora" in trained.get("trainable", ()) for trained in (before, now)):
        keys.append("lora")
    for key in keys:
        if before.get(key) != now.get(key):
            raise UserError(
                f"config.{key} is {now.get(key)}, but the run in {workdir} has {before.get(key)}; they must be the same"
                " to continue from it."
            )
