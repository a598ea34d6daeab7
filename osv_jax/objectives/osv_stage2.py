"""Stage 2 of OSV: adversarial consistency distillation (ACD, Eq. 8 to 10)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from osv_jax.diffusion.edm import denoise, per_clip, sigma_grid
from osv_jax.diffusion.ode import euler_solve, guided_denoiser
from osv_jax.objectives import adversarial
from osv_jax.objectives.adversarial import AdversarialOptions, Batch, Draws, Example
from osv_jax.objectives.networks import Networks, Params
from osv_jax.objectives.players import TrainState

GUIDANCE_KINDS = ("linspace", "constant", "range")


@dataclasses.dataclass(frozen=True)
class Stage2Options:
    """What stage 2 has of its own; the defaults are the paper's.

    Attributes:
        num_levels: N of the grid.
        solver_steps: m, the teacher's Euler steps between t_{n+m} and t_n.
        guidance_kind: `linspace` rises from guidance_min at the first frame to guidance_max at the last, as SVD
            samples; `constant` is guidance_max on every frame; `range` draws one value a clip from min to max.
        guidance_min, guidance_max: guidance scales w.
        weight_exponent: p of lambda(t_n) = (1 / (t_{n+m} - t_n))^p.
    """

    num_levels: int = 100
    solver_steps: int = 5
    guidance_kind: str = "linspace"
    guidance_min: float = 1.0
    guidance_max: float = 3.0
    weight_exponent: float = 0.1


def make_step(
    networks: Networks,
    optimizer_student: optax.GradientTransformation,
    optimizer_disc: optax.GradientTransformation,
    options: AdversarialOptions,
    stage2: Stage2Options,
) -> adversarial.Step:
    """The step of stage 2.

    The student jumps from x at t_{n+m} to the end. Its target is the jump of its own average from where the guided
    teacher leads in m Euler steps, x at t_n; the discriminator takes that target for real.

    Raises:
        ValueError: on an unknown kind of guidance, or more solver steps than the grid has intervals.
    """
    if stage2.guidance_kind not in GUIDANCE_KINDS:
        raise ValueError(f"guidance_kind must be one of {GUIDANCE_KINDS}, got {stage2.guidance_kind!r}.")
    if not 1 <= stage2.solver_steps < stage2.num_levels:
        raise ValueError(f"solver_steps must lie in 1 .. {stage2.num_levels - 1}, got {stage2.solver_steps}.")
    grid = jnp.asarray(sigma_grid(stage2.num_levels))

    def draw(key: jax.Array, batch: Batch) -> Draws:
        index_key, noise_key, guidance_key = jax.random.split(key, 3)
        clips = batch.latents.shape[:1]
        return {
            # Of t_n on the grid t_1 .. t_N, counted from 0: n in 1 .. N - m.
            "index": jax.random.randint(index_key, clips, 0, stage2.num_levels - stage2.solver_steps),
            "noise": jax.random.normal(noise_key, batch.latents.shape),
            "uniform": jax.random.uniform(guidance_key, clips),
        }

    def pose(state: TrainState, frozen: Params, batch: Batch, draws: Draws) -> Example:
        offsets = jnp.arange(stage2.solver_steps, -1, -1)[:, None]
        levels = grid[draws["index"] + offsets]
        high, low = levels[0], levels[-1]
        x_high = batch.latents + per_clip(high) * draws["noise"]

        guidance = guidance_scale(stage2, batch.latents.shape[1], draws["uniform"])
        teacher = networks.unet_with({"params": frozen["unet"]})
        x_low = euler_solve(guided_denoiser(teacher, batch.cond, guidance), x_high, levels)
        average = networks.unet_with(state.ema.variables(frozen["unet"], options.lora_scale))
        target = denoise(average, x_low, low, batch.cond, options.boundary)
        weight = distance_weight(high, low, stage2.weight_exponent)
        return Example(x=x_high, sigma=high, cond=batch.cond, target=target, weight=weight)

    return adversarial.make_step(networks, optimizer_student, optimizer_disc, options, draw, pose)


def guidance_scale(stage2: Stage2Options, num_frames: int, uniform: Float[Array, " b"]) -> Float[Array, "_ f"]:
    """w for every frame, of every clip where they differ ([1 f] where they do not)."""
    low, high = stage2.guidance_min, stage2.guidance_max
    if stage2.guidance_kind == "linspace":
        return jnp.linspace(low, high, num_frames)[None]
    if stage2.guidance_kind == "constant":
        return jnp.full((1, num_frames), high)
    return jnp.broadcast_to((low + (high - low) * uniform)[:, None], (uniform.shape[0], num_frames))


def distance_weight(high: Float[Array, " b"], low: Float[Array, " b"], exponent: float) -> Float[Array, " b"]:
    """lambda(t_n) = (1 / (t_{n+m} - t_n))^p (OSV Eq. 10, which leaves it open).

    Improved consistency training uses p = 1, which on this grid spans four decades; a small p keeps all levels in play.
    """
    return (1 / (high - low)) ** exponent
