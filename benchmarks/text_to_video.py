"""AVDM2 in miniature: a text-to-video teacher of a world that is drawn, and its four-step students.

    python benchmarks/text_to_video.py --size=full --output=runs/text --fvd_weights=weights/eval

It makes networks (benchmarks/text_world.py), prepares clips with captions, trains a teacher as AnimateDiff was, from it
students with and without score matching, equally long, and samples all of them from captions of clips that no training
saw. The command of each step is printed; given again, the same command goes on: what is finished is left alone. OUTPUT
receives text_to_video.md, text_to_video.json and text_to_video.png. Without --fvd_weights there is no FVD.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from programs_in_steps import Step, begin, do_all

from osv_jax.data import world
from osv_jax.data.motion import motion
from osv_jax.runtime import ending, paths
from osv_jax.runtime.arguments import Parser

if TYPE_CHECKING:
    # Decoding workers of osv_jax.prepare import this file, too: what imports JAX is imported where it is used.
    from osv_jax.inference.text_to_video import TextToVideo

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = ("text_to_video.md", "text_to_video.json", "text_to_video.png")
PROTOCOL = "stylegan-v"
_HEIGHT, _WIDTH, _FRAMES, _FPS = 32, 48, 16, 12.0
# Clips in the picture, and frames of each.
_SHOWN, _SHOWN_FRAMES = 4, 3
_ENCODED = 16


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        decoder_steps: of the image VAE.
        clips: of the splits `train` and `test`.
        unet_steps, motion_steps: of the teacher's two parts.
        student_steps: of each student, whose turn every second one is.
        guidance: of the teacher, in sampling and in score matching.
        bootstrap: draws for the intervals.
        batch: clips that are sampled at a time.
    """

    decoder_steps: int
    clips: tuple[int, int]
    unet_steps: int
    motion_steps: int
    student_steps: int
    guidance: float
    bootstrap: int
    batch: int


SIZES = {
    "full": Size(400, (2048, 128), 2000, 1500, 400, 3.0, 40, 8),
    "tiny": Size(1, (4, 2), 1, 1, 2, 3.0, 2, 2),
}


@dataclasses.dataclass(frozen=True)
class Way:
    """A row of the table: the teacher, or a student of the run `student`, and how it is sampled."""

    name: str
    steps: int
    sampler: str = "few-step"
    student: str = ""


WAYS = (
    Way("teacher, 25 steps", 25, "ddim"),
    Way("teacher, 4 steps", 4, "ddim"),
    Way("student, 4 steps", 4, student="student"),
    Way("student without SDM, 4 steps", 4, student="student_gan"),
    Way("untrained student, 4 steps", 4),
)
# Real clips that are compared, and as many others, which tell how near clips of the same distribution are.
REAL, OTHERS = "real clips", "other real clips"


def plan_steps(size: Size, output: pathlib.Path) -> list[Step]:
    """Everything before sampling, in an order in which it can be done."""
    start, images, teacher, latents = (output / name for name in ("start", "images", "teacher", "latents"))
    prepare = (
        *("--source=world", f"--output={latents}", f"--weights={start}", f"--num_frames={_FRAMES}", f"--fps={_FPS:g}"),
        *(f"--height={_HEIGHT}", f"--width={_WIDTH}", f"--max_videos={size.clips[0]}", "--test_videos=0"),
        *("--min_motion=0", "--workers=1"),
    )

    def train(name: str, config: str, steps: int, weights: pathlib.Path, *after: str, **changes: Any) -> Step:
        keys: Mapping[str, Any] = {"weights": weights, "data.dataset": latents, "num_steps": steps, **changes}
        file = ROOT / "configs" / config
        arguments = (f"--config={file}", f"--workdir={output / name}")
        return Step(name, "train", (*arguments, *(f"--config.{k}={v}" for k, v in keys.items())), ("latents", *after))

    def merge(name: str, run: str) -> Step:
        return Step(name, "merge", (str(output / run), str(output / name), "--ema", "--dtype=float32"), (run,))

    def student(name: str, **changes: Any) -> Step:
        guided = {"sdm_guidance": size.guidance, **changes}
        return train(name, "avdm2.py:miniature", size.student_steps, teacher, "teacher", **guided)

    return [
        Step("start", "text_world", (str(start), f"--steps={size.decoder_steps}")),
        Step("latents", "prepare", prepare, ("start",)),
        train("unet", "animatediff.py:miniature_unet", size.unet_steps, start, "start"),
        merge("images", "unet"),
        train("motion", "animatediff.py:miniature", size.motion_steps, images, "images"),
        merge("teacher", "motion"),
        student("student"),
        student("student_gan", sdm_weight=0.0),
    ]


