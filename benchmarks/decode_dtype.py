"""What it costs to decode latents in half precision: docs/sampling.md quotes the result.

    python benchmarks/decode_dtype.py --weights=miniature --videos=miniature

Real clips are encoded; their latents are decoded in float32 and in each half. Of the frames, as the bytes that are
written to files, it prints the PSNR against float32's, what part of the bytes differs and by how much at most, and, to
compare, the PSNR of float32's against the real frames, which is what the VAE itself loses.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from osv_jax.convert import weights
from osv_jax.data import demo, pixels
from osv_jax.inference.programs import DECODE_DTYPES
from osv_jax.models.svd_vae import SVDVAE
from osv_jax.objectives.autoencoder import frame_psnr
from osv_jax.runtime.media import to_float, to_uint8
from osv_jax.runtime.precision import matmul_precision
from osv_jax.runtime.ranges import COUNT, FPS, NUM_FRAMES, PIXELS


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="miniature", help="a weights folder, or `miniature`")
    parser.add_argument("--videos", default="miniature", help="a folder of videos, `demo`, or `miniature`")
    parser.add_argument("--clips", type=COUNT, default=4, help="(default %(default)s)")
    parser.add_argument(
        "--num_frames", type=NUM_FRAMES, default=14, help="of a clip; this and all below: of a folder's"
    )
    parser.add_argument("--fps", type=FPS, default=12.0)
    parser.add_argument("--height", type=PIXELS, default=64)
    parser.add_argument("--width", type=PIXELS, default=96)
    args = parser.parse_args()
    if args.videos == demo.HELD_OUT:
        clips = demo.held_out_clips()[0][: args.clips]
    else:
        size = args.num_frames, args.fps, args.height, args.width
        clips = pixels.spread_clips(demo.video_folder(args.videos), args.clips, *size, shift=args.num_frames)
    decoded = decode_in_each(args.weights, clips)
    exact = decoded["float32"]
    shape = " x ".join(map(str, clips.shape[1:4]))
    print(f"{len(clips)} clips of {args.videos}, {shape}, VAE of {args.weights}")
    print(f"float32 against the real frames: {mean_psnr(exact, clips):.2f} dB\n")
    print("| decoded in | PSNR against float32 [dB] | bytes that differ | by at most |")
    print("|---|---|---|---|")
    for dtype, frames in decoded.items():
        if dtype != "float32":
            difference = np.abs(frames.astype(int) - exact)
            differing = f"{100 * (difference > 0).mean():.2f} %"
            print(f"| {dtype} | {mean_psnr(frames, exact):.2f} | {differing} | {difference.max()} |")


def decode_in_each(folder: str, clips: np.ndarray) -> dict[str, np.ndarray]:
    """What the latents of clips [n f h w 3] are decoded to, by the dtype that the decoder computes in."""
    config = weights.load_config(folder, "vae")
    params = weights.load_params(folder, "vae", dtype=jnp.float32)
    vae = SVDVAE(config)
    encode = jax.jit(lambda params, images: vae.apply({"params": params}, images, method="encode")[0])
    latents = [encode(params, to_float(clip))[None] for clip in clips]
    frames = {}
    for dtype in DECODE_DTYPES:
        module = vae.clone(dtype=jnp.dtype(dtype))
        decode = jax.jit(lambda params, x, module=module: module.apply({"params": params}, x, method="decode"))
        with matmul_precision(dtype):
            frames[dtype] = np.concatenate([to_uint8(np.asarray(decode(params, x), np.float32)) for x in latents])
    return frames


def mean_psnr(frames: np.ndarray, expected: np.ndarray) -> float:
    """The mean over all frames [dB]; frames that are equal have none, and are left out."""
    psnr = np.asarray(frame_psnr(to_float(frames), to_float(expected)))
    return float(psnr[np.isfinite(psnr)].mean())


if __name__ == "__main__":
    main()
