"""Lays a student, or several, beside the teacher.

    python -m osv_jax.compare --weights=weights/svd --lora=runs/stage2 --videos=my_videos --output=compared

From the first frames of clips and from the same noise it makes the teacher's guided Euler sample, one step of the
untrained student, and of each student one step, one step with the Time Travel Sampler, and two steps. --output receives
comparison.png and comparison.mp4, with the real clips beside them, and measured.json: how far from the teacher's each
latents are (mean squared error), how much the frames move, and how well the first frame is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from osv_jax.data import demo, pixels
from osv_jax.errors import UserError
from osv_jax.evaluation.measures import first_frame_psnr, motion
from osv_jax.inference.pipeline import ImageToVideo, Options
from osv_jax.runtime import arguments, command_line, ending, paths
from osv_jax.runtime.finite import strict_json
from osv_jax.runtime.media import beside_each_other, sample_grid, write_picture, write_video
from osv_jax.runtime.paths import Path, as_path
from osv_jax.runtime.ranges import COUNT
from osv_jax.sample import add_video_options

UNTRAINED = "untrained student, 1 step"
# Sampler and steps that students are sampled with.
WAYS = {"1 step": ("consistency", 1), "1 step + TTS": ("tts", 1), "2 steps": ("consistency", 2)}
_FILES = _PICTURE, _FILM, _NUMBERS = "comparison.png", "comparison.mp4", "measured.json"
_DRAWN_CLIPS = 2
_FILMED_CLIPS = 4


@dataclasses.dataclass(frozen=True)
class Samples:
    """What one way of sampling made of every clip.

    Attributes:
        latents: scaled.
        frames: what they decode to.
        evaluations: of the network for a clip (NFE).
    """

    latents: Float[np.ndarray, "n f latent_h latent_w c"]
    frames: UInt8[np.ndarray, "n f h w 3"]
    evaluations: int


def main(given: list[str] | None = None) -> None:
    """Samples, measures, draws.

    Raises:
        UserError: on anything the user can fix, before anything is compiled.
    """
    args = _parser().parse_args(given)
    output = as_path(args.output)
    paths.check_folder(output, "--output")
    for name in _FILES:
        paths.check_file(output / name, "--output")
    videos, real = demo.video_folder(args.videos), paths.real(output)
    if args.videos != demo.HELD_OUT and paths.real(videos) in (real, *real.parents):
        raise UserError(f"--output={output} lies in {videos}, and its film would be one of the videos: choose another.")
    chosen = {name: getattr(args, name) for name in ("height", "width", "num_frames", "fps", "steps")}
    options = Options(sampler="euler", **chosen)
    teacher, *trained = ImageToVideo.load_each(
        args.weights, [None, *args.lora], args.ema, args.dtype, context=args.context
    )
    names = ["student"] if len(args.lora) == 1 else args.lora
    students = dict(zip(names, trained, strict=True))
    # A student knows what it was trained on.
    video = trained[0].complete(options)
    clips = read_clips(args.videos, args.clips, video)
    for student in trained:
        if student.notice:
            print(student.notice)
    print(
        f"{', '.join(args.lora)} beside {args.weights} on {len(clips)} clips of {args.videos}:"
        f" {video.num_frames} frames of {video.height} x {video.width}, the teacher's samples in {video.steps} Euler"
        " steps"
    )
    made = sample_all(teacher, students, clips, video, args.seed)
    measured = measure(made, clips)
    print(table(measured))
    description = {"weights": args.weights, "lora": args.lora, "clips": len(clips), "seed": args.seed}
    paths.write_text(output / _NUMBERS, strict_json(description | {"samples": measured}, indent=2) + "\n")
    draw(output, clips, {label: samples.frames for label, samples in made.items()}, video.fps)
    print(", ".join(str(output / name) for name in _FILES))


def read_clips(videos: str, count: int, options: Options) -> UInt8[np.ndarray, "n f h w 3"]:
    """Up to `count` clips of a folder of videos, or of those that come with the package (`miniature`).

    Raises:
        UserError: no videos, or clips of the package at another size than theirs.
    """
    if videos != demo.HELD_OUT:
        folder = demo.video_folder(videos)
        return pixels.spread_clips(
            folder, count, options.num_frames, options.fps, options.height, options.width, options.num_frames / 4
        )
    clips, fps = demo.held_out_clips()
    if clips.shape[1:4] != (options.num_frames, options.height, options.width) or fps != options.fps:
        raise UserError(
            f"--videos={videos} are clips of {clips.shape[1]} frames of {clips.shape[2]} x {clips.shape[3]} at {fps:g}"
            f" fps, but these networks make {options.num_frames} of {options.height} x {options.width} at"
            f" {options.fps:g}: give a folder of videos."
        )
    return clips[:count]


def sample_all(
    teacher: ImageToVideo,
    students: Mapping[str, ImageToVideo],
    clips: UInt8[np.ndarray, "n f h w 3"],
    video: Options,
    seed: int,
) -> dict[str, Samples]:
    """Samples of every kind, from the same first frames and the same noise, by what they are called.

    Args:
        students: by what they are called.
        video: complete; how the teacher samples.
    """

    def options(model: ImageToVideo, sampler: str, steps: int) -> Options:
        return model.complete(dataclasses.replace(video, sampler=sampler, steps=steps))

    ways = {f"teacher, {video.steps} steps": (teacher, video)}
    ways[UNTRAINED] = (teacher, options(teacher, "consistency", 1))
    for name, student in students.items():
        ways |= {f"{name}, {way}": (student, options(student, *chosen)) for way, chosen in WAYS.items()}
    latents = {name: [] for name in ways}
    frames = {name: [] for name in ways}
    # One clip after the other, so that memory does not depend on how many there are.
    for number, clip in enumerate(tqdm(clips, unit="clip", desc="sampling")):
        noise = teacher.noise(jax.random.fold_in(jax.random.key(seed), number), video)
        for name, (model, chosen) in ways.items():
            sampled = model.sample(clip[0], noise, chosen)
            latents[name].append(np.asarray(sampled)[0])
            frames[name].append(model.frames(sampled, chosen.decode_chunk_size)[0])
    return {
        name: Samples(np.stack(latents[name]), np.stack(frames[name]), chosen.num_evaluations)
        for name, (_, chosen) in ways.items()
    }


def measure(made: Mapping[str, Samples], clips: UInt8[np.ndarray, "n f h w 3"]) -> dict[str, dict[str, float]]:
    """What is told about every way of sampling, the first of which is the teacher's, and about the real clips.

    Returns:
        By name: `mse` of latents against the teacher's, the mean over clips, and `mse_std` over them; `motion`, the
        mean absolute difference of frames that follow each other, 0 to 255; `first_frame_psnr` [dB] against the
        condition; and the number of network `evaluations`.
    """
    target = next(iter(made.values())).latents
    rows = {}
    for name, samples in made.items():
        errors = ((samples.latents - target) ** 2).mean(axis=(1, 2, 3, 4))
        rows[name] = {
            "mse": float(errors.mean()),
            "mse_std": float(errors.std()),
            "motion": float(motion(samples.frames).mean()),
            "first_frame_psnr": float(first_frame_psnr(samples.frames, clips[:, 0]).mean()),
            "evaluations": samples.evaluations,
        }
    return rows | {"real clips": {"motion": float(motion(clips).mean())}}


def table(measured: Mapping[str, Mapping[str, float]]) -> str:
    """`measure`'s numbers for reading, with how many times closer to the teacher than the untrained student each is."""
    room = max(map(len, measured)) + 1
    lines = [f"{'':{room}}{'NFE':>5}{'MSE to the teacher':>20}{'closer':>9}{'motion':>8}{'first frame':>14}"]
    for name, row in measured.items():
        if "mse" not in row:
            lines.append(f"{name:{room}}{'':34}{row['motion']:8.2f}")
            continue
        far = measured[UNTRAINED]["mse"]
        closer = f"{far / row['mse']:.2f} x" if row["mse"] else "-"
        lines.append(
            f"{name:{room}}{row['evaluations']:5}{row['mse']:20.4f}{closer:>9}{row['motion']:8.2f}"
            f"{row['first_frame_psnr']:11.2f} dB"
        )
    return "\n".join(lines)


