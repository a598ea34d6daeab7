"""Lays a student, or several, beside the teacher.

    python -m osv_jax.compare --weights=weights/svd --lora=runs/stage2 --videos=my_videos --output=compared

From the first frames of clips and from the same noise it makes the teacher's guided Euler sample, one step of the
untrained student, and of each student one step, one step with the Time Travel Sampler, and two steps. --output receives
comparison.png and comparison.mp4, with the real clips beside them, and measured.json: how far from the teacher's each
latents are (mean squared error), how much the frames move and flicker, and how well the first frame is kept. Stopped
and started again, it goes on. `python -m osv_jax.evaluate table` compares more methods on many clips.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from osv_jax.errors import UserError
from osv_jax.evaluation.clips import print_skipped
from osv_jax.evaluation.generation import generate
from osv_jax.evaluation.kinds import makes_videos_of_prompts
from osv_jax.evaluation.options import MethodOptions, TableOptions, student_methods
from osv_jax.evaluation.planning import Plan, make_plan
from osv_jax.evaluation.showing import kinds, sheet_rows, shown_clips
from osv_jax.evaluation.table import REAL, Row, make_rows
from osv_jax.inference.options import DEFAULT_STEPS, RANGES
from osv_jax.runtime import arguments, command_line, ending, paths
from osv_jax.runtime.finite import strict_json
from osv_jax.runtime.media import beside_each_other, sample_grid, write_picture, write_video
from osv_jax.runtime.paths import as_path
from osv_jax.runtime.ranges import COUNT
from osv_jax.sample import add_video_options

UNTRAINED = "untrained student, 1 step"
_FILES = _PICTURE, _FILM, _NUMBERS = "comparison.png", "comparison.mp4", "measured.json"
_FILMED_CLIPS = 4
# From the start of a clip to that of the next, in clips.
_STRIDE = 0.25
_MEASURED = {"mse": "mse", "mse_std": "mse_std", "motion": "motion", "flicker": "flicker"}
_MEASURED |= {"first_frame_psnr": "first_frame_psnr", "nfe": "evaluations"}


def main(given: list[str] | None = None) -> None:
    """Samples, measures, draws.

    Raises:
        UserError: on anything the user can fix, before anything is compiled.
    """
    args = _parser().parse_args(given)
    if makes_videos_of_prompts(args.weights):
        raise UserError(
            f"{args.weights} makes videos of prompts: `python -m osv_jax.evaluate table` compares such; students of"
            " images are compared here."
        )
    output = as_path(args.output)
    paths.check_folder(output, "--output")
    for name in _FILES:
        paths.check_file(output / name, "--output")
    size: dict[str, Any] = {name: getattr(args, name) or 0 for name in ("height", "width", "num_frames", "fps")}
    options = TableOptions(
        weights=args.weights,
        videos=args.videos,
        clips=args.clips,
        stride=_STRIDE,
        seed=args.seed,
        context=args.context,
        dtype=args.dtype or "",
        films=_FILMED_CLIPS,
        output=args.output,
        **size,
    )
    teacher = MethodOptions(f"teacher, {args.steps} steps", sampler="euler", steps=args.steps)
    plan = make_plan(options, [teacher, MethodOptions(UNTRAINED), *student_methods(args.lora, args.ema)])
    for notice in plan.notices:
        print(notice)
    print(
        f"{', '.join(args.lora)} beside {args.weights} on {len(plan.clips)} clips of {args.videos}:"
        f" {plan.video.num_frames} frames of {plan.video.height} x {plan.video.width}, the teacher's samples in"
        f" {args.steps} Euler steps"
    )
    print_skipped(plan.clips.skipped)
    generate(plan)
    measured = measure(make_rows(plan))
    print(table(measured))
    description = {"weights": args.weights, "lora": args.lora, "clips": len(plan.clips), "seed": args.seed}
    paths.write_text(output / _NUMBERS, strict_json(description | {"samples": measured}, indent=2) + "\n")
    draw(plan)
    print(", ".join(str(output / name) for name in _FILES))


def measure(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What measured.json tells of each row of a table: numbers by their names there."""
    return {
        str(row["name"]): {name: row[key] for key, name in _MEASURED.items() if row.get(key) is not None}
        for row in rows
    }


def table(measured: Mapping[str, Mapping[str, float]]) -> str:
    """`measure`'s numbers for reading, with how many times closer to the teacher than the untrained student each is."""
    room = max(map(len, measured)) + 1
    lines = [
        f"{'':{room}}{'NFE':>5}{'MSE to the teacher':>20}{'closer':>9}{'motion':>8}{'flicker':>9}{'first frame':>14}"
    ]
    for name, row in measured.items():
        moving = f"{row['motion']:8.2f}{row['flicker']:9.2f}"
        if name == REAL:
            lines.append(f"{name:{room}}{'':34}{moving}")
            continue
        far = measured[UNTRAINED]["mse"]
        closer = f"{far / row['mse']:.2f} x" if row["mse"] else "-"
        first_frame = f"{row['first_frame_psnr']:11.2f} dB"
        lines.append(f"{name:{room}}{row['evaluations']:5}{row['mse']:20.4f}{closer:>9}{moving}{first_frame}")
    return "\n".join(lines)


def draw(plan: Plan) -> None:
    """Writes comparison.png, a row for each kind of the first clips, and comparison.mp4, a column for each kind."""
    write_picture(plan.output / _PICTURE, sample_grid(sheet_rows(plan)))
    filmed = {name: shown_clips(plan, method, _FILMED_CLIPS) for name, method in kinds(plan)}
    write_video(plan.output / _FILM, beside_each_other(filmed), plan.video.fps)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser("compare", __doc__)
    add = parser.add_argument
    add("--weights", required=True, help="the teacher: folder that osv_jax.convert_weights wrote, or `miniature`")
    add("--lora", required=True, nargs="+", metavar="PATH", help="a student: workdir, PEFT folder or LoRA .safetensors")
    add("--videos", required=True, help="folder of videos; `demo`; or `miniature`, whose film nothing here was shown")
    add("--output", required=True, metavar="FOLDER", help="to write to")
    add("--clips", type=COUNT, default=4, help="how many, evenly spread over the videos (default %(default)s)")
    steps = DEFAULT_STEPS["euler"]
    add("--steps", type=RANGES["steps"], default=steps, help="of the teacher (default %(default)s)")
    add_video_options(parser)
    return parser


def run() -> None:
    """The program; for how it ends see `ending.exit_status`."""
    command_line.keep_compiled_programs()
    ending.run(main)


if __name__ == "__main__":
    run()
