"""The README.md of what is exported, which hubs show: where the weights come from, and the lines that load them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

SCHEDULER = pathlib.Path(__file__).with_name("time_travel_scheduler.py")
CONFIG = "training_config.json"

_HEADER = """---
license: other
license_name: that-of-the-base-model
pipeline_tag: {task}
library_name: diffusers
tags:
  - {tag}
  - osv_jax
---
"""

# The lines that make diffusers' UNet of each format: `svd` is a local SVD folder, or its name on the hub.
_UNET_LINES = {
    "peft": """from diffusers import UNetSpatioTemporalConditionModel
from peft import PeftModel

unet = UNetSpatioTemporalConditionModel.from_pretrained("svd", subfolder="unet")
unet = PeftModel.from_pretrained(unet, "{folder}").merge_and_unload()""",
    "diffusers": """from diffusers import UNetSpatioTemporalConditionModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

# SVD's pipeline has no load_lora_weights, so PEFT puts the LoRA in place; alpha is the rank.
unet = UNetSpatioTemporalConditionModel.from_pretrained("svd", subfolder="unet")
lora = load_file("{folder}/pytorch_lora_weights.safetensors")
lora = {{name.removeprefix("unet."): tensor for name, tensor in lora.items()}}
modules = sorted({{name.rsplit(".lora_", 1)[0] for name in lora}})
rank = len(lora[f"{{modules[0]}}.lora_A.weight"])
inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), unet)
set_peft_model_state_dict(unet, lora)""",
    "unet": """from diffusers import UNetSpatioTemporalConditionModel

unet = UNetSpatioTemporalConditionModel.from_pretrained("{folder}")""",
}
_SAVED = 'frames[0].save("cat.gif", save_all=True, append_images=frames[1:], duration=1000 / {fps:g}, loop=0)'
_PIPELINE_LINES = """import sys

from diffusers import StableVideoDiffusionPipeline
from diffusers.utils import load_image

sys.path.append("{folder}")
from time_travel_scheduler import TimeTravelScheduler

pipe = StableVideoDiffusionPipeline.from_pretrained("svd", unet=unet)
pipe.scheduler = TimeTravelScheduler(boundary="{boundary}", num_levels={num_levels})
frames = pipe(load_image("cat.png"), num_inference_steps=1, max_guidance_scale=1.0, {video}).frames[0]"""
_TEACHER_LINES = """from diffusers import StableVideoDiffusionPipeline
from diffusers.utils import load_image

pipe = StableVideoDiffusionPipeline.from_pretrained("svd", unet=unet)
frames = pipe(load_image("cat.png"), {video}).frames[0]"""
_OTHERS = {
    "kohya": "`{file}` has the keys of kohya's scripts, made of diffusers' names of the modules.",
    "comfyui": "`{file}` goes into ComfyUI's `models/loras`; `LoraLoaderModelOnly` puts it on SVD.",
    "single-file": "`{file}` goes into ComfyUI's `models/checkpoints`; `ImageOnlyCheckpointLoader` loads it.",
}
_COMFYUI = "A student is sampled there with `cfg` 1: `euler` in one step, or `lcm` in several."

# The lines that make diffusers' AnimateDiff of each format: `sd15` is a local Stable Diffusion 1.5 folder, or its name.
_PROMPT_LINES = {
    "peft": """from diffusers import AnimateDiffPipeline, MotionAdapter
from peft import PeftModel

adapter = MotionAdapter.from_pretrained("motion")
pipe = AnimateDiffPipeline.from_pretrained("sd15", motion_adapter=adapter)
pipe.unet = PeftModel.from_pretrained(pipe.unet, "{folder}").merge_and_unload()""",
    "unet": """from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("{folder}/unet")
adapter = MotionAdapter.from_pretrained("{folder}/motion_adapter")
pipe = AnimateDiffPipeline.from_pretrained("sd15", unet=unet, motion_adapter=adapter)""",
}
# With as many original steps, this scheduler predicts at 999, 749, 499 and 249, and adds fresh noise in between.
_PROMPT_STUDENT_LINES = """from diffusers import LCMScheduler

pipe.scheduler = LCMScheduler(beta_schedule="linear", original_inference_steps=4)
frames = pipe("a cat on a car", num_inference_steps=4, guidance_scale=1.0, {video}).frames[0]"""
_PROMPT_TEACHER_LINES = """from diffusers import DDIMScheduler