def draw(
    output: Path,
    clips: UInt8[np.ndarray, "n f h w 3"],
    frames: Mapping[str, UInt8[np.ndarray, "n f h w 3"]],
    fps: float,
) -> None:
    """Writes comparison.png, a row for each kind of the first clips, and comparison.mp4, a column for each kind."""
    rows = {}
    kinds = {"real clip": clips, **frames}
    for number in range(min(_DRAWN_CLIPS, len(clips))):
        rows |= {f"{label} ({number + 1})": made[number] for label, made in kinds.items()}
    write_picture(output / _PICTURE, sample_grid(rows))
    filmed = {label: made[:_FILMED_CLIPS] for label, made in kinds.items()}
    write_video(output / _FILM, beside_each_other(filmed), fps)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser("compare", __doc__)
    add = parser.add_argument
    add("--weights", required=True, help="the teacher: folder that tools/convert_weights.py wrote, or `miniature`")
    add("--lora", required=True, nargs="+", metavar="PATH", help="a student: workdir, PEFT folder or LoRA .safetensors")
    add("--videos", required=True, help="folder of videos; `demo`; or `miniature`, whose film nothing here was shown")
    add("--output", required=True, metavar="FOLDER", help="to write to")
    add("--clips", type=COUNT, default=4, help="how many, evenly spread over the videos (default %(default)s)")
    add("--steps", type=int, help="of the teacher (default 25)")
    add_video_options(parser)
    return parser


def run() -> None:
    """The program; for how it ends see `ending.exit_status`."""
    command_line.keep_compiled_programs()
    ending.run(main)


if __name__ == "__main__":
    run()
