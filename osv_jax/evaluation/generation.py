"""Makes clips by every method of a plan, measures them, and keeps what the table needs; what is there stays."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from osv_jax.evaluation import measures
from osv_jax.evaluation.clip_score import CLIPScore
from osv_jax.evaluation.features import clip_features, settings
from osv_jax.evaluation.networks import FeatureNetwork, load_network
from osv_jax.evaluation.parts import Part, load_part, save_part
from osv_jax.evaluation.planning import Method, Plan
from osv_jax.evaluation.stamps import as_text
from osv_jax.inference.programs import Pipeline
from osv_jax.models.lpips import load_lpips
from osv_jax.runtime.paths import Path


def generate(plan: Plan) -> None:
    """Makes and measures what is missing.

    Raises:
        UserError: a video that cannot be read any more, weights that cannot be read, values that are not finite.
    """
    work = list(_missing(plan))
    tools = _Tools(plan)
    with tqdm(total=sum(len(item.numbers) for item in work), unit="clip", file=sys.stderr, disable=not work) as bar:
        for key, items in itertools.groupby(work, lambda item: item.model):
            model = None  # Before the next is loaded: one UNet is in memory at a time.
            if key is not None:
                lora, ema = key
                model = plan.kind.load(plan.options, lora, ema, plan.data)
            for item in items:
                bar.set_description(item.method.name if item.method else "real")
                save_part(item.file, _make(plan, item, model, tools))
                bar.update(len(item.numbers))


@dataclasses.dataclass(frozen=True)
class _Item:
    """A file to be made: real clips, or those of a method; and the LoRA and EMA of the model that this takes."""

    method: Method | None
    numbers: list[int]
    file: Path
    model: tuple[str | None, bool] | None


def _missing(plan: Plan) -> Iterator[_Item]:
    """Real clips first, whose first frames the others need, then the target, whose latents the others need."""
    target, others = plan.target, [method for method in plan.methods if method is not plan.target]
    for method in (None, target, *others):
        # Real clips take a model only where a VAE decodes them; the target's, which comes next.
        user = method or (target if plan.clips.encoded else None)
        for numbers in plan.batches():
            file = plan.file(method, numbers)
            if load_part(file) is None:
                yield _Item(method, numbers, file, (user.lora, user.ema) if user else None)


class _Tools:
    """What measures, loaded when it is first needed."""

    def __init__(self, plan: Plan):
        self._plan = plan

    @functools.cached_property
    def network(self) -> FeatureNetwork:
        assert self._plan.protocol is not None
        return load_network(self._plan.options.fvd_weights, self._plan.protocol.network, self._plan.fvd_frames)

    @functools.cached_property
    def clip_score(self) -> CLIPScore:
        return CLIPScore(self._plan.options.clip_weights)

    @functools.cached_property
    def lpips(self) -> dict[str, Any]:
        return load_lpips()


def _make(plan: Plan, item: _Item, model: Pipeline | None, tools: _Tools) -> Part:
    numbers, method = item.numbers, item.method
    shown = sum(number < plan.options.films for number in numbers)
    of_prompts = plan.kind.of_prompts
    if method is None:
        chunk = plan.video.decode_chunk_size
        # One clip of a dataset at a time is copied to all devices, of which one would do.
        decode = functools.partial(_decode, model, plan.data, chunk) if model else None
        frames = plan.clips.read(numbers, decode)
        sources = _prompts(plan, numbers) if of_prompts else frames[:, 0]
        part = _measure(plan, frames, sources, tools) | {"shown": frames[:shown]}
        return part | ({} if of_prompts else {"first": sources})
    assert model is not None, "a method has one"
    sources = _prompts(plan, numbers) if of_prompts else _needed(plan, None, numbers, "first")
    latents, frames, seconds = _sample(plan, model, method, sources, numbers)
    target = latents if method is plan.target else _needed(plan, plan.target, numbers, "latents")
    part = _measure(plan, frames, sources, tools) | {"shown": frames[:shown], "seconds": seconds}
    if not of_prompts:
        part["first_frame_psnr"] = measures.first_frame_psnr(frames, sources)
    part["mse"] = ((latents - target) ** 2).mean(axis=(1, 2, 3, 4))
    return part | ({"latents": latents} if method is plan.target else {})


def _needed(plan: Plan, method: Method | None, numbers: list[int], name: str) -> np.ndarray:
    part = load_part(plan.file(method, numbers), name)
    assert part, "made before what needs it"
    return part[name]


def _prompts(plan: Plan, numbers: Sequence[int]) -> np.ndarray:
    return np.array(plan.prompts_of(numbers), object)


def _sample(
    plan: Plan, model: Pipeline, method: Method, sources: np.ndarray, numbers: Sequence[int]
) -> tuple[Float[np.ndarray, "n f latent_h latent_w c"], UInt8[np.ndarray, "n f h w 3"], Float[np.ndarray, " n"]]:
    """Latents, frames, and the seconds that the networks took for a clip, without compiling.

    A clip's noise depends on the seed and its number alone, so that it is the same for all methods, and on any number
    of devices.

    Args:
        sources: first frames [n h w 3], or n prompts.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(plan.options.seed), np.array(numbers))
    latents, frames, seconds = [], [], []
    for start in range(0, len(numbers), plan.batch_size):
        chosen = np.arange(start, start + plan.batch_size).clip(max=len(numbers) - 1)  # The last fills the batch.
        count = min(plan.batch_size, len(numbers) - start)
        before = _running_seconds(model)
        made = plan.kind.sample(model, sources[chosen], keys[chosen], method.video)
        frames.append(model.frames(made, method.video.decode_chunk_size)[:count])
        latents.append(np.asarray(made)[:count])
        seconds += [(_running_seconds(model) - before) / plan.batch_size] * count
    return np.concatenate(latents), np.concatenate(frames), np.array(seconds)


def _running_seconds(model: Pipeline) -> float:
    model.wait()
    return sum(seconds for part, seconds in model.seconds.items() if part != "compile")


def _decode(
    model: Pipeline, copies: int, chunk_size: int, latents: Float[Array, "1 f latent_h latent_w c"]
) -> UInt8[np.ndarray, "1 f h w 3"]:
    return model.frames(np.repeat(latents, copies, axis=0), chunk_size)[:1]


def _measure(plan: Plan, frames: UInt8[np.ndarray, "n f h w 3"], sources: np.ndarray, tools: _Tools) -> Part:
    """What is measured of real clips and of others alike; `sources` as for `_sample`."""
    part = {"motion": measures.motion(frames), "flicker": measures.flicker(frames)}
    if plan.options.lpips:
        part["lpips"] = measures.lpips_to_condition(tools.lpips, frames, sources)
    if plan.options.clip_weights:
        scores = [tools.clip_score(*pair) for pair in zip(frames, sources, strict=True)]
        part["clip_score"] = np.array(scores)
    if plan.protocol is not None:
        part["features"] = clip_features(frames, plan.protocol, tools.network)
        part["made_with"] = np.array(as_text(settings(plan.protocol, tools.network)))
    return part
