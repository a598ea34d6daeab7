"""What learns, and nothing else: the frozen networks are a separate argument of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from osv_jax.models import groups, lora
from osv_jax.models.discriminator import init_discriminator
from osv_jax.objectives.networks import Networks

Params = Mapping[str, Any]


@struct.dataclass
class Student:
    """The student's trainable parameters, float32.

    Attributes:
        lora: the LoRA tree; see `models.lora`. Empty when it does not train.
        tuned: base parameters that train themselves: a part of the UNet's tree, empty when only LoRA trains.
    """

    lora: Params
    tuned: Params

    def variables(self, base: Params, lora_scale: float = 1.0) -> dict[str, Params]:
        """The UNet's variables: base parameters, the tuned ones in their place, LoRA on top."""
        params = unflatten_dict({**flatten_dict(base), **flatten_dict(self.tuned)}) if self.tuned else base
        return {"params": params, "lora": lora.scale_lora(self.lora, lora_scale)}


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds of a run.

    Attributes:
        step: optimizer steps done.
        student: trained parameters.
        ema: their exponential moving average, float32 (in half precision small updates are lost).
        disc: variables of the discriminator: `params` and `spectral`. Empty for an objective that has none.
        opt_student, opt_disc: states of the two optimizers; the second is `()` without a discriminator.
    """

    step: Int[Array, ""]
    student: Student
    ema: Student
    disc: dict[str, Params]
    opt_student: optax.OptState
    opt_disc: optax.OptState


def init_state(
    key: jax.Array,
    networks: Networks,
    unet_params: Params,
    optimizer_student: optax.GradientTransformation,
    optimizer_disc: optax.GradientTransformation | None,
    lora_rank: int,
    lora_targets: str,
    trainable: Sequence[str] = ("lora",),
) -> TrainState:
    """A student equal to the teacher and a fresh discriminator, where there is one.

    Args:
        networks: without a discriminator, if the objective has none.
        unet_params: the base parameters: their shapes, and the values that the tuned groups start from.
        trainable: names of `models.groups.TRAINABLE`; without `lora` there is none.
    """
    lora_key, disc_key = jax.random.split(key)
    adapter, disc = {}, {}
    if "lora" in trainable:
        modules = lora.target_modules(unet_params, lora_targets)
        adapter = lora.init_lora(lora_key, unet_params, lora_rank, modules)
    tuned = jax.tree.map(lambda x: x.astype(jnp.float32), groups.select(unet_params, trainable))
    student = Student(lora=adapter, tuned=tuned)
    if networks.discriminator is not None:
        disc = init_discriminator(networks.discriminator, disc_key, networks.dinov2.config.hidden_size)
    return start_state(student, disc, optimizer_student, optimizer_disc)


def start_state(
    student: Student,
    disc: dict[str, Params],
    optimizer_student: optax.GradientTransformation,
    optimizer_disc: optax.GradientTransformation | None,
) -> TrainState:
    """The state before the first step of a student and a discriminator (or none) that exist already."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        # A copy: the step donates its state, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, student),
        disc=disc,
        opt_student=optimizer_student.init(student),
        opt_disc=optimizer_disc.init(disc["params"]) if disc else (),
    )


def make_optimizer(
    learning_rate: float, b1: float, b2: float, max_grad_norm: float | None
) -> optax.GradientTransformation:
    """Adam, after clipping by the global norm where `max_grad_norm` is set."""
    adam = optax.adam(learning_rate, b1=b1, b2=b2)
    return adam if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), adam)


def update_ema(ema: Student, student: Student, decay: float) -> Student:
    """theta^- <- decay theta^- + (1 - decay) theta (the EMA target of OSV Eq. 5)."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, student)


def global_norm(tree: Any) -> Float[Array, ""]:
    """The norm over all leaves. (Optax's takes every leaf's real and imaginary part, which doubles the tracing.)"""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
