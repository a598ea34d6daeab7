"""Makes videos of images, or of prompts.

    python -m osv_jax.sample --image=cat.png --output=cat.mp4 --weights=weights/svd
    python -m osv_jax.sample --prompt="a cat on a car" --output=cat.mp4 --weights=weights/animatediff

An image of any size is scaled to cover the video's height and width and cropped at the centre; CLIP sees all of it.
--output is a name ending in .mp4 or .gif, or else a folder, which receives PNG pictures; {name} in it stands for the
image's name, or the prompt's number and first words, and several of them need it or a folder. All share the compiled
programs; each has noise of its own from --seed. A video is written while the devices make the next one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, UInt8

from osv_jax.codec import DECODERS
from osv_jax.data.image import EXTENSIONS, read_image
from osv_jax.diffusion.samplers import SAMPLERS
from osv_jax.errors import UserError
from osv_jax.inference import pipeline, prompts, text_to_video
from osv_jax.inference.options import CompleteOptions, Options
from osv_jax.inference.pipeline import ImageToVideo
from osv_jax.inference.programs import DECODE_DTYPES, DTYPES, Pipeline, video_key
from osv_jax.inference.text_options import TEXT_SAMPLERS, TextOptions
from osv_jax.inference.text_to_video import TextToVideo
from osv_jax.runtime import arguments, command_line, ending, paths
from osv_jax.runtime.media import check_rate, write_pictures, write_video
from osv_jax.runtime.paths import Path, as_path
from osv_jax.runtime.ranges import SEED

__all__ = ["ImageToVideo", "Options", "main"]

# The number of an image or a prompt, the frames made of it, and the seconds that each part took.
Made = tuple[int, UInt8[np.ndarray, "f h w 3"], dict[str, float]]

OptionsT = TypeVar("OptionsT", Options, TextOptions)

_VIDEO_SUFFIXES = (".mp4", ".gif")
_OTHER_SUFFIXES = (*EXTENSIONS, ".avi", ".mkv", ".mov", ".webm")
_IMAGES_OWN = ("motion_bucket_id", "noise_aug_strength", "min_guidance_scale", "max_guidance_scale", "decoder")
_PROMPTS_OWN = ("negative_prompt", "guidance_scale")


def main(given: list[str] | None = None) -> None:
    """Samples a video for every image, or for every prompt.

    Raises:
        UserError: on anything the user can fix, before anything is compiled.
    """
    args = _parser().parse_args(given)
    kinds = [name for name in ("image", "prompt", "prompts") if getattr(args, name) is not None]
    if len(kinds) != 1:
        raise UserError("Give one of --image, --prompt and --prompts (a file with one on each line); see --help.")
    for name in _PROMPTS_OWN if kinds == ["image"] else _IMAGES_OWN:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} has no meaning for --{kinds[0]}: leave it out.")
    if kinds == ["image"]:
        _sample_images(args)
    else:
        _sample_prompts(args, prompts.read_prompts(args.prompts) if args.prompts is not None else args.prompt)


def _sample_images(args: argparse.Namespace) -> None:
    chosen = _chosen(Options, args)
    images = list_images(args.image)
    for path in images:
        read_image(path)
    outputs = plan_outputs(images, args.output)
    decoder = args.decoder or "vae"
    model = ImageToVideo.load(
        *(args.weights, args.lora, args.ema, args.dtype),
        context=args.context,
        decode_dtype=args.decode_dtype,
        decoder=decoder,
    )
    options = model.complete(chosen)
    check_rate(args.output, options.fps)
    _introduce(args, model.notice, options)
    if options.sampler != "euler" and not args.lora:
        print(
            "Without --lora this is SVD itself, which is not made for few steps: expect blur, or use --sampler=euler."
        )
    made = make_videos(model, images, args.seed, options)
    _write_all(args.output, options.fps, pipeline.PARTS, _headings([image.name for image in images]), outputs, made)


def _sample_prompts(args: argparse.Namespace, given: list[str]) -> None:
    chosen = _chosen(TextOptions, args)
    negative = args.negative_prompt or ""
    prompts.check_prompts(given, negative)
    names = prompts.names_of(given)
    outputs = _plan_outputs(names, args.output, [])
    model = TextToVideo.load(
        *(args.weights, args.lora, args.ema, args.dtype), context=args.context, decode_dtype=args.decode_dtype
    )
    options = model.complete(chosen)
    if args.negative_prompt is not None and not options.guided:
        raise UserError(
            f"--negative_prompt needs guidance, but {options.sampler} has guidance_scale={options.guidance_scale:g}:"
            " leave it out, or use --sampler=ddim with a --guidance_scale above 1."
        )
    check_rate(args.output, options.fps)
    for warning in prompts.cut_warnings([*given, negative], model.tokenize([*given, negative])):
        print(warning)
    _introduce(args, model.notice, options)

    def start(i: int) -> list[Array]:
        noise = model.noise(video_key(args.seed, i)[None], options)
        latents = model.sample(model.embed([given[i]], [negative]), noise, options)
        return model.start_decoding(latents, options.decode_chunk_size)

    headings = _headings(names)
    made = _make_in_turn(model, text_to_video.PARTS, headings, start)
    _write_all(args.output, options.fps, text_to_video.PARTS, headings, outputs, made)


def _chosen(kind: type[OptionsT], args: argparse.Namespace) -> OptionsT:
    """The options of a kind that were given."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in given.items() if value is not None})


