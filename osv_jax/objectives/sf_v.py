"""SF-V: a one-step student against a discriminator on the frozen teacher's encoder (Zhang et al. 2024, Eq. 1 to 11).

Eq. 1 to 3 are SVD's own training (`finetune`), Eq. 4 its sampler (`diffusion.samplers.euler`). Signs are turned round
from Eq. 8 and 11, whose discriminator is negative for real clips: here, as everywhere, positive is real.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import optax
from jaxtyping import Array, Float, Int

from osv_jax.errors import UserError
from osv_jax.models import groups
from osv_jax.models.svd_unet import FEATURES
from osv_jax.models.unet_heads import KINDS, UNetHeads
from osv_jax.objectives import losses
from osv_jax.objectives.adversarial import Adversarial, AdversarialOptions
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.example import Example, draw_noise, noisy_example
from osv_jax.objectives.finetune import SigmaOptions
from osv_jax.objectives.gradient_penalty import METRIC, PenaltyOptions, weighted
from osv_jax.objectives.judges import Judge, UNetJudge
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws, Metrics, register
from osv_jax.objectives.options import setting
from osv_jax.objectives.players import Player, TrainState
from osv_jax.runtime.ranges import DECAY, NOT_NEGATIVE, POSITIVE, Range


@dataclasses.dataclass(frozen=True)
class SM3Options:
    """SM3 (Anil et al. 2019) for two players; the defaults are SF-V's.

    Attributes:
        learning_rate, disc_learning_rate: the student's and the discriminator's.
        momentum: of the scaled gradients.
        b2: decay of the accumulated squares; 1 is SM3's own sum.
        max_grad_norm: 0: no clipping.
    """

    learning_rate: float = setting(1e-5, NOT_NEGATIVE)
    disc_learning_rate: float = setting(1e-4, NOT_NEGATIVE)
    momentum: float = setting(0.5, DECAY)
    b2: float = setting(0.999, Range(0, 1))
    max_grad_norm: float = setting(0.0, NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class R1Options(PenaltyOptions):
    """As `PenaltyOptions`, of the noised latents that the discriminator sees.

    Attributes:
        kind: `exact`, by second derivatives, for which attention takes the plain path; or `difference`, see
            `losses.r1_by_difference`.
        step: of the difference.
    """

    kind: str = setting("exact", ("exact", "difference"))
    step: float = setting(0.01, POSITIVE)


@dataclasses.dataclass(frozen=True)
class SFVOptions(AdversarialOptions):
    """The options that SF-V adds; the defaults are the paper's.

    Attributes:
        optimizer: SM3, of both players.
        trainable: of the student; the paper trains all of it.
        num_levels: T_g of Eq. 5, of whose levels the lowest is not drawn.
        adversarial_weight: of L_adv in Eq. 10.
        reconstruction_weight: lambda of Eq. 10.
        discriminator_features: the blocks that are judged: of the teacher's `encoder`, or of its whole `unet` (LADD).
        discriminator_heads: which there are (Table 2).
        discriminator_sigma: P_mean and P_std of Eq. 7 (Table 3).
        r1: the penalty.
    """

    # Not Adam: what reads it, `make_optimizers`, is replaced, too.
    optimizer: SM3Options = dataclasses.field(default_factory=SM3Options)  # type: ignore[assignment]
    trainable: tuple[str, ...] = setting(("all",), groups.TRAINABLE)
    num_levels: int = setting(4, Range(2, 10_000, whole=True))
    adversarial_weight: float = setting(1.0, NOT_NEGATIVE)
    reconstruction_weight: float = setting(0.1, NOT_NEGATIVE)
    discriminator_features: str = setting("encoder", FEATURES)
    discriminator_heads: tuple[str, ...] = setting(KINDS, KINDS)
    discriminator_sigma: SigmaOptions = dataclasses.field(default_factory=lambda: SigmaOptions(-1.0, 1.0))
    r1: R1Options = dataclasses.field(default_factory=R1Options)


@register
class SFV(Adversarial):
    """The student denoises real latents at one of T_g - 1 levels; those latents are the target, and real."""

    name = "sf_v"
    Options = SFVOptions
    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "image_encoder")
    may_be_missing = (METRIC,)

    @classmethod
    def check(cls, options: SFVOptions, num_frames: int) -> None:
        heads = options.discriminator_heads
        if not heads or len(set(heads)) < len(heads):
            raise UserError(f"config.discriminator_heads={heads} must name one of {', '.join(KINDS)} or both.")

    def make_judge(self) -> Judge:
        options, unet = self.options, self.networks.unet
        heads = UNetHeads(options.discriminator_heads, dtype=unet.dtype)
        sigma = options.discriminator_sigma
        return UNetJudge(heads, unet, options.discriminator_features, sigma.log_mean, sigma.log_std)

    def make_optimizers(self) -> dict[str, optax.GradientTransformation]:
        chosen = self.options.optimizer
        return {"student": sm3(chosen, chosen.learning_rate), "disc": sm3(chosen, chosen.disc_learning_rate)}

    def draw(self, key: jax.Array, batch: Batch) -> Draws:
        key, of_judge = self.judge.draw(key, batch.latents.shape)
        return draw(key, batch, self.options) | of_judge

    def example(self, state: TrainState, frozen: Params, batch: Batch, draws: Draws) -> Example:
        """x_t = x_0 + sigma_t eps of Eq. 6; the target is x_0."""
        return noisy_example(batch, draws, self.options.num_levels, self.options.reconstruction_weight)

    def penalty(
        self, disc: Player, frozen: Params, example: Example, draws: Draws, real: Any, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""] | float, Metrics]:
        """gamma R1 on the real clips, noised as the discriminator sees them (Eq. 11)."""
        options = self.options.r1
        judge: Any = self.judge
        if options.kind == "exact":
            # The fused kernels have no second derivative.
            judge = dataclasses.replace(judge, unet=judge.unet.clone(attention="xla"))

        def logits_of(clips: Array) -> losses.Logits:
            seen = judge.see(frozen, clips, example.judge_cond, draws)
            return judge.score(disc.params, disc.stats, frozen, seen)[0]

        def computed() -> Float[Array, ""]:
            if options.kind == "exact":
                return losses.r1(logits_of, example.target).mean()
            return losses.r1_by_difference(logits_of, example.target, draws["r1_noise"], options.step).mean()

        return weighted(options, step, computed)

    def generator_loss(self, logits: losses.Logits) -> Float[Array, " b"]:
        return losses.linear_generator(logits)


def sm3(options: SM3Options, learning_rate: float) -> optax.GradientTransformation:
    """SM3 with momentum, after clipping by the global norm. (`optax.sm3` has no decay of the squares.)

    A step does not depend on the gradients' scale: optax's own epsilon, 1e-8 beside squares that are here those of
    millions of parameters' gradients, would make it that of plain gradient descent.
    """
    rule = optax.scale_by_sm3(options.momentum, options.b2, eps=1e-30)
    scaled = [rule, optax.scale_by_learning_rate(learning_rate)]
    return optax.chain(*[optax.clip_by_global_norm(options.max_grad_norm)] * bool(options.max_grad_norm), *scaled)


def draw(key: jax.Array, batch: Batch, options: SFVOptions) -> Draws:
    """What `noisy_example` needs, sigma_t being uniform among sigma_1 .. sigma_{T_g - 1} (Eq. 5), and R1's noise."""
    key, r1_key = jax.random.split(key)
    draws = draw_noise(key, batch, options.num_levels, first=1)
    if options.r1.weight and options.r1.kind == "difference":
        draws["r1_noise"] = jax.random.normal(r1_key, batch.latents.shape)
    return draws
