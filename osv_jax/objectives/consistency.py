"""Consistency distillation: the student regresses to what its EMA predicts a few steps of the teacher further down."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
from osv_jax.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE


@dataclasses.dataclass(frozen=True)
class ConsistencyOptions(DistillationOptions):
    """The options of consistency distillation; the defaults are OSV's.

    Attributes:
        solver_steps: m, the teacher's Euler steps between t_{n+m} and t_n.
        guidance: of the teacher.
        weight_exponent: p of lambda(t_n) = (1 / (t_{n+m} - t_n))^p.
        level_weights: (level, weight) pairs: the student starts from t_level with a probability proportional to the
            weight, and from no other level; levels are n + m, from m + 1 to N. Empty: from all of them alike (Eq. 8 to
            10, where n is uniform in 1 .. N - m).
    """

    solver_steps: int = setting(5, COUNT)
    guidance: GuidanceOptions = dataclasses.field(default_factory=GuidanceOptions)
    weight_exponent: float = setting(0.1, NOT_NEGATIVE)
    level_weights: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not all(
            isinstance(pair, tuple | list) and len(pair) == 2 and pair[0] in COUNT and pair[1] in POSITIVE
            for pair in self.level_weights
        ) or len(dict(self.level_weights)) < len(self.level_weights):
            raise UserError(
                f"config.level_weights={self.level_weights} must be (level, weight) pairs, each level a whole number"
                f" that is there once, each weight {POSITIVE}."
            )


def check(options: ConsistencyOptions) -> None:
    """Raises UserError if the grid has no room for the teacher's steps, or the student starts where there are none."""
    first, last = options.solver_steps + 1, options.num_levels
    if first > last:
        raise UserError(f"config.solver_steps={options.solver_steps} must lie in 1 .. {last - 1}.")
    for level, _ in options.level_weights:
        if not first <= level <= last:
            raise UserError(
                f"config.level_weights={options.level_weights}: the levels that the teacher makes its"
                f" {options.solver_steps} steps from (config.solver_steps) are {first} to {last}, and {level} is none."
            )


def warnings(options: ConsistencyOptions) -> list[str]:
    """A sentence if the student never starts from t_N, where every sampler begins."""
    if not options.level_weights or options.num_levels in dict(options.level_weights):
        return []
    return [
        f"config.level_weights={options.level_weights} leaves out the highest of config.num_levels="
        f"{options.num_levels}, where samplers begin: the student does not learn what one step shows. () draws all."
    ]


def draw(key: jax.Array, batch: Batch, options: ConsistencyOptions) -> Draws:
    """The index of each clip's t_n, its noise, and a number for its guidance."""
    index_key, noise_key, guidance_key = jax.random.split(key, 3)
    clips = batch.latents.shape[:1]
    return {
        "index": _draw_index(index_key, clips, options),
        "noise": jax.random.normal(noise_key, batch.latents.shape),
        "uniform": jax.random.uniform(guidance_key, clips),
    }


def _draw_index(key: jax.Array, clips: tuple[int, ...], options: ConsistencyOptions) -> Int[Array, " b"]:
    """Of t_n on the grid t_1 .. t_N, counted from 0."""
    if not options.level_weights:
        return jax.random.randint(key, clips, 0, options.num_levels - options.solver_steps)
    levels, weights = (jnp.array(values) for values in zip(*options.level_weights, strict=True))
    return jax.random.choice(key, levels, clips, p=weights / weights.sum()) - options.solver_steps - 1


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