def _introduce(args: argparse.Namespace, notice: str, options: Any) -> None:
    if notice:
        print(notice)
    source = f"{args.weights} with {args.lora}" if args.lora else args.weights
    print(
        f"{source} on {jax.devices()[0].platform}: {options.num_frames} frames of {options.height} x {options.width},"
        f" {options.sampler}, {options.steps} step(s), {options.num_evaluations} network evaluations (NFE) a video"
    )


def _write_all(
    output: str,
    fps: float,
    parts: Sequence[str],
    headings: Sequence[str],
    outputs: Sequence[Path],
    made: Iterator[Made],
) -> None:
    """Writes videos as they come, and says how long each took."""
    total = dict.fromkeys((*parts, "write"), 0.0)
    write: Callable[[Path, np.ndarray], None] = write_pictures
    if _is_video(output):
        write = functools.partial(write_video, fps=fps)
    for i, frames, spent in made:
        _show(f"{headings[i]}: write ...")
        writing = time.perf_counter()
        write(outputs[i], frames)
        spent["write"] = time.perf_counter() - writing
        total = {part: seconds + spent[part] for part, seconds in total.items()}
        _show("")
        print(f"{headings[i]} -> {outputs[i]}: {sum(spent.values()):.2f} s ({_parts(spent)})", flush=True)
    if len(outputs) > 1:
        print(f"{len(outputs)} videos: {_parts(total)}")


def make_videos(model: ImageToVideo, images: list[Path], seed: int, options: CompleteOptions) -> Iterator[Made]:
    """Videos of images, in their order; see `_make_in_turn`."""

    def start(i: int) -> list[Array]:
        noise = model.noise(video_key(seed, i)[None], options)
        latents = model.sample(read_image(images[i])[None], noise, options)
        return model.start_decoding(latents, options.decode_chunk_size)

    return _make_in_turn(model, pipeline.PARTS, _headings([image.name for image in images]), start)


def _make_in_turn(
    model: Pipeline, parts: Sequence[str], headings: Sequence[str], start: Callable[[int], list[Array]]
) -> Iterator[Made]:
    """One video for each heading.

    The devices have the next one to work at before these frames are waited for, and while they are written.

    Args:
        start: of the number of a video; starts all the work for it, and gives its decoded chunks.
    """
    finish: Callable[[], Made] | None = None
    for i, heading in enumerate(headings):
        model.seconds = dict.fromkeys(parts, 0.0)
        model.on_part = functools.partial(_show_part, heading)
        decoded = start(i)
        before, finish = finish, functools.partial(_finish, model, i, decoded, model.seconds, model.clock.last)
        if before:
            yield before()
    if finish:
        yield finish()


