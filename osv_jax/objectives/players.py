"""What learns, and nothing else: the frozen networks are a separate argument of every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from osv_jax.models import groups, lora
from osv_jax.objectives.options import OptimizerOptions

Params = Mapping[str, Any]


@struct.dataclass
class Player:
    """One network, or a part of one, that learns.

    Attributes:
        params: what its optimizer updates, float32.
        stats: state of its own that no gradient reaches (the spectral vectors of a discriminator), or `{}`.
        opt_state: of its optimizer.
        ema: exponential moving average of `params`, float32 (in half precision small updates are lost), or None.
    """

    params: Any
    stats: Any
    opt_state: optax.OptState
    ema: Any = None

    def update(self, gradient: Any, optimizer: optax.GradientTransformation, ema_decay: float | None = None) -> Player:
        """One step of the optimizer, and of the EMA where there is one."""
        updates, opt_state = optimizer.update(gradient, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema = self.ema
        if ema is not None:
            assert ema_decay is not None, "a player with an EMA needs its decay"
            ema = update_ema(ema, params, ema_decay)
        return dataclasses.replace(self, params=params, opt_state=opt_state, ema=ema)


def start(params: Any, optimizer: optax.GradientTransformation, stats: Any = None, ema: bool = False) -> Player:
    """A player before its first step."""
    # A copy: the step donates its state, and one buffer cannot be donated twice.
    copy = jax.tree.map(jnp.copy, params) if ema else None
    return Player(params=params, stats={} if stats is None else stats, opt_state=optimizer.init(params), ema=copy)


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds of a run.

    Attributes:
        step: optimizer steps done.
        players: by name; of most objectives `student`, and `disc` where there is a discriminator.
    """

    step: Int[Array, ""]
    players: dict[str, Player]


def first_state(players: dict[str, Player]) -> TrainState:
    """The state before the first step."""
    return TrainState(step=jnp.zeros((), jnp.int32), players=players)


@struct.dataclass
class Student:
    """The trainable parameters of a student of the UNet, float32.

    Attributes:
        lora: the LoRA tree; see `models.lora`. Empty when it does not train.
        tuned: base parameters that are trained directly: a part of the UNet's tree, empty when only LoRA trains.
    """

    lora: Params
    tuned: Params

    def variables(self, base: Params, lora_scale: float = 1.0) -> dict[str, Params]:
        """The UNet's variables: base parameters, the tuned ones in their place, LoRA on top."""
        params = unflatten_dict({**flatten_dict(base), **flatten_dict(self.tuned)}) if self.tuned else base
        return {"params": params, "lora": lora.scale_lora(self.lora, lora_scale)}


def init_student(
    key: jax.Array, unet_params: Params, rank: int, targets: str, trainable: Sequence[str] = ("lora",)
) -> Student:
    """A student equal to its teacher.

    Args:
        unet_params: the base parameters: their shapes, and the initial values of the tuned groups.
        rank, targets: of its LoRA; see `models.lora`.
        trainable: names of `models.groups.TRAINABLE`; without `lora` there is none.
    """
    adapter = {}
    if "lora" in trainable:
        adapter = lora.init_lora(key, unet_params, rank, lora.target_modules(unet_params, targets))
    tuned = jax.tree.map(lambda x: x.astype(jnp.float32), groups.select(unet_params, trainable))
    return Student(lora=adapter, tuned=tuned)


def student_groups(student: Student) -> Student:
    """The student's tree with each parameter's group (of `models.groups.TRAINABLE`) in its place."""
    tuned = {path: groups.group_of(path) for path in flatten_dict(student.tuned)}
    return Student(lora=jax.tree.map(lambda _: "lora", student.lora), tuned=unflatten_dict(tuned))


def make_optimizer(options: OptimizerOptions, learning_rate: float | None = None) -> optax.GradientTransformation:
    """Adam, after clipping by the global norm where `max_grad_norm` is set.

    Args:
        options: with `group_learning_rates`, of a `Student`, whose groups then have rates of their own.
        learning_rate: instead of the options', for a player without groups.
    """
    if learning_rate is None and options.group_learning_rates:
        rates = dict.fromkeys(("lora", *groups.GROUPS), options.learning_rate) | dict(options.group_learning_rates)
        by_group = {name: optax.adam(rate, b1=options.b1, b2=options.b2) for name, rate in rates.items()}
        adam = optax.multi_transform(by_group, student_groups)
    else:
        rate = options.learning_rate if learning_rate is None else learning_rate
        adam = optax.adam(rate, b1=options.b1, b2=options.b2)
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), adam) if options.max_grad_norm else adam


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """theta^- <- decay theta^- + (1 - decay) theta (the EMA target of OSV Eq. 5)."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def global_norm(tree: Any) -> Float[Array, ""]:
    """The norm over all leaves. (Optax's takes every leaf's real and imaginary part, which doubles the tracing.)"""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def norms(gradients: Mapping[str, Any], players: Mapping[str, Player]) -> dict[str, Array]:
    """The metrics `grad_norm/NAME` and `param_norm/NAME` of the players that have a gradient."""
    grads = {f"grad_norm/{name}": global_norm(gradient) for name, gradient in gradients.items()}
    return grads | {f"param_norm/{name}": global_norm(players[name].params) for name in gradients}
