"""ADD (Sauer et al. 2023) on SVD: a discriminator of decoded frames, and score distillation from the teacher.

OSV Fig. 3 compares with it. Frames are judged by temporal heads, too, which images do not need.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osv_jax.diffusion.edm import per_clip, sigma_grid
from osv_jax.objectives import losses
from osv_jax.objectives.adversarial import Adversarial, AdversarialOptions
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.example import Example, draw_noise, noisy_example
from osv_jax.objectives.gradient_penalty import METRIC, PenaltyOptions, weighted
from osv_jax.objectives.judges import ConditionedPixelJudge, Judge
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws, Metrics, register
from osv_jax.objectives.options import setting
from osv_jax.objectives.osv import BLOCK, PATCH_READS, check_blocks
from osv_jax.objectives.players import Player, TrainState
from osv_jax.runtime.ranges import COUNT, NOT_NEGATIVE, Range

# The teacher's noise levels, one of which is drawn for each clip.
_TEACHER_LEVELS = 1000


@dataclasses.dataclass(frozen=True)
class ADDOptions(AdversarialOptions):
    """The options that ADD adds; the defaults are the paper's where it says them.

    Attributes:
        num_levels: of the student; the lowest is not drawn.
        adversarial_weight: of L_adv.
        distillation_weight: lambda of L_adv + lambda L_distill.
        discriminator_blocks, discriminator_read: see `OSVOptions`.
        condition_width: of the projection of the image's features.
        r1: the penalty, of the features.
    """

    num_levels: int = setting(5, Range(2, 10_000, whole=True))
    adversarial_weight: float = setting(1.0, NOT_NEGATIVE)
    distillation_weight: float = setting(2.5, NOT_NEGATIVE)
    discriminator_blocks: tuple[int, ...] = setting((2, 5, 8, 11), BLOCK)
    discriminator_read: str = setting("sum", PATCH_READS)
    condition_width: int = setting(64, COUNT)
    r1: PenaltyOptions = dataclasses.field(default_factory=PenaltyOptions)


@register
class ADD(Adversarial):
    """The student denoises real latents at one of four levels. Decoded, they are real to the discriminator; the
    training target is what the teacher makes of the student's own output, noised again.
    """

    name = "add"
    Options = ADDOptions
    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "image_encoder", "dinov2")
    curves: ClassVar[tuple[str, ...]] = ("loss_distillation", "loss_adversarial", "loss_disc")
    distance_metric = "loss_distillation"
    may_be_missing = (METRIC,)

    @classmethod
    def check(cls, options: ADDOptions, num_frames: int) -> None:
        check_blocks(options.discriminator_blocks)

    def make_judge(self) -> Judge:
        networks, options = self.networks, self.options
        discriminator = networks.discriminator.clone(
            read=options.discriminator_read, condition_width=options.condition_width
        )
        clip_width = networks.unet.config.cross_attention_dim
        return ConditionedPixelJudge(discriminator, networks.dinov2, networks.codec, clip_width)

    def draw(self, key: jax.Array, batch: Batch) -> Draws:
        student_key, teacher_key = jax.random.split(key)
        of_teacher = draw_noise(teacher_key, batch, _TEACHER_LEVELS)
        of_student = draw_noise(student_key, batch, self.options.num_levels, first=1)
        return of_student | {f"teacher_{name}": values for name, values in of_teacher.items()}

    def example(self, state: TrainState, frozen: Params, batch: Batch, draws: Draws) -> Example:
        example = noisy_example(batch, draws, self.options.num_levels, self.options.distillation_weight)
        judge: Any = self.judge
        return dataclasses.replace(example, judge_cond=judge.condition(frozen, batch.cond))

    def penalty(
        self, disc: Player, frozen: Params, example: Example, draws: Draws, real: Any, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""] | float, Metrics]:
        """gamma R1 of the features of real clips: no second derivative of the backbone is needed (ADD section 3.1)."""
        features, condition = real

        def logits_of(features: tuple[Array, ...]) -> losses.Logits:
            return self.judge.score(disc.params, disc.stats, frozen, (features, condition))[0]

        return weighted(self.options.r1, step, lambda: losses.r1(logits_of, features).mean())

    def generator_loss(self, logits: losses.Logits) -> Float[Array, " b"]:
        return losses.linear_generator(logits)

    def distance(
        self, frozen: Params, example: Example, fake: Float[Array, "b f h w c"], draws: Draws
    ) -> Float[Array, " b"]:
        return distillation_loss(self, frozen, example, fake, draws)


def distillation_loss(
    objective: ADD, frozen: Params, example: Example, fake: Float[Array, "b f h w c"], draws: Draws
) -> Float[Array, " b"]:
    """lambda c(t) ||x - D_teacher(sg(x + sigma_t eps); sigma_t)||^2, x being the student's output (ADD section 3.2).

    c(t) is the weight of the signal in noised data of unit variance, 1 / sqrt(sigma_t^2 + 1), for alpha_t there. The
    teacher is not guided.
    """
    sigma = jnp.asarray(sigma_grid(_TEACHER_LEVELS))[draws["teacher_index"]]
    noisy = jax.lax.stop_gradient(fake + per_clip(sigma) * draws["teacher_noise"])
    target = jax.lax.stop_gradient(objective.backbone(frozen, None, example.cond)(noisy, sigma))
    return example.weight * jax.lax.rsqrt(sigma**2 + 1) * losses.squared_error(fake, target)
