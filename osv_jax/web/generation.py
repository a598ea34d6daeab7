"""The page that makes videos."""

from __future__ import annotations

import asyncio
import importlib.resources
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from osv_jax.errors import UserError
from osv_jax.runtime.ranges import SEED
from osv_jax.web import render, studio
from osv_jax.web.forms import Form
from osv_jax.web.jobs import Cancelled, Job, Jobs
from osv_jax.web.studio import Studio

# Between two looks at how far a video is [s].
_LOOK = 0.25


def make_page(made: Studio, jobs: Jobs, form: Form) -> gr.Blocks:
    """The page.

    Args:
        form: of the studio's kind of videos.
    """
    compiling = Job(made.compile, patience=float("inf"))
    jobs.submit(compiling)
    sizes = [f"{height} x {width}" for height, width in made.sizes]
    first, has_student = made.first_sampler, len(made.models) > 1
    with gr.Blocks(title="osv_jax", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# {form.title}")
        notice = gr.HTML(elem_id="notice")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                own = form.add()
                with gr.Row():
                    sampler = gr.Dropdown(list(made.default_steps), value=first, label="Sampler", elem_id="sampler")
                    steps = gr.Slider(
                        1, studio.MAX_STEPS, made.default_steps[first], step=1, label="Steps", elem_id="steps"
                    )
                with gr.Row(equal_height=True):
                    seed = gr.Number(
                        0, label="Seed", precision=0, minimum=0, maximum=SEED.high, elem_id="seed", min_width=120
                    )
                    dice = gr.Button("⚄ Another seed", elem_id="dice", min_width=120)
                size = gr.Dropdown(sizes, value=sizes[0], label="Height x width [px]", elem_id="size")
                with gr.Accordion("More", open=False):
                    fps = gr.Slider(1, 50, made.own.fps, step=0.5, label="Frames a second", elem_id="fps")
                    own += form.add_more()
                beside = gr.Checkbox(False, label="The teacher beside it", visible=has_student, elem_id="beside")
                teacher_steps = gr.Slider(
                    *(1, studio.MAX_STEPS, made.default_steps[made.teacher_sampler]),
                    step=1,
                    label="Steps of the teacher",
                    visible=has_student,
                    elem_id="teacher_steps",
                )
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
                    stop = gr.Button("Cancel", elem_id="cancel", min_width=120)
            with gr.Column(scale=2, min_width=280):
                status = gr.HTML(elem_id="status")
                script = importlib.resources.files(__package__).joinpath("page.js").read_text("utf-8")
                shown = gr.HTML(render.player(None), js_on_load=script, elem_id="shown")
        gr.Markdown("## The last results")
        click = "element.addEventListener('click', (event) => { const card = event.target.closest('.card');"
        click += " if (card) trigger('click', {result: card.dataset.result}); })"
        gallery = gr.HTML(js_on_load=click, elem_id="gallery")
        timer = gr.Timer(1)

        async def generate(
            request: gr.Request,
            sampler: str,
            steps: int,
            seed: int | None,
            fps: float,
            size: str,
            beside: bool,
            teacher_steps: int,
            *values: Any,
        ) -> AsyncIterator[tuple[Any, ...]]:
            try:
                height, width = made.sizes[sizes.index(size)]
                wanted = form.request(
                    *values,
                    sampler=sampler,
                    steps=int(steps),
                    seed=int(seed or 0),
                    fps=fps,
                    size=(height, width),
                    beside=beside,
                    teacher_steps=int(teacher_steps),
                )
                await asyncio.to_thread(made.check, wanted)
                job = Job(lambda job: made.make(wanted, job), owner=request.session_hash or "")
                jobs.submit(job)
                try:
                    while not job.over.is_set():
                        job.watch()
                        yield render.progress(_where(jobs, job), job.fraction), gr.skip(), gr.skip()
                        await asyncio.sleep(_LOOK)
                finally:
                    job.cancel()
                if job.error is not None:
                    raise job.error
            except Cancelled:
                yield render.message("Cancelled."), gr.skip(), gr.skip()
            except UserError as error:
                yield render.message(str(error)), gr.skip(), gr.skip()
                raise gr.Error(str(error), title="", print_exception=False) from error
            except Exception as error:
                print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                sentence = "The server could not make this video; its log says why."
                yield render.message(sentence), gr.skip(), gr.skip()
                raise gr.Error(sentence, title="", print_exception=False) from error
            else:
                result = job.result
                newest = render.gallery(made.results.newest())
                yield render.message("Done."), render.player(result), newest

        def cancel(request: gr.Request) -> None:
            jobs.cancel(request.session_hash or "")

        def show(event: gr.EventData) -> str:
            return render.player(made.results.get(str(event._data.get("result"))))

        def refresh() -> tuple[str, Any]:
            return _notice(compiling), gr.Timer(active=not compiling.over.is_set())

        quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        inputs = [sampler, steps, seed, fps, size, beside, teacher_steps, *own]
        start.click(
            generate,
            inputs,
            [status, shown, gallery],
            concurrency_limit=None,
            api_visibility="private",
            show_progress="hidden",
        )
        stop.click(cancel, **quick)
        dice.click(lambda: random.randint(0, int(SEED.high)), outputs=seed, **quick)
        sampler.input(lambda chosen: made.default_steps[chosen], sampler, steps, **quick)
        gallery.click(show, outputs=shown, **quick)
        timer.tick(refresh, outputs=[notice, timer], **quick)
        page.load(
            lambda: (render.gallery(made.results.newest()), *refresh()), outputs=[gallery, notice, timer], **quick
        )
        page.unload(cancel)
    return page


def _where(jobs: Jobs, job: Job) -> str:
    """What a job does or waits for."""
    if jobs.current is job:
        return job.part or "beginning"
    ahead = jobs.before(job)
    return f"Waiting: {ahead} before you" if ahead else "beginning"


def _notice(compiling: Job) -> str:
    if isinstance(compiling.error, UserError):
        return render.message(str(compiling.error))
    if compiling.error is not None:
        return render.message("Compiling ahead has failed; the server's log says why.")
    if compiling.over.is_set():
        return ""
    return render.message(f"Compiling ahead; videos wait until it is done. {compiling.part}")
