"""Consistency distillation: the student regresses to what its EMA predicts a few steps of the teacher further down."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.diffusion.edm import per_clip, sigma_grid
from osv_jax.diffusion.ode import euler_solve, guided_denoiser
from osv_jax.errors import UserError
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.distillation import Distillation, DistillationOptions
from osv_jax.objectives.example import Example
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Draws
from osv_jax.objectives.options import GuidanceOptions, setting
from osv_jax.objectives.players import TrainState
from osv_jax.runtime.ranges import COUNT, NOT_NEGATIVE


@dataclasses.dataclass(frozen=True)
class ConsistencyOptions(DistillationOptions):
    """The options of consistency distillation; the defaults are OSV's.

    Attributes:
        solver_steps: m, the teacher's Euler steps between t_{n+m} and t_n.
        guidance: of the teacher.
        weight_exponent: p of lambda(t_n) = (1 / (t_{n+m} - t_n))^p.
    """

    solver_steps: int = setting(5, COUNT)
    guidance: GuidanceOptions = dataclasses.field(default_factory=GuidanceOptions)
    weight_exponent: float = setting(0.1, NOT_NEGATIVE)


def check(options: ConsistencyOptions) -> None:
    """Raises UserError if the grid has no room for the teacher's steps."""
    if options.solver_steps >= options.num_levels:
        raise UserError(f"config.solver_steps={options.solver_steps} must lie in 1 .. {options.num_levels - 1}.")


def draw(key: jax.Array, batch: Batch, options: ConsistencyOptions) -> Draws:
    """The index of each clip's t_n, its noise, and a number for its guidance."""
    index_key, noise_key, guidance_key = jax.random.split(key, 3)
    clips = batch.latents.shape[:1]
    return {
        # Of t_n on the grid t_1 .. t_N, counted from 0: n in 1 .. N - m.
        "index": jax.random.randint(index_key, clips, 0, options.num_levels - options.solver_steps),
        "noise": jax.random.normal(noise_key, batch.latents.shape),
        "uniform": jax.random.uniform(guidance_key, clips),
    }


def example(objective: Distillation, state: TrainState, frozen: Params, batch: Batch, draws: Draws) -> Example:
    """x at t_{n+m}; and, as the target, the EMA's prediction from x at t_n, where the teacher's steps end (OSV Eq. 8).

    Args:
        objective: with `ConsistencyOptions`.
    """
    options = objective.options
    grid = jnp.asarray(sigma_grid(options.num_levels))
    levels = grid[draws["index"] + jnp.arange(options.solver_steps, -1, -1)[:, None]]
    high, low = levels[0], levels[-1]
    x_high = batch.latents + per_clip(high) * draws["noise"]

    guidance = guidance_scale(options.guidance, batch.latents.shape[1], draws["uniform"])
    teacher = objective.backbone(frozen, None, batch.cond)
    x_low = euler_solve(guided_denoiser(teacher, guidance), x_high, levels)
    ema = objective.backbone(frozen, state.players["student"].ema, batch.cond)
    weight, cond = distance_weight(high, low, options.weight_exponent), batch.cond
    return Example(x=x_high, sigma=high, cond=cond, target=ema(x_low, low), weight=weight, judge_cond=cond)


def guidance_scale(guidance: GuidanceOptions, num_frames: int, uniform: Float[Array, " b"]) -> Float[Array, "_ f"]:
    """w for every frame, of every clip where they differ ([1 f] where they do not)."""
    low, high = guidance.min, guidance.max
    if guidance.kind == "linspace":
        return jnp.linspace(low, high, num_frames)[None]
    if guidance.kind == "constant":
        return jnp.full((1, num_frames), high)
    return jnp.broadcast_to((low + (high - low) * uniform)[:, None], (uniform.shape[0], num_frames))


def distance_weight(high: Float[Array, " b"], low: Float[Array, " b"], exponent: float) -> Float[Array, " b"]:
    """lambda(t_n) = (1 / (t_{n+m} - t_n))^p (OSV Eq. 10, which leaves it open).

    Improved consistency training uses p = 1, which on this grid spans four decades; a small p lets all levels count.
    """
    return (1 / (high - low)) ** exponent
