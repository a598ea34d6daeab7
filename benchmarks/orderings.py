"""The orderings of OSV's Tables 1 and 2, looked for on a world that is drawn: docs/reproduction.md.

    python benchmarks/orderings.py --size=full --output=runs/orderings --fvd_weights=weights/eval

It prepares clips of the world, trains a teacher on them and every row of both tables with equal budgets, and scores
all on the same test clips, by the package's own programs; the command of each step is printed. Given again, the same
command goes on: what is finished is left alone. OUTPUT receives orderings.md, orderings.json and the trainings' losses,
orderings.png.

Scoring takes most of the time: --clips=256 has so many of the test clips scored, evenly spread. Without --fvd_weights
rows are compared by their mean squared error to the teacher, which is no measure of what the paper claims, but shows
that all works: --size=tiny, with networks that learn nothing.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from papers_tables import Way, as_markdown, plan_rows, results
from programs_in_steps import Step, begin, do_all

from osv_jax.runtime import ending, paths
from osv_jax.runtime.arguments import Parser
from osv_jax.runtime.ranges import Range

# Decoding workers of osv_jax.prepare import this file, too: what imports JAX is imported where it is used.
ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = ("orderings.md", "orderings.json", "orderings.png")
# Of the rates that were tried the one with the lowest FVD, of every method but SF-V: docs/reproduction.md.
_RATE, _RATE_OF_SF_V = 3e-3, 3e-4
# What makes the student's step longer than it need be, and its results no better.
_QUIET = {"picture_every": 1_000_000, "log_every": 20}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        low, high: height and width [px]; test clips are `high`.
        clips: of the splits `train` and `test`.
        teacher_steps: at `low`, and then at `high`.
        student_steps: of every row, all its stages together.
        first_stage: how many of them are OSV's stage 1, in rows that have both.
        seeds: of OSV's rows in Table 1.
        bootstrap: draws for the intervals.
        teacher: what is different from configs/finetune.py:miniature.
    """

    low: tuple[int, int]
    high: tuple[int, int]
    num_frames: int
    clips: tuple[int, int]
    teacher_steps: tuple[int, int]
    student_steps: int
    first_stage: int
    seeds: int
    bootstrap: int
    teacher: Mapping[str, Any]


_SMALLEST_UNET = {
    "random_networks.unet.block_out_channels": (32,),
    "random_networks.unet.num_attention_heads": (1,),
    "random_networks.unet.has_attention": (True,),
}
SIZES = {
    "full": Size((16, 24), (32, 48), 14, (2048, 1024), (1000, 3000), 3000, 750, 3, 40, {}),
    "tiny": Size((16, 24), (32, 48), 10, (2, 2), (1, 1), 3, 1, 2, 2, _SMALLEST_UNET),
}


def plan_steps(size: Size, output: pathlib.Path) -> list[Step]:
    """Everything before the evaluation, in an order in which it can be done."""
    prepared = tuple(f"latents {_pixels(pixels)}" for pixels in (size.low, size.high))
    steps = [
        Step(
            f"latents {_pixels(pixels)}",
            "prepare",
            (
                *("--source=world", f"--output={output / 'latents' / _pixels(pixels)}", "--weights=miniature"),
                *(f"--height={pixels[0]}", f"--width={pixels[1]}", f"--num_frames={size.num_frames}", "--fps=12"),
                *(f"--max_videos={size.clips[0]}", f"--test_videos={number_of_tests}", "--min_motion=0"),
            ),
        )
        for pixels, number_of_tests in ((size.low, 0), (size.high, size.clips[1]))
    ]
    resolutions = ((0, *size.low), (size.teacher_steps[0], *size.high))
    changes = {"num_steps": sum(size.teacher_steps), "checkpoint_every": 250, "data.resolutions": resolutions}
    steps.append(_training("teacher", "finetune", size, output, changes | dict(size.teacher), prepared))
    merge = (str(output / "teacher"), str(output / "weights"), "--ema", "--overwrite")
    return [*steps, Step("weights", "merge", merge, ("teacher",)), *_students(size, output, prepared)]


