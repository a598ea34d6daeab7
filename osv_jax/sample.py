"""Makes videos of images: `python -m osv_jax.sample --image=cat.png --output=cat.mp4 --weights=weights/svd`.

An image of any size is scaled to cover the video's height and width and cropped at the centre; CLIP sees all of it.
--output is a name ending in .mp4 or .gif, or else a folder, which receives PNG pictures; {name} in it stands for the
image's name, and several images need it or a folder. All images share the compiled programs; each has noise of its own
from --seed. A video is written while the devices make the next one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import jax
import numpy as np
from jaxtyping import Array, UInt8

from osv_jax.codec import DECODERS
from osv_jax.data.image import EXTENSIONS, read_image
from osv_jax.diffusion.samplers import SAMPLERS
from osv_jax.errors import UserError
from osv_jax.inference.options import CompleteOptions, Options
from osv_jax.inference.pipeline import DECODE_DTYPES, DTYPES, PARTS, ImageToVideo
from osv_jax.runtime import arguments, command_line, ending, paths
from osv_jax.runtime.media import check_rate, write_pictures, write_video
from osv_jax.runtime.paths import Path, as_path
from osv_jax.runtime.ranges import SEED

__all__ = ["ImageToVideo", "Options", "main"]

# The number of an image, the frames made of it, and the seconds that each part took.
Made = tuple[int, UInt8[np.ndarray, "f h w 3"], dict[str, float]]

_VIDEO_SUFFIXES = (".mp4", ".gif")
_OTHER_SUFFIXES = (*EXTENSIONS, ".avi", ".mkv", ".mov", ".webm")


def main(given: list[str] | None = None) -> None:
    """Samples a video for every image.

    Raises:
        UserError: on anything the user can fix, before anything is compiled.
    """
    args = _parser().parse_args(given)
    chosen = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
    images = list_images(args.image)
    for path in images:
        read_image(path)
    outputs = plan_outputs(images, args.output)
    model = ImageToVideo.load(
        *(args.weights, args.lora, args.ema, args.dtype),
        context=args.context,
        decode_dtype=args.decode_dtype,
        decoder=args.decoder,
    )
    options = model.complete(chosen)
    check_rate(args.output, options.fps)
    if model.notice:
        print(model.notice)
    source = f"{args.weights} with {args.lora}" if args.lora else args.weights
    print(
        f"{source} on {jax.devices()[0].platform}: {options.num_frames} frames of {options.height} x {options.width},"
        f" {options.sampler}, {options.steps} step(s), {options.num_evaluations} network evaluations (NFE) a video"
    )
    if options.sampler != "euler" and not args.lora:
        print(
            "Without --lora this is SVD itself, which is not made for few steps: expect blur, or use --sampler=euler."
        )

    total = dict.fromkeys((*PARTS, "write"), 0.0)
    write: Callable[[Path, np.ndarray], None] = write_pictures
    if _is_video(args.output):
        write = functools.partial(write_video, fps=options.fps)
    for i, frames, spent in make_videos(model, images, args.seed, options):
        heading = _heading(i, images)
        _show(f"{heading}: write ...")
        writing = time.perf_counter()
        write(outputs[i], frames)
        spent["write"] = time.perf_counter() - writing
        total = {part: seconds + spent[part] for part, seconds in total.items()}
        _show("")
        print(f"{heading} -> {outputs[i]}: {sum(spent.values()):.2f} s ({_parts(spent)})", flush=True)
    if len(images) > 1:
        print(f"{len(images)} videos: {_parts(total)}")


def make_videos(model: ImageToVideo, images: list[Path], seed: int, options: CompleteOptions) -> Iterator[Made]:
    """Videos of images, in their order.

    The devices have the next image to work at before these frames are waited for, and while they are written.
    """
    finish: Callable[[], Made] | None = None
    for i, image in enumerate(images):
        model.seconds = dict.fromkeys(PARTS, 0.0)
        model.on_part = functools.partial(_show_part, _heading(i, images))
        noise = model.noise(jax.random.fold_in(jax.random.key(seed), i)[None], options)
        latents = model.sample(read_image(image)[None], noise, options)
        decoded = model.start_decoding(latents, options.decode_chunk_size)
        before, finish = finish, functools.partial(_finish, model, i, decoded, model.seconds, model.clock.last)
        if before:
            yield before()
    if finish:
        yield finish()


def _finish(
    model: ImageToVideo, i: int, decoded: list[Array], seconds: dict[str, float], timed: futures.Future[None]
) -> Made:
    frames = model.pixels(decoded)[0]
    timed.result()
    return i, frames, seconds


def _heading(i: int, images: list[Path]) -> str:
    return f"[{i + 1}/{len(images)}] {images[i].name}"


def list_images(names: list[str]) -> list[Path]:
    """The image files that `--image` names, those of folders sorted by name.

    Hidden files are left out of folders: macOS puts a `._cat.png`, which is no image, beside a cat.png.

    Raises:
        UserError: a folder without images, or that cannot be read.
    """
    images = []
    for path in map(as_path, names):
        try:
            files = list(path.iterdir()) if path.is_dir() else None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): choose another --image.") from error
        if files is None:
            images.append(path)
            continue
        found = sorted(
            file
            for file in files
            if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and not file.is_dir()
        )
        if not found:
            raise UserError(f"{path} holds no images: expected files ending in {', '.join(EXTENSIONS)}.")
        images += found
    return images


def _is_video(output: str) -> bool:
    """Whether `--output` names videos, and not folders for pictures."""
    return output.lower().endswith(_VIDEO_SUFFIXES)


def plan_outputs(images: list[Path], output: str) -> list[Path]:
    """What will be written for every image: a video's name, or a folder for pictures. Makes the folders around them.

    Raises:
        UserError: another kind of file, several images with one output, a place that cannot be written to, or where an
            image is.
    """
    is_video = _is_video(output)
    if output.lower().endswith(_OTHER_SUFFIXES):
        raise UserError(f"--output={output} is neither .mp4 nor .gif: choose one of these, or give a folder for PNGs.")
    if len(images) > 1 and "{name}" not in output:
        if is_video:
            raise UserError(
                f"--output={output} is one video, but there are {len(images)} images: write {{name}} in it, which"
                " stands for an image's name, or give a folder."
            )
        output = f"{output}/{{name}}"
    outputs = [as_path(output.replace("{name}", image.stem)) for image in images]
    if len(set(outputs)) < len(outputs):
        twice = next(path for path in outputs if outputs.count(path) > 1)
        raise UserError(f"Two images would be written to {twice}: rename one of them.")
    for path in outputs:
        if is_video:
            if not path.suffix:
                raise UserError(f"--output={path} has an ending but no name: choose a name for the video.")
            paths.check_folder(path.parent, "--output")
            paths.check_file(path, "--output")
            clashing = [image for image in images if paths.real(image) == paths.real(path)]
        else:
            paths.check_folder(path, "--output")
            for picture in path.glob("[0-9]*.png"):
                paths.check_file(picture, "--output")
            clashing = [image for image in images if paths.real(image.parent) == paths.real(path)]
        if clashing:
            raise UserError(f"--output={path} is where {clashing[0]} is: choose another output.")
    return outputs


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser("sample", __doc__)
    add = parser.add_argument
    add("--image", nargs="+", required=True, metavar="FILE", help="image files, or folders of them")
    add("--output", required=True, help="NAME.mp4, NAME.gif, or a folder for PNG pictures; {name}: the image's name")
    add("--weights", required=True, help="folder that osv_jax.convert_weights wrote, or `miniature`")
    add("--lora", metavar="PATH", help="workdir of a training run, PEFT folder or LoRA .safetensors, merged before use")
    add("--sampler", choices=SAMPLERS, default="tts", help="%(choices)s (default %(default)s)")
    add("--steps", type=int, help="steps of the sampler (default 1; euler: 25)")
    add("--motion_bucket_id", type=float, default=127, help="amount of motion, 1 to 255 (default %(default)s)")
    add("--noise_aug_strength", type=float, default=0.02, help="noise on the image (default %(default)s)")
    add("--min_guidance_scale", type=float, default=1.0, help="euler's, at the first frame (default %(default)s)")
    add("--max_guidance_scale", type=float, default=3.0, help="euler's, at the last frame (default %(default)s)")
    add(
        "--decode_chunk_size",
        type=int,
        default=7,
        help="frames decoded at a time; fewer take less memory (%(default)s)",
    )
    add("--decode_dtype", choices=DECODE_DTYPES, help="of the decoder (default: --dtype)")
    add("--decoder", choices=DECODERS, default="vae", help="the VAE's own, or TAESDV: fast and rough (%(default)s)")
    add_video_options(parser)
    return parser


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """What every program that makes videos with a student can be told."""
    add, own = parser.add_argument, "what it was trained at"
    add("--ema", action="store_true", help="of a workdir, use the student's EMA")
    add("--seed", type=SEED, default=0, help="of all noise, 0 to 2^32 - 1 (default %(default)s)")
    add("--fps", type=float, help=f"frames a second, 0.1 to 240, told to SVD and played (default: {own} here, or 7)")
    add("--height", type=int, metavar="PX", help=f"a multiple of 8 (default: {own} here, or 576)")
    add("--width", type=int, metavar="PX", help=f"a multiple of 8 (default: {own} here, or 1024)")
    add("--num_frames", type=int, help=f"(default: {own}, 14 for SVD and 25 for SVD-XT)")
    add("--dtype", choices=DTYPES, help="of the networks (default: float32 on a CPU, bfloat16 elsewhere)")
    add("--context", type=int, default=1, help="devices that share every video, by its height (default %(default)s)")


def _show_part(heading: str, part: str) -> None:
    _show(f"{heading}: {part} ...")


def _show(line: str) -> None:
    """One line that the next one replaces, for people who watch."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _parts(seconds: dict[str, float]) -> str:
    return ", ".join(f"{part} {value:.2f} s" for part, value in seconds.items() if value)


def run() -> None:
    """The program; for how it ends see `ending.exit_status`."""
    command_line.keep_compiled_programs()
    ending.run(main)


if __name__ == "__main__":
    run()