def make_samples(size: Size, output: pathlib.Path) -> dict[str, pathlib.Path]:
    """Files with the clips of every way, and with real ones as the VAE decodes them; those that are there stay."""
    files = {name: output / "samples" / f"{number}.npy" for number, name in enumerate((REAL, OTHERS, *(_names())))}
    (output / "samples").mkdir(exist_ok=True)
    tests = size.clips[1]
    for name, first in ((REAL, 0), (OTHERS, tests)):
        if not files[name].exists():
            save(files[name], decoded_clips(_load(output), range(first, first + tests)))
    for way in WAYS:
        if not files[way.name].exists():
            print(f"{way.name}: {tests} clips", flush=True)
            save(files[way.name], sample(_load(output, way.student), way, captions(range(tests)), size))
    return files


def _names() -> Iterator[str]:
    return (way.name for way in WAYS)


def _load(output: pathlib.Path, student: str = "") -> TextToVideo:
    from osv_jax.inference.text_to_video import TextToVideo

    return TextToVideo.load(output / "teacher", output / student if student else None, dtype="float32")


def save(file: pathlib.Path, clips: np.ndarray) -> None:
    """Writes clips, uint8 [n f h w 3], whole or not at all."""
    with paths.new_file(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, clips)


def scene(number: int) -> world.Scene:
    """Of a clip that no training sees."""
    return world.scene(world.Address(0, "test", number))


def captions(numbers: Sequence[int]) -> list[str]:
    return [scene(number).caption for number in numbers]


def decoded_clips(model: TextToVideo, numbers: Sequence[int]) -> np.ndarray:
    """Drawn clips, encoded and decoded: nothing that comes out of this VAE can be better."""
    import jax

    encode, made = jax.jit(model.codec.encode_video), []
    for start in range(0, len(numbers), _ENCODED):
        some = numbers[start : start + _ENCODED]
        clips = np.stack([world.draw(scene(number), _FRAMES, _FPS, _HEIGHT, _WIDTH) for number in some])
        made.append(model.frames(encode(model.params["image_vae"], clips), _FRAMES))
    return np.concatenate(made)


def sample(model: TextToVideo, way: Way, prompts: Sequence[str], size: Size) -> np.ndarray:
    """A clip of each prompt; every way has the same noise for it."""
    import jax.numpy as jnp

    from osv_jax.inference.programs import video_key
    from osv_jax.inference.text_options import TextOptions

    how: dict[str, Any] = {"sampler": way.sampler, "steps": way.steps}
    if way.sampler == "ddim":
        how["guidance_scale"] = size.guidance
    frame: dict[str, Any] = {"num_frames": _FRAMES, "height": _HEIGHT, "width": _WIDTH, "fps": _FPS}
    options, made = model.complete(TextOptions(**how, **frame)), []
    for start in range(0, len(prompts), size.batch):
        some = list(prompts[start : start + size.batch])
        keys = jnp.stack([video_key(0, start + i) for i in range(len(some))])
        latents = model.sample(model.embed(some, [""] * len(some)), model.noise(keys, options), options)
        made.append(model.frames(latents, _FRAMES))
    return np.concatenate(made)


