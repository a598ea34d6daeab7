"""What both stages of OSV share: a discriminator that sees latents, upsampled, through DINOv2."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from osv_jax.errors import UserError
from osv_jax.models.dinov2 import EMBEDDING
from osv_jax.objectives.adversarial import Adversarial, AdversarialOptions
from osv_jax.objectives.judges import FramesJudge, Judge, LatentJudge, PixelJudge
from osv_jax.objectives.options import setting
from osv_jax.runtime.ranges import WHOLE, Range

# Of DINOv2, counted from 0, or its embedding.
BLOCK = Range(EMBEDDING, whole=True)
PATCH_READS = ("patches", "sum")


@dataclasses.dataclass(frozen=True)
class OSVOptions(AdversarialOptions):
    """The options that the stages share; the defaults are the paper's.

    Attributes:
        discriminator_blocks: blocks of DINOv2 whose features the discriminator sees, counted from 0; -1: the embedded
            patches, as StyleGAN-T's fifth head does.
        discriminator_read: see `Dinov2`; `sum` adds the class token to every patch, as StyleGAN-T does.
        discriminator_input: `latents`, or `decoded` by the VAE (Table 2e).
        discriminator_frames: how many consecutive frames of each clip the discriminator sees, to save memory, starting
            at a random one in every step; 0: all of them, as in the paper.
    """

    discriminator_blocks: tuple[int, ...] = setting((2, 5, 8, 11), BLOCK)
    discriminator_read: str = setting("patches", PATCH_READS)
    discriminator_input: str = setting("latents", ("latents", "decoded"))
    discriminator_frames: int = setting(0, WHOLE)


class OSV(Adversarial):
    """A stage of OSV."""

    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "image_encoder", "dinov2")

    @classmethod
    def check(cls, options: OSVOptions, num_frames: int) -> None:
        if num_frames and options.discriminator_frames > num_frames:
            raise UserError(
                f"config.discriminator_frames={options.discriminator_frames} must lie in 1 .. {num_frames}"
                " (config.data.num_frames), or be 0 for all frames."
            )
        check_blocks(options.discriminator_blocks)

    def make_judge(self) -> Judge:
        networks, options = self.networks, self.options
        discriminator = networks.discriminator.clone(read=options.discriminator_read)
        judge: Judge = LatentJudge(discriminator, networks.dinov2)
        if options.discriminator_input == "decoded":
            judge = PixelJudge(discriminator, networks.dinov2, networks.codec)
        return FramesJudge(judge, options.discriminator_frames) if options.discriminator_frames else judge


def check_blocks(blocks: tuple[int, ...]) -> None:
    """Raises UserError unless these are one block or more, each once."""
    if not blocks or len(set(blocks)) < len(blocks):
        raise UserError(f"config.discriminator_blocks={blocks} must name one block of DINOv2 or more, each once.")