def _finish(
    model: Pipeline, i: int, decoded: list[Array], seconds: dict[str, float], timed: futures.Future[None]
) -> Made:
    frames = model.pixels(decoded)[0]
    timed.result()
    return i, frames, seconds


def _headings(names: Sequence[str]) -> list[str]:
    return [f"[{i + 1}/{len(names)}] {name}" for i, name in enumerate(names)]


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
    return _plan_outputs([image.stem for image in images], output, images)


def _plan_outputs(names: list[str], output: str, images: list[Path]) -> list[Path]:
    """The same for anything with names; nothing is written where one of the images is."""
    is_video = _is_video(output)
    if output.lower().endswith(_OTHER_SUFFIXES):
        raise UserError(f"--output={output} is neither .mp4 nor .gif: choose one of these, or give a folder for PNGs.")
    kind = "image" if images else "prompt"
    if len(names) > 1 and "{name}" not in output:
        if is_video:
            raise UserError(
                f"--output={output} is one video, but there are {len(names)} {kind}s: write {{name}} in it, which"
                f" stands for the {kind}'s name, or give a folder."
            )
        output = f"{output}/{{name}}"
    outputs = [as_path(output.replace("{name}", name)) for name in names]
    if len(set(outputs)) < len(outputs):
        twice = next(path for path in outputs if outputs.count(path) > 1)
        raise UserError(f"Two {kind}s would be written to {twice}: rename one of them.")
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
    add("--image", nargs="+", metavar="FILE", help="image files, or folders of them")
    add("--prompt", nargs="+", metavar="TEXT", help="what a video is to show, each in quotes")
    add("--prompts", metavar="FILE", help="text file with one prompt on each line")
    add(
        "--output",
        required=True,
        help="NAME.mp4, NAME.gif, or a folder for PNG pictures; {name}: the image's, or prompt's",
    )
    add("--weights", required=True, help="folder that osv_jax.convert_weights wrote, or `miniature`")
    add("--lora", metavar="PATH", help="workdir of a training run, PEFT folder or LoRA .safetensors, merged before use")
    add(
        "--sampler",
        choices=(*SAMPLERS, *TEXT_SAMPLERS),
        help="of images tts (default), consistency, euler; of prompts ddim, or few-step (default with a run's --lora)",
    )
    add("--steps", type=int, help="steps of the sampler (default 1; euler, ddim: 25; few-step: 4)")
    add("--motion_bucket_id", type=float, help="amount of motion, 1 to 255 (default 127)")
    add("--noise_aug_strength", type=float, help="noise on the image (default 0.02)")
    add("--min_guidance_scale", type=float, help="euler's, at the first frame (default 1)")
    add("--max_guidance_scale", type=float, help="euler's, at the last frame (default 3)")
    add("--guidance_scale", type=float, help="ddim's (default 7.5)")
    add("--negative_prompt", metavar="TEXT", help="what ddim's guidance leads away from")
    add("--decode_chunk_size", type=int, help="frames decoded at a time; fewer take less memory (of images 7, else 4)")
    add("--decode_dtype", choices=DECODE_DTYPES, help="of the decoder (default: --dtype)")
    add("--decoder", choices=DECODERS, help="the VAE's own (default), or TAESDV: fast and rough")
    add_video_options(parser)
    return parser


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """What every program that makes videos with a student can be told."""
    add, own = parser.add_argument, "what it was trained at"
    add("--ema", action="store_true", help="of a workdir, use the student's EMA")
    add("--seed", type=SEED, default=0, help="of all noise, 0 to 2^32 - 1 (default %(default)s)")
    add("--fps", type=float, help=f"frames a second, 0.1 to 240, told to SVD and played (default: {own} here, or 7)")
    add("--height", type=int, metavar="PX", help=f"a multiple of 8 (default: {own} here, or SVD's 576)")
    add("--width", type=int, metavar="PX", help=f"a multiple of 8 (default: {own} here, or SVD's 1024)")
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
