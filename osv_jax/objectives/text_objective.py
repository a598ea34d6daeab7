"""What objectives on AnimateDiff have in common: networks, batches with texts, the teacher, and frames of clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from osv_jax.convert.text_to_video import video_unet
from osv_jax.diffusion.ddpm import DDPMBackbone, TextConditioning, animatediff_schedule, ddim, ddim_times
from osv_jax.diffusion.ode import Denoiser, guided_denoiser
from osv_jax.errors import UserError
from osv_jax.objectives.batches import TextBatch, text_batch_of_records
from osv_jax.objectives.networks import Params
from osv_jax.objectives.objective import Objective
from osv_jax.objectives.players import Student
from osv_jax.objectives.text_networks import COMPONENTS, TextNetworks, build_text_networks

# What the teacher is sampled with.
_TEACHER_GUIDANCE = 7.5


class TextObjective(Objective):
    """An objective whose player `student` is AnimateDiff's UNet or a part of it."""

    components = COMPONENTS
    vae = "image_vae"
    starts_from_image = False
    networks: TextNetworks

    @classmethod
    def check(cls, options: Any, num_frames: int) -> None:
        if not num_frames:
            raise UserError("config.data.num_frames=0: AnimateDiff has no number of its own; set it, for example 16.")

    @classmethod
    def make_networks(cls, architectures: Mapping[str, Any], **options: Any) -> TextNetworks:
        return build_text_networks(architectures, **options)

    def batch(self, frozen: Params, clips: Mapping[str, Array], key: jax.Array, data: ConfigDict) -> TextBatch:
        """Records with their texts; a video has none, and is given the empty prompt."""
        if "video" not in clips:
            return text_batch_of_records(clips)
        empty = self.networks.embed_empty(frozen["text_encoder"], len(clips["video"]))
        latents = self.networks.codec.encode_video(frozen["image_vae"], clips["video"])
        return TextBatch(latents, TextConditioning(empty, empty))

    def teacher(self, frozen: Params) -> Params:
        """The video teacher's parameters."""
        return video_unet(frozen["unet_2d"], frozen["motion_adapter"])

    def backbone(self, frozen: Params, student: Student | None, cond: TextConditioning) -> DDPMBackbone:
        teacher = self.teacher(frozen)
        variables = {"params": teacher} if student is None else student.variables(teacher)
        return DDPMBackbone(self.networks.unet_with(variables), cond, animatediff_schedule())

    def parameter_table(self, frozen: Params, student: Student) -> str:
        sizes = dict.fromkeys(("unet", "motion"), 0)
        for path, part in flatten_dict(student_parts(student).tuned).items():
            sizes[part] += flatten_dict(student.tuned)[path].size
        return "\n".join(f"  {part:<9} {size / 1e6:.3f} M of the student" for part, size in sizes.items())

    def teacher_denoiser(self, backbone: DDPMBackbone, num_frames: int) -> Denoiser:
        return guided_denoiser(backbone, jnp.full(num_frames, _TEACHER_GUIDANCE))

    def teacher_sample(
        self, denoiser: Denoiser, noise: Float[Array, "b f h w c"], steps: int
    ) -> Float[Array, "b f h w c"]:
        return ddim(denoiser, noise, ddim_times(steps), animatediff_schedule())


def student_parts(student: Student) -> Student:
    """The student's tree with `motion` in the place of parameters of motion modules, and `unet` in that of others."""
    paths = flatten_dict(student.tuned)
    parts = {path: "motion" if any(name.startswith("motion_modules_") for name in path) else "unet" for path in paths}
    return Student(lora=student.lora, tuned=unflatten_dict(parts))


def draw_frames(key: jax.Array, clips: int, frames: int, count: int) -> Int[Array, "b k"]:
    """The numbers of `count` different frames of each clip, in their order; any set of them is as probable."""
    order = jax.vmap(lambda own: jax.random.permutation(own, frames))(clip_keys(key, clips))
    return jnp.sort(order[:, :count], axis=1)


def clip_keys(key: jax.Array, clips: int) -> Any:
    """A key for each clip."""
    return jax.random.split(key, clips)


def take_frames(clips: Float[Array, "b f h w c"], numbers: Int[Array, "b k"]) -> Float[Array, "b k h w c"]:
    """x^K of AVDM2 section 4.2."""
    return jnp.take_along_axis(clips, numbers[:, :, None, None, None], axis=1)


def to_float32(params: Params) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