def score(size: Size, files: Mapping[str, pathlib.Path], output: pathlib.Path, folder: str) -> list[dict[str, Any]]:
    """The rows of the table: frame-to-frame change and, with a folder that has I3D, FVD to the real clips."""
    from osv_jax.evaluation.features import Features, clip_features, save_features, settings
    from osv_jax.evaluation.features import load_features as load
    from osv_jax.evaluation.fvd import fvd
    from osv_jax.evaluation.networks import load_network
    from osv_jax.evaluation.protocols import PROTOCOLS

    protocol = PROTOCOLS[PROTOCOL]
    network = load_network(folder, protocol.network, protocol.num_frames) if folder else None
    rows, real = [], None
    for name, file in files.items():
        clips = np.load(file)
        change = motion(clips)
        row = {"name": name, "change": float(change.mean()), "change_std": float(change.std())}
        if network is not None:
            stored = output / "samples" / f"{file.stem}.features.npz"
            if not stored.exists():
                vectors = clip_features(clips, protocol, network)
                features = Features(vectors, {clips.shape[2:4]: len(clips)}, [], settings(protocol, network))
                save_features(stored, features)
            features = load(stored)
            real = features if real is None else real
            found = fvd(real, features, protocol, size.bootstrap)
            row |= found.as_row("fvd") if name != REAL else {}
        rows.append(row)
        print(row, flush=True)
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]], prompts: Sequence[str], steps: Sequence[Step]) -> str:
    """The table, the captions of the picture, and the commands."""
    lines = ["| clips | FVD | 95 % interval | change from frame to frame, of 255 |", "|---|---|---|---|"]
    for row in rows:
        has = "fvd" in row
        value = f"{row['fvd']:.0f}" if has else ""
        interval = f"{row['fvd_low']:.0f} to {row['fvd_high']:.0f}" if has else ""
        lines.append(f"| {row['name']} | {value} | {interval} | {row['change']:.2f} |")
    lines += ["", *(f"{i + 1}. {prompt}" for i, prompt in enumerate(prompts))]
    return "\n".join([*lines, "", "```bash", *(step.command for step in steps), "```", ""])


def picture(files: Mapping[str, pathlib.Path]) -> np.ndarray:
    """Rows of frames of the first clips, side by side."""
    from osv_jax.runtime.media import sample_grid

    chosen = np.linspace(0, _FRAMES - 1, _SHOWN_FRAMES).round().astype(int)
    rows = {name: np.load(file)[:_SHOWN, chosen] for name, file in files.items() if name != OTHERS}
    return sample_grid({name: np.concatenate(list(clips)) for name, clips in rows.items()}, _SHOWN * _SHOWN_FRAMES)


def main(given: Sequence[str] | None = None) -> None:
    """Does what is left, and writes the results.

    Raises:
        UserError: on anything the user can fix.
    """
    from osv_jax.runtime.finite import strict_json
    from osv_jax.runtime.media import write_picture

    parser = Parser(prog="python benchmarks/text_to_video.py", description=__doc__)
    size, output, args = begin(parser, SIZES, FILES, "no FVD", given)
    steps = plan_steps(size, output)
    do_all(steps, output)
    files = make_samples(size, output)
    write_picture(output / FILES[2], picture(files))
    rows = score(size, files, output, args.fvd_weights)
    markdown = as_markdown(rows, captions(range(min(_SHOWN, size.clips[1]))), steps)
    about = {"clips": size.clips[1], "protocol": PROTOCOL if args.fvd_weights else None}
    paths.write_text(output / FILES[0], markdown)
    paths.write_text(output / FILES[1], strict_json({"rows": rows, "about": about}, indent=2) + "\n")
    print(f"\n{markdown}\n{', '.join(str(output / name) for name in FILES)}")


if __name__ == "__main__":
    ending.run(main)