pipe.scheduler = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False
)
frames = pipe("a cat on a car", num_inference_steps=25, {video}).frames[0]"""
_PROMPT_OTHERS = {
    "diffusers": "`pytorch_lora_weights.safetensors` names the modules of diffusers' `UNetMotionModel`.",
    "kohya": "`{file}` has the keys of kohya's scripts, made of the modules' names in diffusers' `UNetMotionModel`.",
}


class _Base(NamedTuple):
    task: str
    tag: str
    name: str
    licence: str


_SVD = _Base(
    "image-to-video",
    "stable-video-diffusion",
    "Stable Video Diffusion (image to video)",
    "Stability AI's for Stable Video Diffusion",
)
_ANIMATEDIFF = _Base(
    "text-to-video",
    "animatediff",
    "AnimateDiff (text to video)",
    "that of Stable Diffusion and that of the motion adapter",
)


@dataclasses.dataclass(frozen=True)
class Card:
    """What is known of exported weights.

    Attributes:
        name: of the export, its heading.
        config: the run's configuration; empty sections stay out.
        step: optimizer steps.
        ema: whether it is the EMA.
        video: `height`, `width`, `num_frames` and `fps` of the run's clips, as far as they are known.
        note: what else is to be said, a sentence or nothing.
        of_prompts: whether they are AnimateDiff's, and not SVD's.
    """

    name: str
    config: Mapping[str, Any]
    step: int
    ema: bool
    video: Mapping[str, Any]
    note: str = ""
    of_prompts: bool = False

    def write(self, folder: pathlib.Path, kind: str, file: str = "") -> None:
        """Writes README.md, the run's configuration, and where diffusers loads the weights the scheduler for them.

        Args:
            folder: of the weights.
            kind: their format, of `exporters.FORMATS`.
            file: that holds them, where that has no name of its own.
        """
        (folder / "README.md").write_text(self._text(kind, file))
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        if kind in _UNET_LINES and self._is_student and not self.of_prompts:
            shutil.copyfile(SCHEDULER, folder / SCHEDULER.name)

    @property
    def _is_student(self) -> bool:
        """Of few steps: who is one has a grid of noise levels, or takes turns with other players."""
        return "num_levels" in self.config or "student_every" in self.config

    def _text(self, kind: str, file: str) -> str:
        which = "the EMA of its student" if self.ema else "its student"
        base = _ANIMATEDIFF if self.of_prompts else _SVD
        parts = [
            f"{_HEADER.format(task=base.task, tag=base.tag)}\n# {self.name}",
            f"Trained from {base.name} with osv_jax: {which} after {self.step:,} steps of a"
            f" run of the objective `{self.config.get('objective')}`. {self.note}".rstrip(),
            "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in self._facts().items()),
            f"`{CONFIG}` has all settings of the run.",
            *(self._use_of_prompts(kind, file) if self.of_prompts else self._use(kind, file)),
            "## Licence\n\nThese weights derive from those of the base model, whose licence holds for them, too:"
            f" {base.licence}. What the clips of the training data may be used for, their source says.",
        ]
        return "\n\n".join(parts) + "\n"

    def _facts(self) -> dict[str, Any]:
        config, data = self.config, self.config.get("data", {})
        clips = " x ".join(str(self.video[name]) for name in ("num_frames", "height", "width") if name in self.video)
        lora, optimizer = config.get("lora", {}), config.get("optimizer", {})
        trained = ", ".join(config.get("trainable", ("lora",)))
        if lora and "lora" in config.get("trainable", ("lora",)):
            trained += f" (rank {lora.get('rank')}, alpha {lora.get('alpha'):g}, {lora.get('targets')} layers)"
        found = {
            "base": config.get("weights"),
            "data": data.get("dataset") or data.get("videos"),
            "clips (frames x height x width)": clips,
            "frames a second": self.video.get("fps"),
            "trained": trained,
            "steps": self.step,
            "batch size": config.get("batch_size"),
            "learning rate": optimizer.get("learning_rate"),
        }
        return {name: value for name, value in found.items() if value}

    def _use(self, kind: str, file: str) -> list[str]:
        if kind not in _UNET_LINES:
            told = _OTHERS[kind].format(file=file)
            return [f"## Use\n\n{told} {_COMFYUI if self._is_student and kind != 'kohya' else ''}".rstrip()]
        values = self._values(("height", "width", "num_frames", "fps"), 7) | {
            "boundary": self.config.get("boundary", "svd"),
            "num_levels": self.config.get("num_levels", 100),
        }
        pipeline = (_PIPELINE_LINES if self._is_student else _TEACHER_LINES).format(**values)
        how = (
            "One step of the Time Travel Sampler, two evaluations of the UNet, without guidance"
            if self._is_student
            else "SVD's own sampler, with guidance"
        )
        return [
            "## Use\n\n`svd` is a local folder of SVD, or `stabilityai/stable-video-diffusion-img2vid`;"
            f" `{self.name}` is this folder.",
            f"```python\n{_UNET_LINES[kind].format(**values)}\n```",
            f"{how}:",
            f"```python\n{pipeline}\n{_SAVED.format(**values)}\n```",
        ]

    def _use_of_prompts(self, kind: str, file: str) -> list[str]:
        if kind not in _PROMPT_LINES:
            return [f"## Use\n\n{_PROMPT_OTHERS[kind].format(file=file)}"]
        values = self._values(("height", "width", "num_frames"), 8)
        lines, how = (
            (_PROMPT_STUDENT_LINES, "Four steps, as many evaluations of the UNet, without guidance")
            if self._is_student
            else (_PROMPT_TEACHER_LINES, "AnimateDiff's own sampler, with guidance")
        )
        return [
            "## Use\n\n`sd15` is a local folder of Stable Diffusion 1.5, or"
            " `stable-diffusion-v1-5/stable-diffusion-v1-5`"
            + ("; `motion` of the motion adapter" if kind == "peft" else "")
            + f"; `{self.name}` is this folder.",
            f"```python\n{_PROMPT_LINES[kind].format(**values)}\n```",
            f"{how}:",
            f"```python\n{lines.format(**values)}\n{_SAVED.format(**values)}\n```",
        ]

    def _values(self, sizes: tuple[str, ...], fps: float) -> dict[str, Any]:
        """What the lines of Python are filled with; `fps` where that of the clips is not known."""
        video = ", ".join(f"{key}={round(self.video[key])}" for key in sizes if key in self.video)
        return {"folder": self.name, "video": video, "fps": self.video.get("fps", fps)}
