"""Settings that objectives share: dataclasses whose fields ARE the keys of a configuration, documented where they are.

A field of a nested dataclass is a nested key: `StudentOptions.lora.rank` is `config.lora.rank`. `setting` gives a field
its default and what is allowed; `from_config` reads a whole dataclass and says what is wrong with it.
"""

from __future__ import annotations

import dataclasses
import numbers
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from ml_collections import ConfigDict

from osv_jax.codec import DECODERS
from osv_jax.errors import UserError
from osv_jax.models import groups, lora
from osv_jax.models.attention import ATTENTION_IMPLEMENTATIONS
from osv_jax.models.layers import REMAT_POLICIES
from osv_jax.runtime.ranges import (
    COUNT,
    DECAY,
    FINITE,
    FPS,
    MOTION_BUCKET_ID,
    NOT_NEGATIVE,
    NUM_FRAMES,
    POSITIVE,
    SEED,
    WHOLE,
    Range,
)

T = TypeVar("T")
GUIDANCE_KINDS = ("linspace", "constant", "range")
DTYPES = ("float32", "bfloat16")
# The step is an int32.
NUM_STEPS = Range(1, 2**31 - 1, whole=True)
# Of devices; -1: all that are left.
SHARE = Range(1, whole=True, also=-1)


def setting(default: Any, allowed: Range | Sequence[Any]) -> Any:
    """A dataclass field with a default, and the numbers or values that are allowed (of a tuple, of its elements)."""
    return dataclasses.field(default=default, metadata={"allowed": allowed})


