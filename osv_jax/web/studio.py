"""What the pages compute: a student's video, and its teacher's from the same noise, of whatever videos are made of."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from jaxtyping import UInt8

from osv_jax.errors import UserError
from osv_jax.inference.programs import Pipeline
from osv_jax.runtime.media import check_rate, write_picture, write_video
from osv_jax.runtime.ranges import SEED
from osv_jax.web.jobs import Job
from osv_jax.web.results import IMAGE, Result, Results

STUDENT, TEACHER = "student", "teacher"
MAX_STEPS = 50
Size = tuple[int, int]
# Options of a video that leave nothing to the model: `CompleteOptions` or `CompleteTextOptions`.
Complete = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What one person wants.

    Attributes:
        size: height and width, of those offered.
        beside: whether the teacher's video is wanted, too.
        teacher_steps: of the sampler that the teacher has then.
    """

    sampler: str
    steps: int
    seed: int
    fps: float
    size: Size
    beside: bool = False
    teacher_steps: int = 25


RequestT = TypeVar("RequestT", bound=Request)


class Studio(abc.ABC, Generic[RequestT]):
    """The models, and where what they make is kept. One thread at a time computes with it.

    Attributes:
        default_steps: those of each sampler, in the order in which they are offered.
        student_sampler, teacher_sampler: what these begin with; a teacher beside its student has no other.
        max_bytes: of what one person may send at once.
        sizes: height and width of the videos that are offered.
    """

    default_steps: ClassVar[Mapping[str, int]]
    student_sampler: ClassVar[str]
    teacher_sampler: ClassVar[str]
    max_bytes: ClassVar[int]
    # Of the pipelines: their class, that of their options, and the parts whose time is told.
    _pipeline: ClassVar[Any]
    _options: ClassVar[type[Any]]
    _parts: ClassVar[Sequence[str]]

    def __init__(self, models: Mapping[str, Pipeline], sizes: Sequence[Size], num_frames: int | None, results: Results):
        """Args:
        models: `TEACHER`, or `STUDENT` and `TEACHER`; the first is the one that people choose a sampler for.
        num_frames: of all videos; None is the models' own.

        Raises:
            UserError: a size that the models cannot make.
        """
        self.models, self.results, self._num_frames = models, results, num_frames
        self.main = next(iter(models))
        self.own = self._complete()
        self.sizes = list(sizes) or [(self.own.height, self.own.width)]
        for height, width in self.sizes:
            self._complete(height=height, width=width)

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
            UserError: see `load` of the pipeline.
        """
        models = {TEACHER: cls._pipeline.load(weights, None, False, dtype, context=context)}
        if lora:
            student = cls._pipeline.load(weights, lora, ema, dtype, context=context)
            student.params |= {name: models[TEACHER].params[name] for name in student.params if name != "unet"}
            models = {STUDENT: student, **models}
        return cls(models, sizes, num_frames, results)

    @property
    def first_sampler(self) -> str:
        """What the page begins with."""
        return self._sampler_of(self.main)

    def check(self, request: RequestT) -> None:
        """Raises UserError on what cannot be made, before it waits in the queue."""
        self._inputs(request, self._plan(request))

    def make(self, request: RequestT, job: Job) -> Result:
        """Makes and keeps the videos of a request, telling the job how far they are.

        Raises:
            UserError: what videos cannot be made of, impossible options, or frames that are not finite.
            Cancelled: nobody wants them any more.
        """
        plan = self._plan(request)
        inputs = self._inputs(request, plan)
        made: dict[str, np.ndarray] = {}
        videos: list[dict[str, Any]] = []
        total, before = sum(options.num_evaluations for options in plan.values()), 0
        for name, options in plan.items():
            made[name], seconds = self._frames(name, inputs, request.seed, options, job, (before, total))
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
            **self._about(request),
            "seed": request.seed,
            "fps": request.fps,
            "height": request.size[0],
            "width": request.size[1],
            "videos": videos,
        }
        job.part = "writing"

        def write(folder: pathlib.Path) -> None:
            write_picture(folder / IMAGE, self._picture(inputs, made, request.size))
            for video in videos:
                start = time.perf_counter()
                for kind in ("mp4", "gif"):
                    write_video(folder / f"{video['name']}.{kind}", made[video["name"]], request.fps)
                video["seconds"]["write"] = time.perf_counter() - start

        return self.results.add(about, write)

    def compile(self, job: Job) -> None:
        """Makes a video of each size that is offered with each model, so that nobody waits for a program."""
        for height, width in self.sizes:
            for name in self.models:
                options = self._complete(sampler=self._sampler_of(name), steps=1, height=height, width=width)
                about = f"Preparing {height} x {width}, {name}: "
                self._frames(name, self._example((height, width)), 0, options, job, (0, options.num_evaluations), about)

    @abc.abstractmethod
    def _inputs(self, request: RequestT, plan: Mapping[str, Complete]) -> dict[str, Any]:
        """What a model is called with, beside the seed and its options.

        Raises:
            UserError: what videos cannot be made of.
        """

    @abc.abstractmethod
    def _example(self, size: Size) -> dict[str, Any]:
        """Some such inputs, to compile with."""

    @abc.abstractmethod
    def _chosen(self, request: RequestT, sampler: str) -> dict[str, Any]:
        """Options that only this kind of video has."""

    @abc.abstractmethod
    def _about(self, request: RequestT) -> dict[str, Any]:
        """What is told of a result beside what all have."""

    @abc.abstractmethod
    def _picture(
        self, inputs: Mapping[str, Any], made: Mapping[str, UInt8[np.ndarray, "f h w 3"]], size: Size
    ) -> UInt8[np.ndarray, "h w 3"]:
        """What the gallery shows of a result."""

    def _sampler_of(self, name: str) -> str:
        return self.teacher_sampler if name == TEACHER else self.student_sampler

    def _complete(self, **options: Any) -> Complete:
        return self.models[self.main].complete(self._options(num_frames=self._num_frames, **options))

    def _plan(self, request: RequestT) -> dict[str, Complete]:
        """The options of each video.

        Raises:
            UserError: what no model can do, or is not offered.
        """
        SEED.check("seed", request.seed)
        if request.size not in self.sizes:
            offered = ", ".join(f"{height} x {width}" for height, width in self.sizes)
            raise UserError(f"{request.size[0]} x {request.size[1]} is not offered here: choose {offered}.")
        steps = {self.main: (request.sampler, request.steps)}
        if request.beside and TEACHER not in steps:
            steps[TEACHER] = (self.teacher_sampler, request.teacher_steps)
        for _, number in steps.values():
            if number > MAX_STEPS:
                raise UserError(f"steps={number} is too many for this page: at most {MAX_STEPS}.")
        check_rate("a GIF.gif", request.fps)
        shared: dict[str, Any] = {"height": request.size[0], "width": request.size[1], "fps": request.fps}
        return {
            name: self._complete(sampler=sampler, steps=number, **shared, **self._chosen(request, sampler))
            for name, (sampler, number) in steps.items()
        }

    def _frames(
        self,
        name: str,
        inputs: Mapping[str, Any],
        seed: int,
        options: Complete,
        job: Job,
        evaluations: tuple[int, int],
        about: str = "",
    ) -> tuple[UInt8[np.ndarray, "f h w 3"], dict[str, float]]:
        """A model's video as `osv_jax.sample` makes it, and the seconds of its parts.

        Args:
            evaluations: network evaluations (NFE) of the job before this video, and in all.
        """
        model = self.models[name]
        # Of a step that is guided, both evaluations are one call.
        each = 2 if options.guided else 1
        model.seconds = dict.fromkeys(self._parts, 0.0)
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
        chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(self._options)}
        frames = model(**inputs, seed=seed, **chosen)
        model.wait()
        return frames, {part: value for part, value in model.seconds.items() if value}