def _students(size: Size, output: pathlib.Path, prepared: tuple[str, ...]) -> Iterator[Step]:
    whole, first = size.student_steps, size.first_stage
    second, half = whole - first, whole // 2
    low, high = ("data.resolutions", ((0, *size.low),)), ("data.resolutions", ((0, *size.high),))
    # What all students have in common, and then all of stage 2.
    common = {"weights": output / "weights", "batch_size": 1, "ema_decay": 0.98, "optimizer.learning_rate": _RATE}
    common |= dict([high])
    # All levels, as in the paper; the miniature's two are those of its own grid of 17.
    own = {"lora.rank": 8, "lora.alpha": 8.0, "num_levels": 25, "solver_steps": 5, "level_weights": ()}

    def student(name: str, config: str, steps: int, start: str, *changes: tuple[str, Any]) -> Step:
        chosen = common | {"num_steps": steps, "init_from": output / start if start else ""} | dict(changes)
        after = (*prepared, "weights", *([start] if start else []))
        return _training(name, config, size, output, chosen, after)

    def stage2(name: str, start: str, steps: int, *changes: tuple[str, Any]) -> Step:
        both = ("data.resolutions", ((0, *size.low), (steps // 2, *size.high)))
        return student(name, "stage2", steps, start, *own.items(), both, *changes)

    phases = ((0, "spatial_transformer", _RATE), (half, "temporal_transformer", _RATE))
    yield student("animatelcm", "animatelcm", whole, "", ("phases", phases))
    yield student("sf_v", "sf_v", whole, "", ("optimizer.learning_rate", _RATE_OF_SF_V))
    for seed in range(size.seeds):
        yield student(f"stage1_{seed}", "stage1", first, "", ("seed", seed))
        yield stage2(f"osv_{seed}", f"stage1_{seed}", second, ("seed", seed))
    yield stage2("a", "stage1_0", second, ("solver_steps", 1))
    yield stage2("b", "", whole)
    yield student("c", "stage1", whole, "")
    yield stage2("d", "stage1_0", second, ("adversarial_weight", 0.0))
    yield stage2("e", "stage1_0", second, ("discriminator_input", "decoded"))
    yield student("g", "stage1", whole, "", low)
    yield stage2("h", "stage1_0", second, high)


def _training(
    name: str, config: str, size: Size, output: pathlib.Path, changes: Mapping[str, Any], after: tuple[str, ...]
) -> Step:
    frames, dataset = size.num_frames, output / "latents" / "{height}x{width}"
    changes = {"data.dataset": str(dataset), "data.num_frames": frames, "checkpoint_every": 100, **_QUIET, **changes}
    keys = tuple(f"--config.{key}={value}" for key, value in changes.items())
    file = ROOT / "configs" / f"{config}.py:miniature"
    return Step(name, "train", (f"--config={file}", f"--workdir={output / name}", *keys), after)


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def evaluate(size: Size, output: pathlib.Path, ways: Sequence[Way], clips: int, fvd_weights: str) -> dict[str, Any]:
    """What `osv_jax.evaluate table` measures over so many clips, as its table.json says it."""
    from osv_jax import evaluate as program

    methods = tuple(
        {"name": way.name, "sampler": way.sampler, "steps": way.steps, "max_guidance_scale": way.guidance}
        | ({"lora": str(output / way.student), "ema": True} if way.student else {})
        for way in ways
    )
    height, width = size.high
    keys = {"weights": output / "weights", "students": (), "methods": methods, "output": output / "evaluated"}
    keys |= {"videos": output / "latents" / _pixels(size.high), "clips": clips, "fvd_weights": fvd_weights}
    keys |= {"height": height, "width": width, "num_frames": size.num_frames, "fps": 12.0, "bootstrap": size.bootstrap}
    arguments = [f"--config={ROOT / 'configs' / 'eval.py'}:miniature"]
    arguments += [f"--config.{key}={value}" for key, value in keys.items()]
    print(f"\npython -m osv_jax.evaluate table {shlex.join(arguments)}", flush=True)
    program.main(["table", *arguments])
    return json.loads((output / "evaluated" / "table.json").read_text())


def main(given: Sequence[str] | None = None) -> None:
    """Does what is left, and writes the results.

    Raises:
        UserError: on anything the user can fix.
    """
    from orderings_curves import draw

    from osv_jax.runtime.finite import strict_json

    parser = Parser(prog="python benchmarks/orderings.py", description=__doc__)
    parser.add_argument("--clips", type=Range(2, whole=True), metavar="N", help="scores at most so many (default: all)")
    size, output, args = begin(parser, SIZES, FILES, "MSE, no FVD", given)
    clips = min(args.clips or size.clips[1], size.clips[1])
    steps = plan_steps(size, output)
    do_all(steps, output)
    draw([output / step.name for step in steps if step.program == "train"], output / FILES[2])
    ways, lines = plan_rows(size.seeds)
    found = results(evaluate(size, output, ways, clips, args.fvd_weights), lines, clips)
    markdown = as_markdown(found, [step.command for step in steps])
    paths.write_text(output / FILES[0], markdown)
    paths.write_text(output / FILES[1], strict_json(found, indent=2) + "\n")
    print(f"\n{markdown}\n{', '.join(str(output / name) for name in FILES)}")


if __name__ == "__main__":
    ending.run(main)
