"""What the page computes: a student's video of an image, and its teacher's from the same noise."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from osv_jax.data.image import read_image
from osv_jax.data.video import cover
from osv_jax.diffusion import samplers
from osv_jax.errors import UserError
from osv_jax.inference.options import CompleteOptions, Options
from osv_jax.inference.pipeline import PARTS, ImageToVideo
from osv_jax.runtime.media import check_rate, write_picture, write_video
from osv_jax.runtime.ranges import SEED
from osv_jax.web.jobs import Job
from osv_jax.web.results import IMAGE, Result, Results

STUDENT, TEACHER = "student", "teacher"
# A larger upload is refused, in bytes and in pixels: decoded, these are 200 MB.
MAX_BYTES, MAX_PIXELS = 30_000_000, 50_000_000
MAX_STEPS = 50
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Request:
    """What one person wants.

    Attributes:
        image: a file.
        size: height and width, of those offered.
        beside: whether the teacher's video is wanted, too.
        teacher_steps: of Euler's method, which the teacher samples with.
    """

    image: str | os.PathLike
    sampler: str
    steps: int
    seed: int
    fps: float
    motion_bucket_id: float
    size: Size
    beside: bool = False
    teacher_steps: int = 25


class Studio:
    """The models, and where what they make is kept. One thread at a time computes with it.

    Attributes:
        sizes: height and width of the videos that are offered.
    """

    def __init__(
        self, models: Mapping[str, ImageToVideo], sizes: Sequence[Size], num_frames: int | None, results: Results
    ):
        """Args:
        models: `TEACHER`, or `STUDENT` and `TEACHER`; the first is the one that people choose a sampler for.
        num_frames: of all videos; None is the models' own.

        Raises:
            UserError: a size that the models cannot make.
        """
        self.models, self.results, self._num_frames = models, results, num_frames
        self.main = next(iter(models))
        self.own = self._complete(Options(num_frames=num_frames))
        self.sizes = list(sizes) or [(self.own.height, self.own.width)]
        for height, width in self.sizes:
            self._complete(Options(height=height, width=width, num_frames=num_frames))

    @classmethod
    def load(
        cls,
        weights: str,
        lora: str | None,
        ema: bool,
        dtype: str | None,
        context: int,
        sizes: Sequence[Size],
        num_frames: int | None,
        results: Results,
    ) -> Studio:
        """Loads the teacher, and with a LoRA the student, which share all but their UNets.

        Raises:
            UserError: see `ImageToVideo.load`.
        """
        models = {TEACHER: ImageToVideo.load(weights, None, False, dtype, context=context)}
        if lora:
            student = ImageToVideo.load(weights, lora, ema, dtype, context=context)
            student.params |= {name: models[TEACHER].params[name] for name in student.params if name != "unet"}
            models = {STUDENT: student, **models}
        return cls(models, sizes, num_frames, results)

    def check(self, request: Request) -> None:
        """Raises UserError on what cannot be made, before it waits in the queue."""
        self._plan(request)
        _read(request.image)

    def make(self, request: Request, job: Job) -> Result:
        """Makes and keeps the videos of a request, telling the job how far they are.

        Raises:
            UserError: an image that cannot be read, impossible options, or frames that are not finite.
            Cancelled: nobody wants them any more.
        """
        plan = self._plan(request)
        image = _read(request.image)
        made: dict[str, np.ndarray] = {}
        videos: list[dict[str, Any]] = []
        total, before = sum(options.num_evaluations for options in plan.values()), 0
        for name, options in plan.items():
            made[name], seconds = self._frames(name, image, request.seed, options, job, (before, total))
            before += options.num_evaluations
            videos.append(
                {
                    "name": name,
                    "sampler": options.sampler,
                    "steps": options.steps,
                    "evaluations": options.num_evaluations,
                    "seconds": seconds,
                }
            )
        about = {
            "image": pathlib.Path(request.image).name,
            "seed": request.seed,
            "fps": request.fps,
            "motion_bucket_id": request.motion_bucket_id,
            "height": request.size[0],
            "width": request.size[1],
            "videos": videos,
        }
        job.part = "writing"

        def write(folder: pathlib.Path) -> None:
            write_picture(folder / IMAGE, cover(image, *request.size))
            for video in videos:
                start = time.perf_counter()
                for kind in ("mp4", "gif"):
                    write_video(folder / f"{video['name']}.{kind}", made[video["name"]], request.fps)
                video["seconds"]["write"] = time.perf_counter() - start

        return self.results.add(about, write)

    def compile(self, job: Job) -> None:
        """Makes a video of each size that is offered with each model, so that nobody waits for a program."""
        grey = np.full((*self.sizes[0], 3), 128, np.uint8)
        for height, width in self.sizes:
            for name in self.models:
                sampler = "euler" if name == TEACHER else "tts"
                size: dict[str, Any] = {"height": height, "width": width, "num_frames": self._num_frames}
                options = self._complete(Options(sampler=sampler, steps=1, **size))
                about = f"Preparing {height} x {width}, {name}: "
                self._frames(name, grey, 0, options, job, (0, options.num_evaluations), about)

    def _complete(self, options: Options) -> CompleteOptions:
        return self.models[self.main].complete(options)

    def _plan(self, request: Request) -> dict[str, CompleteOptions]:
        """The options of each video.

        Raises:
            UserError: what no model can do, or is not offered.
        """
        SEED.check("seed", request.seed)
        if request.size not in self.sizes:
            offered = ", ".join(f"{height} x {width}" for height, width in self.sizes)
            raise UserError(f"{request.size[0]} x {request.size[1]} is not offered here: choose {offered}.")
        shared: dict[str, Any] = {
            "height": request.size[0],
            "width": request.size[1],
            "num_frames": self._num_frames,
            "fps": request.fps,
            "motion_bucket_id": request.motion_bucket_id,
        }
        steps = {self.main: (request.sampler, request.steps)}
        if request.beside and TEACHER not in steps:
            steps[TEACHER] = ("euler", request.teacher_steps)
        for _, number in steps.values():
            if number > MAX_STEPS:
                raise UserError(f"steps={number} is too many for this page: at most {MAX_STEPS}.")
        check_rate("a GIF.gif", request.fps)
        return {
            name: self._complete(Options(sampler=sampler, steps=number, **shared))
            for name, (sampler, number) in steps.items()
        }

    def _frames(
        self,
        name: str,
        image: UInt8[np.ndarray, "h0 w0 3"],
        seed: int,
        options: CompleteOptions,
        job: Job,
        evaluations: tuple[int, int],
        about: str = "",
    ) -> tuple[UInt8[np.ndarray, "f h w 3"], dict[str, float]]:
        """A model's video as `osv_jax.sample` makes it, and the seconds of its parts.

        Args:
            evaluations: network evaluations (NFE) of the job before this video, and in all.
        """
        model = self.models[name]
        calls = samplers.num_evaluations(options.sampler, options.steps, guided=False)
        each = options.num_evaluations // calls
        model.seconds = dict.fromkeys(PARTS, 0.0)
        about = about or (f"{name}: " if len(self.models) > 1 else "")

        def tell(part: str) -> None:
            job.part = about + part
            if part.startswith("UNet"):
                job.fraction = (evaluations[0] + (int(part.split()[1]) - 1) * each) / evaluations[1]
            elif part == "decode":
                job.fraction = (evaluations[0] + options.num_evaluations) / evaluations[1]

        def go_on() -> None:
            # The devices get one part after the other, so that what is cancelled ends with the one they are at.
            model.wait()
            job.check()

        model.on_part, model.before_part = tell, go_on
        chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
        frames = model(image, seed=seed, **chosen)
        model.wait()
        return frames, {part: value for part, value in model.seconds.items() if value}


def _read(path: str | os.PathLike) -> UInt8[np.ndarray, "h w 3"]:
    """The image, within the limits of uploads; messages give its name alone, not where it is."""
    path = pathlib.Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES // 1_000_000} MB: scale it down first.")
        return read_image(path, MAX_PIXELS)
    except OSError as error:
        raise UserError(f"{path.name} is not there any more: upload it again.") from error
    except UserError as error:
        raise UserError(str(error).replace(os.fspath(path), path.name)) from error
