"""What an objective is to the rest of the program, and how it is found by its name.

An objective is one file of this folder: a dataclass of options, and a class that says what the training loop,
checkpoints, plans, pictures and resuming need to know about it. Nothing else branches on its name.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

import osv_jax.objectives
from osv_jax.diffusion.edm import SIGMA_MAX, EDMBackbone
from osv_jax.diffusion.ode import Denoiser, guided_denoiser
from osv_jax.diffusion.samplers import euler, euler_levels
from osv_jax.errors import UserError
from osv_jax.models import groups
from osv_jax.objectives.batches import to_batch
from osv_jax.objectives.networks import Params, build_networks
from osv_jax.objectives.players import Player, TrainState, init_student, make_optimizer, start

Metrics = dict[str, Array]
# All random numbers of a step, each with the batch as its first axis: drawn at once, so that neither the number of
# devices nor `grad_accum` changes them.
Draws = dict[str, Array]
Optimizers = Mapping[str, optax.GradientTransformation]
# SVD's guidance at the first and at the last frame.
GUIDANCE = (1.0, 3.0)

_REGISTRY: dict[str, type[Objective]] = {}


class Objective(abc.ABC):
    """A training objective with its networks and options.

    Class attributes:
        name: what configurations call it (`config.objective`).
        Options: a dataclass whose fields are its keys of a configuration; see `options.from_config`.
        components: the frozen networks that it needs, names of `convert.architectures.ARCHITECTURES`.
        vae: which of them makes pixels of latents.
        starts_from_image: whether its students are conditioned on a clip's first frame, which pictures then show.
        curves: the metrics that are drawn and shown.
        may_be_missing: metrics whose names begin with one of these may be NaN in a step that had nothing to measure.
        product: what a run makes: a few-step `student`, or another `teacher`. A run starts from another's workdir
            only where both make the same.

    Args:
        networks: modules without parameters: `Networks`, or others that the objective trains.
        options: an instance of `Options`.
        optimizers: of the players by name; by default those of the options.

    Raises:
        UserError: options that contradict each other or the networks.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]]
    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "image_encoder")
    vae: ClassVar[str] = "vae"
    starts_from_image: ClassVar[bool] = True
    curves: ClassVar[tuple[str, ...]]
    product: ClassVar[str] = "student"
    may_be_missing: ClassVar[tuple[str, ...]] = ()

    def __init__(self, networks: Any, options: Any, optimizers: Optimizers | None = None):
        self.networks, self.options = networks, options
        self.optimizers = self.make_optimizers() if optimizers is None else optimizers

    @classmethod  # noqa: B027
    def check(cls, options: Any, num_frames: int) -> None:
        """What can be known to be wrong with options before anything is loaded.

        Args:
            num_frames: of a clip; 0 while the UNet's own number is not known.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """

    def warnings(self) -> list[str]:
        """What is allowed of the options and seldom meant, a sentence each."""
        return []

    @classmethod
    def make_networks(cls, architectures: Mapping[str, Any], **options: Any) -> Any:
        """The modules for the architectures of `components`.

        Args:
            options: as of `networks.build_networks`.

        Raises:
            UserError: architectures that do not go together.
        """
        return build_networks(architectures, **options)

    @classmethod
    def may_start_from(cls, other: str) -> bool:
        """Whether a run can start from the workdir of a run with the objective `other`."""
        return is_known(other) and find(other).product == cls.product

    @abc.abstractmethod
    def make_optimizers(self) -> Optimizers:
        """The optimizer of each player."""

    @abc.abstractmethod
    def init(self, key: jax.Array, frozen: Params) -> dict[str, Player]:
        """The players before the first step, to be compiled."""

    @abc.abstractmethod
    def step(self, state: TrainState, frozen: Params, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One step of training, to be compiled; all randomness comes from `key`."""

    def batch(self, frozen: Params, clips: Mapping[str, Array], key: jax.Array, data: ConfigDict) -> Any:
        """What `step` takes, from what `training.clips` gives.

        Args:
            data: `config.data`.
        """
        return to_batch(self.networks.codec, frozen, clips, key, data.motion_bucket_id)

    def backbone(self, frozen: Params, student: Any, cond: Any) -> Any:
        """The denoiser of a student, given its parameters, or of the teacher (None), on a condition."""
        if student is None:
            return EDMBackbone(self.networks.unet_with({"params": frozen["unet"]}), cond)
        variables = student.variables(frozen["unet"], self.options.lora.scale)
        return EDMBackbone(self.networks.unet_with(variables), cond)

    def parameter_table(self, frozen: Params, student: Any) -> str:
        """Lines that say which of the student's parameters learn."""
        adapter = sum(leaf.size for leaf in jax.tree.leaves(student.lora))
        return groups.count_table(frozen["unet"], self.options.trainable, adapter)

    @property
    def preview_label(self) -> str:
        """What `preview` is called in pictures."""
        return "one-step sample"

    def preview_denoiser(self, backbone: Any, num_frames: int) -> Denoiser:
        """The denoiser that `preview` calls, to be compiled."""
        return backbone

    def teacher_denoiser(self, backbone: Any, num_frames: int) -> Denoiser:
        """The teacher's as it is sampled with, to be compiled."""
        return guided_denoiser(backbone, jnp.linspace(*GUIDANCE, num_frames))

    def teacher_sample(
        self, denoiser: Denoiser, noise: Float[Array, "b f h w c"], steps: int
    ) -> Float[Array, "b f h w c"]:
        """The teacher's latents, from standard normal noise."""
        return euler(denoiser, noise, euler_levels(steps))

    def preview(self, denoiser: Denoiser, noise: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        """Latents sampled from standard normal noise; by default in one step."""
        return denoiser(SIGMA_MAX * noise, jnp.full(noise.shape[0], SIGMA_MAX, jnp.float32))


class StudentObjective(Objective):
    """An objective with a player `student` that starts as the UNet and has an EMA; its options are `StudentOptions`."""

    def make_optimizers(self) -> dict[str, optax.GradientTransformation]:
        return {"student": make_optimizer(self.options.optimizer)}

    def init(self, key: jax.Array, frozen: Params) -> dict[str, Player]:
        """A student equal to the pretrained weights."""
        student_key, _ = jax.random.split(key)
        chosen = self.options
        student = init_student(student_key, frozen["unet"], chosen.lora.rank, chosen.lora.targets, chosen.trainable)
        return {"student": start(student, self.optimizers["student"], ema=True)}


def register(cls: type[Objective]) -> type[Objective]:
    """Makes an objective known by its name; a decorator."""
    _REGISTRY[cls.name] = cls
    return cls


def is_known(name: Any) -> bool:
    """Whether there is an objective of that name."""
    for module in pkgutil.iter_modules(osv_jax.objectives.__path__):
        importlib.import_module(f"osv_jax.objectives.{module.name}")
    return name in _REGISTRY


def find(name: str) -> type[Objective]:
    """The objective that a configuration names.

    Raises:
        UserError: if there is none of that name.
    """
    if not is_known(name):
        raise UserError(f"config.objective={name!r} is not one of {', '.join(sorted(_REGISTRY))}.")
    return _REGISTRY[name]