def from_config(cls: type[T], config: Mapping[str, Any] | ConfigDict, where: str = "config.") -> T:
    """An instance of a dataclass of settings, from a configuration that may hold other keys, too.

    Args:
        where: what stands before a key in a message.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    config = config.to_dict() if isinstance(config, ConfigDict) else config
    values: dict[str, Any] = {}
    for field, hint in _fields(cls):
        name = where + field.name
        if field.name not in config:
            raise UserError(f"{name} is missing; the configuration must have it.")
        value = config[field.name]
        if _is_settings(hint):
            values[field.name] = from_config(hint, value, f"{name}.")
        else:
            values[field.name] = _checked(name, value, hint, field.metadata.get("allowed"))
    return cls(**values)


def check_stored(cls: type, config: Mapping[str, Any], where: str) -> None:
    """Checks the keys that a stored configuration has; it may be of another version and lack some.

    Raises:
        UserError: as `from_config`.
    """
    for field, hint in _fields(cls):
        value = config.get(field.name)
        if _is_settings(hint) and isinstance(value, Mapping):
            check_stored(hint, value, f"{where}{field.name}.")
        elif field.name in config and not _is_settings(hint):
            _checked(where + field.name, value, hint, field.metadata.get("allowed"))


def to_config(cls: type) -> dict[str, Any]:
    """The defaults of a dataclass of settings as nested dicts, for a `ConfigDict`."""
    return dataclasses.asdict(cls())


def _fields(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _is_settings(hint: Any) -> TypeGuard[type]:
    return dataclasses.is_dataclass(hint)


def _checked(name: str, value: Any, hint: Any, allowed: Range | Sequence[Any] | None) -> Any:
    kind = typing.get_origin(hint) or hint
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if name.endswith("dtype") and value == "float16":
        # There is no loss scaling, without which 99.97 % of a LoRA's gradients are 0.
        raise UserError(
            f"{name}='float16' is not supported: in training it rounds nearly all gradients to 0; use bfloat16, or"
            " float32."
        )
    elements = value if isinstance(value, tuple) else (value,)
    if isinstance(allowed, Range):
        if any(element not in allowed for element in elements):
            raise UserError(f"{name}={value!r} must be {allowed}.")
    elif allowed is not None and not all(element in allowed for element in elements):
        raise UserError(f"{name}={value!r} is not one of {', '.join(map(str, allowed))}.")
    if kind is float and isinstance(value, numbers.Real):
        value = float(value)
    if not isinstance(value, kind):
        raise UserError(f"{name}={value!r} must be of type {kind.__name__}.")
    return value


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The clips of a run.

    Attributes:
        videos: a folder; `demo` names the clips that come with the extra osv_jax[demo].
        dataset: instead of videos, a dataset of osv_jax.prepare. {height} and {width} in it stand for the size of the
            clips, for runs with several resolutions.
        num_workers: processes that read a dataset; 0: threads, which are fast enough.
        num_frames: of a clip; 0: those that the UNet was trained on, 14 for SVD and 25 for SVD-XT.
        fps: frames a second.
        resolutions: (from step, height, width), ascending: what size clips have [px] from which step on.
        motion_bucket_id: SVD's amount of motion, 1 to 255.
    """

    videos: str = "videos"
    dataset: str = ""
    num_workers: int = setting(0, WHOLE)
    num_frames: int = setting(0, dataclasses.replace(NUM_FRAMES, also=0))
    fps: float = setting(7.0, FPS)
    resolutions: tuple[tuple[int, int, int], ...] = ((0, 576, 1024),)
    motion_bucket_id: float = setting(127, MOTION_BUCKET_ID)


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """How many devices share what; one of the three may be -1, which takes what is left.

    Attributes:
        data: groups of devices with a copy of all parameters each; they split the batch.
        fsdp: devices that share the parameters; they split the batch, too.
        context: devices that share each clip's height.
    """

    data: int = setting(-1, SHARE)
    fsdp: int = setting(1, SHARE)
    context: int = setting(1, SHARE)


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What is measured every `eval_every` steps, on a few clips that are not trained on.

    Attributes:
        videos: a folder; of a run on a dataset its split `test` is taken instead.
        clips: at most so many, evenly spread.
        teacher_steps: Euler steps of the teacher's samples, to which `eval_mse` is measured.
        protocol: of FVD, see docs/evaluation.md.
        fvd_weights: a folder with i3d or videomae, that osv_jax.convert_weights wrote; empty: no FVD.
        bootstrap: draws for FVD's interval.
    """

    videos: str = ""
    clips: int = setting(16, COUNT)
    teacher_steps: int = setting(25, COUNT)
    protocol: str = "osv"
    fvd_weights: str = ""
    bootstrap: int = setting(100, WHOLE)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The settings of every run, whatever its objective.

    Attributes:
        objective: a name that `objectives.objective.find` knows.
        seed: of all randomness.
        init_from: a workdir whose student (and discriminator) this run starts from, or a LoRA trained elsewhere (PEFT
            folder or .safetensors); empty: from the teacher.
        weights: a folder that osv_jax.convert_weights wrote: unet/, vae/, image_encoder/, dinov2/.
        random_networks: architectures to fill with random parameters, instead of `weights` or of some networks there.
        data: the clips.
        batch_size: clips in a step, over all devices.
        num_steps: of the whole run.
        dtype: of the networks and of their frozen parameters; `bfloat16` or `float32`.
        attention: see `models.attention.dot_product_attention`.
        remat: what the backward pass recomputes in the UNet and the VAE, see `models.layers.rematerialise`.
        mesh: of devices.
        log_every, picture_every, checkpoint_every: steps between progress lines, pictures, checkpoints.
        preview_decoder: what decodes pictures: `vae`, or `tiny`, the TAESDV in `weights`.
        eval_every: steps between evaluations of the student on held-out clips; 0: none.
        evaluation: what these are.
        keep_checkpoints: how many of the last checkpoints are kept.
    """

    objective: str = ""
    seed: int = setting(0, SEED)
    init_from: str = ""
    weights: str = "weights/svd"
    random_networks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    batch_size: int = setting(8, COUNT)
    num_steps: int = setting(2000, NUM_STEPS)
    dtype: str = setting("bfloat16", DTYPES)
    attention: str = setting("auto", ATTENTION_IMPLEMENTATIONS)
    remat: str = setting("full", REMAT_POLICIES)
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    log_every: int = setting(10, COUNT)
    picture_every: int = setting(200, COUNT)
    checkpoint_every: int = setting(200, COUNT)
    preview_decoder: str = setting("vae", DECODERS)
    eval_every: int = setting(0, WHOLE)
    evaluation: EvaluationOptions = dataclasses.field(default_factory=EvaluationOptions)
    keep_checkpoints: int = setting(2, COUNT)


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Adam, after clipping by the global norm.

    Attributes:
        learning_rate: of all groups that `group_learning_rates` does not name.
        b1, b2: decay of the first and second moments.
        max_grad_norm: 0: no clipping.
        group_learning_rates: (name of `config.trainable`, its own rate) pairs; a rate of 0 freezes a group.
    """

    learning_rate: float = setting(5e-6, NOT_NEGATIVE)
    b1: float = setting(0.9, DECAY)
    b2: float = setting(0.999, DECAY)
    max_grad_norm: float = setting(0.0, NOT_NEGATIVE)
    group_learning_rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for pair in self.group_learning_rates:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and pair[0] in groups.TRAINABLE[:-1]):
                break
            if pair[1] not in NOT_NEGATIVE:
                break
        else:
            return
        raise UserError(
            f"config.optimizer.group_learning_rates={self.group_learning_rates} must be (name, rate) pairs, the name"
            f" being one of {', '.join(groups.TRAINABLE[:-1])}, the rate {NOT_NEGATIVE}."
        )


@dataclasses.dataclass(frozen=True)
class AdversarialOptimizerOptions(OptimizerOptions):
    """As `OptimizerOptions`, for two players.

    Attributes:
        disc_learning_rate: the discriminator's.
    """

    disc_learning_rate: float = setting(5e-6, NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class LoRAOptions:
    """Low-rank adaptation of the student.

    Attributes:
        rank: of every module.
        alpha: the low-rank product is scaled by alpha / rank.
        targets: `all` modules that OSV's LoRA covers, or those of `attention` alone.
    """

    rank: int = setting(64, COUNT)
    alpha: float = setting(64.0, POSITIVE)
    targets: str = setting("all", tuple(lora.TARGETS))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class GuidanceOptions:
    """Classifier-free guidance of the teacher.

    Attributes:
        kind: `linspace` rises from `min` at the first frame to `max` at the last, as SVD samples; `constant` is `max`
            on every frame; `range` draws one value a clip from `min` to `max`.
        min, max: guidance scales w.
    """

    kind: str = setting("linspace", GUIDANCE_KINDS)
    min: float = setting(1.0, FINITE)
    max: float = setting(3.0, FINITE)


@dataclasses.dataclass(frozen=True)
class StudentOptions:
    """The settings of every objective whose student is the UNet.

    Attributes:
        optimizer: of the student.
        lora: of the student; unused where `trainable` lacks `lora`.
        trainable: groups of parameters that learn, names of `models.groups.TRAINABLE`.
        ema_decay: of the student's exponential moving average (EMA).
        grad_accum: the number of equal parts in which a batch is processed, one after the other.
    """

    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    lora: LoRAOptions = dataclasses.field(default_factory=LoRAOptions)
    trainable: tuple[str, ...] = setting(("lora",), groups.TRAINABLE)
    ema_decay: float = setting(0.95, DECAY)
    grad_accum: int = setting(1, COUNT)
