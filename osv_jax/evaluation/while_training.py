"""What a run measures of its student every `config.eval_every` steps, on clips that are not trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from osv_jax.convert import weights
from osv_jax.errors import UserError
from osv_jax.evaluation.features import Features, clip_features, settings
from osv_jax.evaluation.fvd import fvd
from osv_jax.evaluation.measures import motion
from osv_jax.evaluation.networks import FeatureNetwork, check_frames, load_network
from osv_jax.evaluation.protocols import PROTOCOLS, Protocol
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Objective
from osv_jax.objectives.players import TrainState
from osv_jax.runtime.paths import Path
from osv_jax.training.clips import HeldOutClips, held_out_clips
from osv_jax.training.config import Phase, phases_of
from osv_jax.training.loop import Evaluation
from osv_jax.training.sampling import Sampler


def plan_evaluation(
    config: ConfigDict, objective: Objective, workdir: Path, devices: jax.sharding.Mesh
) -> Callable[[Phase], Evaluation]:
    """What measures in each phase of a run; see `config.evaluation` for what is measured of which clips.

    Its metrics are `eval_mse`, of latents to the teacher's from the same noise; `eval_motion`, see `measures.motion`;
    and with FVD's weights `eval_fvd`, `eval_fvd_low` and `eval_fvd_high`. Clips, conditions and noise are the same
    at every step, and depend on the seed and the batch size alone.

    Raises:
        UserError: clips or weights that are missing, or do not fit.
    """
    options = config.evaluation
    if options.protocol not in PROTOCOLS:
        raise UserError(f"config.evaluation.protocol={options.protocol!r} is not one of {', '.join(PROTOCOLS)}.")
    protocol, scorer = PROTOCOLS[options.protocol], None
    if options.fvd_weights:
        num_frames = min(protocol.num_frames, config.data.num_frames)
        check_frames(weights.load_config(options.fvd_weights, protocol.network), num_frames)
        scorer = _Scorer(protocol, options, num_frames, config.seed)
    clips = {phase: held_out_clips(config, objective.networks, workdir, phase) for phase in phases_of(config)}
    sampler = Sampler(config, objective, devices)

    def make(phase: Phase) -> Evaluation:
        # Made at the first evaluation: a run may be stopped before.
        prepared: list[_Prepared] = []

        def evaluate(state: TrainState, frozen: Params) -> Mapping[str, float]:
            if not prepared:
                prepared.extend(_prepare(config, sampler, clips[phase], frozen, scorer))
            return _measure(sampler, prepared, state, frozen, scorer)

        return evaluate

    return make


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A batch of which the first `count` clips count: condition, noise, the teacher's latents, FVD's real features."""

    count: int
    cond: Any
    noise: Any
    target: Float[np.ndarray, "n f h w c"]
    real: Float[np.ndarray, "n features"] | None


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """FVD of frames; its network is loaded when it is first needed."""

    protocol: Protocol
    options: ConfigDict
    num_frames: int
    seed: int

    @functools.cached_property
    def network(self) -> FeatureNetwork:
        return load_network(self.options.fvd_weights, self.protocol.network, self.num_frames)

    def features(self, frames: UInt8[np.ndarray, "n f h w 3"]) -> Float[np.ndarray, "n c"]:
        return clip_features(frames, self.protocol, self.network)

    def score(self, real_vectors: list[np.ndarray], fake_vectors: list[np.ndarray]) -> dict[str, float]:
        made_with = settings(self.protocol, self.network)
        real, fake = (Features(np.concatenate(part), {}, [], made_with) for part in (real_vectors, fake_vectors))
        score = fvd(real, fake, self.protocol, self.options.bootstrap, self.seed)
        return {name: value for name, value in score.as_row("eval_fvd").items() if value is not None}


def _prepare(
    config: ConfigDict, sampler: Sampler, clips: HeldOutClips, frozen: Params, scorer: _Scorer | None
) -> Iterator[_Prepared]:
    size = config.batch_size
    for number, start in enumerate(range(0, len(clips.chosen), size)):
        count = min(size, len(clips.chosen) - start)
        # The last clip fills the batch, which devices must be able to split.
        batch = clips.batch([min(start + i, len(clips.chosen) - 1) for i in range(size)])
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), number))
        cond, noise = sampler.encode(frozen, batch, *keys)
        target = np.asarray(sampler.teacher(frozen, cond, noise, config.evaluation.teacher_steps))[:count]
        real = None
        if scorer:
            latents = batch.get("latents")
            frames = batch["video"] if latents is None else sampler.frames(frozen, jnp.asarray(latents, jnp.float32))
            real = scorer.features(frames[:count])
        yield _Prepared(count, cond, noise, target, real)


def _measure(
    sampler: Sampler, prepared: list[_Prepared], state: TrainState, frozen: Params, scorer: _Scorer | None
) -> dict[str, float]:
    errors, motions, fake = [], [], []
    for item in prepared:
        latents = sampler.student(state.players["student"].params, frozen, item.cond, item.noise)
        frames = sampler.frames(frozen, latents)[: item.count]
        errors.append(((np.asarray(latents)[: item.count] - item.target) ** 2).mean(axis=(1, 2, 3, 4)))
        motions.append(motion(frames))
        if scorer:
            fake.append(scorer.features(frames))
    means = {"eval_mse": errors, "eval_motion": motions}
    measured = {name: float(np.concatenate(values).mean()) for name, values in means.items()}
    real = [item.real for item in prepared if item.real is not None]
    return measured | (scorer.score(real, fake) if scorer else {})
