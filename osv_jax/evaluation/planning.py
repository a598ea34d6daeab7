"""From options to what has to be made, with all that can be refused before anything is loaded or compiled."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from osv_jax.convert import weights
from osv_jax.convert.architectures import expected_params
from osv_jax.data import demo, world
from osv_jax.errors import UserError
from osv_jax.evaluation import protocols
from osv_jax.evaluation.clips import Clips, open_clips
from osv_jax.evaluation.networks import check_frames
from osv_jax.evaluation.options import MethodOptions, TableOptions
from osv_jax.evaluation.protocols import Protocol
from osv_jax.evaluation.stamps import fingerprint, stamp
from osv_jax.inference.options import CompleteOptions, Options, complete, own_video
from osv_jax.inference.pipeline import COMPONENTS
from osv_jax.inference.programs import check_devices
from osv_jax.inference.trained import Trained, is_workdir, read_student
from osv_jax.models.lpips import SMALLEST_SIDE, load_lpips
from osv_jax.runtime import checkpoint, paths
from osv_jax.runtime.paths import Path, as_path

# Changes whenever the same clips would be measured or made differently.
_FORMAT = 1
# What a kill costs at most; a file for each would be many thousands.
CLIPS_IN_FILE = 16
_PARTS = "parts"


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table, ready to be made.

    Attributes:
        lora: a student, or None: the teacher.
        depends_on: what its clips do, beside the first frames.
    """

    name: str
    lora: str | None
    ema: bool
    video: CompleteOptions
    depends_on: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What has to be made.

    Attributes:
        options: as they were given.
        output: folder.
        methods: in the order of the table.
        target: the one to which `mse` is measured.
        clips: real ones, for all methods.
        identities: what each of them depends on; see `Clips.identity`.
        protocol: of FVD, or None.
        fvd_frames: so many of each clip are FVD's.
        batch_size: clips made at a time.
        notices: sentences about the students.
        real_with: what real clips depend on, beside their files.
        measured_with: what measures depend on, beside the clips.
    """

    options: TableOptions
    output: Path
    methods: tuple[Method, ...]
    target: Method
    clips: Clips
    identities: Sequence[list[str | int | float]]
    protocol: Protocol | None
    fvd_frames: int
    batch_size: int
    notices: tuple[str, ...]
    real_with: dict[str, Any]
    measured_with: dict[str, Any]

    @property
    def video(self) -> CompleteOptions:
        """Whose size, length and rate all clips have."""
        return self.target.video

    @property
    def data(self) -> int:
        """Groups of devices that share a batch."""
        return jax.local_device_count() // self.options.context

    def batches(self) -> list[list[int]]:
        """The numbers of the clips, as many at a time as one file holds."""
        numbers = list(range(len(self.clips)))
        return [numbers[first : first + CLIPS_IN_FILE] for first in range(0, len(numbers), CLIPS_IN_FILE)]

    def file(self, method: Method | None, numbers: Sequence[int]) -> Path:
        """Where is kept what is needed of some clips, made by a method or (None) the real ones."""
        made: Any = self.real_with
        if method is not None:
            made = [method.depends_on, self.target.depends_on, method is self.target]
        # A clip's number decides its noise.
        clips = [[number, *self.identities[number]] for number in numbers]
        films = [number for number in numbers if number < self.options.films]
        return self.output / _PARTS / f"{fingerprint([_FORMAT, made, self.measured_with, films, clips])}.npz"

    def score_file(self, method: Method) -> Path:
        """Where the FVD of a method is kept, once all its clips are."""
        files = [self.file(made, numbers).name for made in (None, method) for numbers in self.batches()]
        return self.output / _PARTS / f"{fingerprint([files, self.options.bootstrap, self.options.seed])}.npz"

    def fingerprint(self) -> str:
        """Of all that the table depends on."""
        kept = [self.file(method, numbers).name for method in (None, *self.methods) for numbers in self.batches()]
        names = [method.name for method in self.methods]
        return fingerprint([kept, names, self.options.bootstrap, self.options.seed])


def make_plan(options: TableOptions, chosen: Sequence[MethodOptions]) -> Plan:
    """Reads what is small: configurations, students, which videos there are.

    Raises:
        UserError: on anything the user can fix.
    """
    _check_names([method.name for method in chosen], options.target)
    given = {method.name: _video_options(options, method) for method in chosen}
    output = as_path(options.output)
    paths.check_folder(output, "output")
    paths.check_folder(output / _PARTS, "output")
    check_devices(options.context)
    data = jax.local_device_count() // options.context
    if options.batch_size % data:
        raise UserError(
            f"config.batch_size={options.batch_size} does not split over {data} groups of devices; use a multiple of"
            " that, or 0."
        )
    _check_apart(output, options.videos)
    _check_images(options.weights)
    configs = {name: weights.load_config(options.weights, name) for name in COMPONENTS}
    shapes = expected_params("unet", configs["unet"])
    students = {(m.lora, m.ema): read_student(m.lora or None, m.ema, shapes) for m in chosen}
    stored = weights.load_video(options.weights)
    # A student knows what it was trained on.
    first = next((trained for (lora, _), (trained, _) in students.items() if lora), Trained.none())
    own = own_video(configs["unet"], stored, first)
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    made_of = {"weights": stamp(*(weights.locate(options.weights) / name for name in COMPONENTS)), "dtype": dtype}

    def method_of(method: MethodOptions) -> Method:
        trained, _ = students[method.lora, method.ema]
        levels = trained.config.get("num_levels", 100)
        video = complete(given[method.name], own, configs["vae"].downscale, levels, options.context)
        depends_on = made_of | {"student": _student_stamp(method), "ema": method.ema, "seed": options.seed}
        return Method(
            method.name, method.lora or None, method.ema, video, depends_on | {"video": dataclasses.asdict(video)}
        )

    methods = tuple(map(method_of, chosen))
    target = next((method for method in methods if method.name == options.target), methods[0])
    protocol, fvd_frames, measured_with = _measures(options, target.video)
    clips = open_clips(
        *(options.videos, options.clips, options.stride, target.video, configs["vae"]), cache=output / "clips.json"
    )
    notices = tuple(notice for _, notice in students.values() if notice)
    real_with = {name: getattr(target.video, name) for name in ("height", "width", "num_frames", "fps")}
    if clips.encoded:
        real_with |= {"decoded_with": made_of, "decode_chunk_size": options.decode_chunk_size}
    return Plan(
        options,
        output,
        methods,
        target,
        clips,
        [clips.identity(number) for number in range(len(clips))],
        protocol,
        fvd_frames,
        options.batch_size or data,
        notices,
        real_with,
        measured_with,
    )


def _check_names(names: list[str], target: str) -> None:
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"Two methods are called {twice[0]!r}: give each a name of its own.")
    if target not in ("", *names):
        raise UserError(f"config.target={target!r} is not one of the methods: {', '.join(names)}.")


def _check_images(folder: str) -> None:
    """The methods of a table begin with first frames, which weights for videos from text cannot."""
    found = weights.locate(folder)
    if (found / "unet_2d").is_dir() and not (found / "unet").is_dir():
        raise UserError(
            f"{folder} makes videos of prompts, and a table's are made of first frames: make them with osv_jax.sample"
            " --prompts, and score them with `evaluate fvd` and `evaluate clipscore`."
        )


def _check_apart(output: Path, videos: str) -> None:
    """The films must not be among the videos of the next run."""
    if videos in (demo.HELD_OUT, world.NAME):
        return
    folder, real = paths.real(demo.video_folder(videos)), paths.real(output)
    if folder in (real, *real.parents):
        raise UserError(
            f"The output {output} lies in {videos}, and its films would be among the videos: choose another."
        )


def _video_options(options: TableOptions, method: MethodOptions) -> Options:
    size: dict[str, Any] = {name: getattr(options, name) or None for name in ("height", "width", "num_frames", "fps")}
    same = ("motion_bucket_id", "noise_aug_strength", "decode_chunk_size")
    own = ("sampler", "steps", "min_guidance_scale", "max_guidance_scale")
    return Options(
        **size, **{name: getattr(options, name) for name in same}, **{name: getattr(method, name) for name in own}
    )


def _student_stamp(method: MethodOptions) -> Any:
    if not method.lora:
        return None
    path = weights.locate(method.lora)
    if not is_workdir(path):
        return stamp(path)
    # Of a run that goes on, what is read.
    return stamp(path / "config.json", path / "checkpoints" / str(checkpoint.latest_step(path)))


def _measures(options: TableOptions, video: CompleteOptions) -> tuple[Protocol | None, int, dict[str, Any]]:
    """FVD's protocol and frames, and what all measures depend on."""
    if options.lpips:
        load_lpips()
        if min(video.height, video.width) < SMALLEST_SIDE:
            raise UserError(
                f"Clips of {video.height} x {video.width} are too small for LPIPS, which takes {SMALLEST_SIDE} px at"
                " least: set config.lpips=False."
            )
    if not options.fvd_weights:
        return None, 0, {"lpips": options.lpips}
    protocol = protocols.PROTOCOLS[options.protocol]
    num_frames = min(protocol.num_frames, video.num_frames)
    check_frames(weights.load_config(options.fvd_weights, protocol.network), num_frames)
    depends_on: dict[str, Any] = {"protocol": protocol.name, "num_frames": num_frames}
    depends_on |= {"network": stamp(weights.locate(options.fvd_weights) / protocol.network)}
    return protocol, num_frames, {"lpips": options.lpips, "fvd": depends_on}
