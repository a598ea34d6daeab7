"""From options to what has to be made, with all that can be refused before anything is loaded or compiled."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from osv_jax.convert import weights
from osv_jax.data import demo, world
from osv_jax.errors import UserError
from osv_jax.evaluation import protocols
from osv_jax.evaluation.clip_score import TOWERS
from osv_jax.evaluation.clips import Clips, open_clips
from osv_jax.evaluation.kinds import Kind, Video, kind_of
from osv_jax.evaluation.networks import check_frames
from osv_jax.evaluation.options import MethodOptions, TableOptions
from osv_jax.evaluation.protocols import Protocol
from osv_jax.evaluation.stamps import fingerprint, stamp
from osv_jax.inference.programs import check_devices
from osv_jax.inference.prompts import check_prompts, read_prompts
from osv_jax.inference.trained import Trained, is_workdir, read_student
from osv_jax.models.lpips import SMALLEST_SIDE, load_lpips
from osv_jax.runtime import checkpoint, paths
from osv_jax.runtime.paths import Path, as_path

# Changes whenever the same clips would be measured or made differently.
_FORMAT = 1
# Of table.json.
_TABLE_FORMAT = 2
# What a kill costs at most; a file for each would be many thousands.
CLIPS_IN_FILE = 16
_PARTS = "parts"


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table, ready to be made.

    Attributes:
        lora: a student, or None: the teacher.
        depends_on: what its clips do, beside the first frames or the prompts.
    """

    name: str
    lora: str | None
    ema: bool
    video: Video
    depends_on: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What has to be made.

    Attributes:
        options: as they were given.
        kind: what clips are made of.
        output: folder.
        methods: in the order of the table.
        target: the one to which `mse` is measured.
        clips: real ones, for all methods.
        prompts: of a file, one for each clip; empty: their captions, or first frames.
        identities: what each of them depends on; see `Clips.identity`.
        protocol: of FVD, or None.
        fvd_frames: so many of each clip are FVD's.
        batch_size: clips made at a time.
        notices: sentences about the students.
        real_with: what real clips depend on, beside their files.
        measured_with: what measures depend on, beside the clips.
    """

    options: TableOptions
    kind: Kind
    output: Path
    methods: tuple[Method, ...]
    target: Method
    clips: Clips
    prompts: Sequence[str]
    identities: Sequence[list[str | int | float]]
    protocol: Protocol | None
    fvd_frames: int
    batch_size: int
    notices: tuple[str, ...]
    real_with: dict[str, Any]
    measured_with: dict[str, Any]

    @property
    def video(self) -> Video:
        """Whose size, length and rate all clips have."""
        return self.target.video

    @property
    def data(self) -> int:
        """Groups of devices that share a batch."""
        return jax.local_device_count() // self.options.context

    def prompts_of(self, numbers: Sequence[int]) -> list[str]:
        """What some clips are made of; raises UserError where a clip has no caption."""
        found = [self.prompts[number] for number in numbers] if self.prompts else self.clips.captions(numbers)
        check_prompts(found)
        return found

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
        return fingerprint([_TABLE_FORMAT, kept, names, self.options.bootstrap, self.options.seed])


def make_plan(options: TableOptions, chosen: Sequence[MethodOptions]) -> Plan:
    """Reads what is small: configurations, students, which videos there are.

    Raises:
        UserError: on anything the user can fix.
    """
    _check_names([method.name for method in chosen], options.target)
    kind = kind_of(options.weights)
    given = {method.name: kind.options(options, method) for method in chosen}
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
    students = {(m.lora, m.ema): read_student(m.lora or None, m.ema, kind.shapes) for m in chosen}
    stored = weights.load_video(options.weights)
    # A student knows what it was trained on.
    first = next((trained for (lora, _), (trained, _) in students.items() if lora), Trained.none())
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    made_of = {"weights": stamp(*(weights.locate(options.weights) / name for name in kind.components)), "dtype": dtype}

    def method_of(method: MethodOptions) -> Method:
        trained, _ = students[method.lora, method.ema]
        video = kind.complete(given[method.name], stored, first, trained, options.context)
        depends_on = made_of | {"student": _student_stamp(method), "ema": method.ema, "seed": options.seed}
        return Method(
            method.name, method.lora or None, method.ema, video, depends_on | {"video": dataclasses.asdict(video)}
        )

    methods = tuple(map(method_of, chosen))
    target = next((method for method in methods if method.name == options.target), methods[0])
    protocol, fvd_frames, measured_with = _measures(options, target.video)
    vae = kind.configs[kind.vae]
    clips = open_clips(
        *(options.videos, options.clips, options.stride, target.video, vae, kind.of_prompts),
        cache=output / "clips.json",
    )
    prompts = _prompts(options, clips) if kind.of_prompts else ()
    identities = [clips.identity(number) for number in range(len(clips))]
    if prompts:
        identities = [[*identity, prompt] for identity, prompt in zip(identities, prompts, strict=True)]
    notices = tuple(notice for _, notice in students.values() if notice)
    real_with = {name: getattr(target.video, name) for name in ("height", "width", "num_frames", "fps")}
    if clips.encoded:
        real_with |= {"decoded_with": made_of, "decode_chunk_size": options.decode_chunk_size}
    return Plan(
        options,
        kind,
        output,
        methods,
        target,
        clips,
        prompts,
        identities,
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


def _prompts(options: TableOptions, clips: Clips) -> Sequence[str]:
    """The prompts of a file, one for each clip, or none where the clips have captions."""
    if options.prompts:
        prompts = read_prompts(options.prompts)
        if len(prompts) != len(clips):
            raise UserError(
                f"{options.prompts} has {len(prompts)} prompts, and there are {len(clips)} clips: give a line for each."
            )
        return prompts
    if not clips.captions([0])[0]:
        raise UserError(
            f"The clips of {options.videos} have no captions: give a file with a prompt for each, config.prompts."
        )
    return ()


def folder_of(videos: str) -> Path | None:
    """Where the real clips are, with links followed; nowhere what comes with the package."""
    return None if videos in (demo.HELD_OUT, world.NAME) else paths.real(demo.video_folder(videos))


def _check_apart(output: Path, videos: str) -> None:
    """The films must not be among the videos of the next run."""
    real = paths.real(output)
    if folder_of(videos) in (real, *real.parents):
        raise UserError(
            f"The output {output} lies in {videos}, and its films would be among the videos: choose another."
        )


def _student_stamp(method: MethodOptions) -> Any:
    if not method.lora:
        return None
    path = weights.locate(method.lora)
    if not is_workdir(path):
        return stamp(path)
    # Of a run that goes on, what is read.
    return stamp(path / "config.json", path / "checkpoints" / str(checkpoint.latest_step(path)))


def _measures(options: TableOptions, video: Video) -> tuple[Protocol | None, int, dict[str, Any]]:
    """FVD's protocol and frames, and what all measures depend on."""
    if options.lpips:
        load_lpips()
        if min(video.height, video.width) < SMALLEST_SIDE:
            raise UserError(
                f"Clips of {video.height} x {video.width} are too small for LPIPS, which takes {SMALLEST_SIDE} px at"
                " least: set config.lpips=False."
            )
    measured_with: dict[str, Any] = {"lpips": options.lpips}
    if options.clip_weights:
        for name in TOWERS:
            weights.load_config(options.clip_weights, name)
        measured_with["clip"] = stamp(*(weights.locate(options.clip_weights) / name for name in TOWERS))
    if not options.fvd_weights:
        return None, 0, measured_with
    protocol = protocols.PROTOCOLS[options.protocol]
    num_frames = min(protocol.num_frames, video.num_frames)
    check_frames(weights.load_config(options.fvd_weights, protocol.network), num_frames)
    depends_on: dict[str, Any] = {"protocol": protocol.name, "num_frames": num_frames}
    depends_on |= {"network": stamp(weights.locate(options.fvd_weights) / protocol.network)}
    return protocol, num_frames, measured_with | {"fvd": depends_on}
