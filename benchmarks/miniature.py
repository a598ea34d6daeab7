"""What a small SVD is worth, measured on clips it has never seen: docs/miniature.md quotes the result.

    python benchmarks/miniature.py miniature runs/miniature/film/test OUTPUT

Of the VAE: PSNR of reconstructions. Of the UNet: the loss of denoising by bands of noise levels, at the same draws in
every run, and samples of 25 Euler steps with guidance 1 to 3 over the frames: the PSNR of their first frame against the
picture they begin with, and how much their frames differ from one another compared with the real clips'. OUTPUT
receives measured.json, reconstructions.png and teacher.png.
"""

from __future__ import annotations

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from PIL import Image

from osv_jax.convert import weights
from osv_jax.data import pixels
from osv_jax.evaluation.measures import motion
from osv_jax.inference.options import Options
from osv_jax.inference.pipeline import COMPONENTS, ImageToVideo
from osv_jax.models.svd_vae import SVDVAE
from osv_jax.objectives import finetune
from osv_jax.objectives.autoencoder import frame_psnr
from osv_jax.objectives.batches import encode_batch
from osv_jax.objectives.networks import build_networks
from osv_jax.runtime.finite import strict_json
from osv_jax.runtime.media import sample_grid, to_float, to_uint8
from osv_jax.runtime.ranges import COUNT, FPS, PIXELS, WHOLE

# Frames from clip to clip, what moves, and draws of noise for each.
_SHIFT, _MIN_MOTION, _DRAWS = 3, 0.3, 8
_DRAWN_CLIPS = 3


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="a weights folder, or `miniature`")
    parser.add_argument("videos", type=pathlib.Path, help="folder of videos that were not trained on")
    parser.add_argument("output", type=pathlib.Path, help="folder to write to")
    parser.add_argument("--clips", type=COUNT, default=64, help="clips (default %(default)s)")
    parser.add_argument("--samples", type=WHOLE, default=16, help="of which are sampled, or 0 (default %(default)s)")
    parser.add_argument("--fps", type=FPS, default=12.0)
    parser.add_argument("--height", type=PIXELS, default=64)
    parser.add_argument("--width", type=PIXELS, default=96)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    size = (14, args.fps, args.height, args.width)
    clips = pixels.spread_clips(args.videos, args.clips, *size, shift=_SHIFT, min_motion=_MIN_MOTION)
    print(f"{len(clips)} clips of {args.videos}", flush=True)

    measured = {"clips": len(clips), **reconstruct(args.weights, clips, args.output / "reconstructions.png")}
    print(measured, flush=True)
    measured |= denoising_losses(args.weights, clips, args.fps)
    print(measured, flush=True)
    if args.samples:
        chosen = clips[np.linspace(0, len(clips) - 1, args.samples).round().astype(int)]
        measured |= sample(args.weights, chosen, args.fps, args.output / "teacher.png")
        print(measured, flush=True)
    (args.output / "measured.json").write_text(strict_json(measured, indent=2) + "\n")


def reconstruct(folder: str, clips: np.ndarray, picture: pathlib.Path) -> dict[str, float]:
    """The mean PSNR [dB] over all frames; whole clips are decoded."""
    vae, params = SVDVAE(weights.load_config(folder, "vae")), weights.load_params(folder, "vae", dtype=jnp.float32)
    apply = jax.jit(lambda params, x: vae.apply({"params": params}, x))
    outputs = np.concatenate([apply(params, to_float(clip)[None]) for clip in clips])
    rows = np.linspace(0, len(clips) - 1, 7).round().astype(int)
    grid = {"originals": clips[rows, 7], "reconstructions": to_uint8(outputs[rows, 7])}
    Image.fromarray(sample_grid(grid)).save(picture)
    psnr = frame_psnr(outputs, to_float(clips))
    return {
        "vae_psnr": float(psnr.mean()),
        "vae_motion": float(motion(to_uint8(outputs)).mean()),
        "real_motion": float(motion(clips).mean()),
    }


def denoising_losses(folder: str, clips: np.ndarray, fps: float) -> dict[str, float]:
    """The weighted loss of `finetune` without dropout, by bands of sigma drawn as in training, and over all."""
    networks = build_networks({name: weights.load_config(folder, name) for name in COMPONENTS})
    frozen = {name: weights.load_params(folder, name, dtype=jnp.float32) for name in COMPONENTS}
    options = finetune.FinetuneOptions(dropout=finetune.DropoutOptions(0.0, 0.0, 0.0))

    @jax.jit
    def losses(frozen: dict, clip: Array, key: jax.Array) -> tuple[Array, Array]:
        encode_key, draw_key = jax.random.split(key)
        batch = encode_batch(networks.codec, frozen, clip[None], jnp.array([fps]), encode_key)
        network = networks.unet_with({"params": frozen["unet"]})

        def loss(key: jax.Array) -> tuple[Array, Array]:
            return finetune.denoising_loss(network, batch, finetune.draw(key, batch), options)

        return jax.lax.map(loss, jax.random.split(draw_key, _DRAWS))

    pairs = [losses(frozen, clip, jax.random.key(number)) for number, clip in enumerate(clips)]
    loss, sigma = (jnp.concatenate([pair[i].ravel() for pair in pairs]) for i in range(2))
    bands = finetune.band_means(finetune.band_sums(loss, sigma))
    return {"loss": float(loss.mean())} | {name: float(value) for name, value in bands.items()}


def sample(folder: str, clips: np.ndarray, fps: float, picture: pathlib.Path) -> dict[str, float]:
    """Samples of the teacher that begin as the clips do."""
    model = ImageToVideo.load(folder)
    height, width = clips.shape[2:4]
    options = model.complete(Options(sampler="euler", fps=fps, height=height, width=width, num_frames=clips.shape[1]))
    decoded = []
    for number, clip in enumerate(clips):
        noise = model.noise(jax.random.fold_in(jax.random.key(0), number)[None], options)
        decoded.append(model.decode(model.sample(clip[:1], noise, options), clips.shape[1])[0])
    model.wait()
    outputs = np.stack(decoded).clip(-1, 1)
    rows: dict[str, np.ndarray] = {}
    for i in np.linspace(0, len(clips) - 1, _DRAWN_CLIPS).round().astype(int):
        rows |= {f"real clip {i}": clips[i], f"teacher, {options.steps} steps, {i}": to_uint8(outputs[i])}
    Image.fromarray(sample_grid(rows)).save(picture)
    first = frame_psnr(outputs[:, :1], to_float(clips[:, :1]))
    return {
        "samples": len(clips),
        "first_frame_psnr": float(first.mean()),
        "sampled_motion": float(motion(to_uint8(outputs)).mean()),
        "sampled_real_motion": float(motion(clips).mean()),
        "unet_seconds": model.seconds["UNet"] / len(clips),
    }


if __name__ == "__main__":
    main()
