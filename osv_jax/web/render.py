"""Results and progress as HTML. Every text of others is escaped."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any

from osv_jax.web.results import IMAGE, Result

# Where the server has the files of results.
RESULTS = "results"


def progress(part: str, fraction: float) -> str:
    """What is being done, with a bar."""
    percent = round(100 * min(max(fraction, 0), 1))
    bar = f'<div class="bar" role="progressbar" aria-valuenow="{percent}"><span style="width:{percent}%"></span></div>'
    return f'<div class="progress" role="status"><span class="part">{html.escape(part)}</span>{bar}</div>'


def message(text: str) -> str:
    """A sentence above the page, or nothing."""
    return f'<p class="notice" role="status">{html.escape(text)}</p>' if text else ""


def player(result: Result | None) -> str:
    """The videos of a result side by side, which `page.js` plays in step; how they were made; and their files."""
    if result is None:
        return '<p class="empty">Videos appear here.</p>'
    about = result.about
    films = "".join(_film(result, video) for video in about["videos"])
    controls = (
        '<div class="controls"><button type="button" class="play">Play</button>'
        '<input type="range" class="scrub" min="0" max="1" step="any" value="0" aria-label="Time">'
        '<span class="time"></span></div>'
    )
    settings = [f"seed {about['seed']}", f"{about['fps']:g} fps"]
    if "prompt" in about:
        subject = f"“{about['prompt']}”"
        if any(video["sampler"] == "ddim" for video in about["videos"]):
            settings.append(f"guidance {about['guidance_scale']:g}")
        if about["negative_prompt"]:
            settings.append(f"without “{about['negative_prompt']}”")
    else:
        subject = str(about["image"])
        settings.append(f"motion {about['motion_bucket_id']:g}")
    made = html.escape(f"{subject} at {about['height']} x {about['width']}, {', '.join(settings)}")
    how = f'<p class="how">{made}</p>' + "".join(map(message, about.get("notices", ())))
    return (
        f'<div class="player" data-result="{result.identifier}"><div class="films">{films}</div>{controls}{how}</div>'
    )


def _film(result: Result, video: dict[str, Any]) -> str:
    name = html.escape(str(video["name"]))
    files = f"{RESULTS}/{result.identifier}/{name}"
    seconds = ", ".join(f"{html.escape(part)} {value:.2f} s" for part, value in video["seconds"].items())
    calls = f"{video['steps']} step{'s' * (video['steps'] != 1)}, {video['evaluations']} network evaluations"
    links = " ".join(
        f'<a href="{files}.{kind}" download="{name}-{result.identifier}.{kind}">{kind}</a>' for kind in ("mp4", "gif")
    )
    return (
        f'<figure><video src="{files}.mp4" muted playsinline preload="auto"></video>'
        f"<figcaption><b>{name}</b>, {html.escape(str(video['sampler']))}, {calls}<br>"
        f'<span class="seconds">{seconds}</span><br>Download {links}</figcaption></figure>'
    )


def gallery(results: Sequence[Result]) -> str:
    """A card for each, which says when it is clicked on; see `page.js`."""
    cards = "".join(
        f'<button type="button" class="card" data-result="{result.identifier}">'
        f'<img src="{RESULTS}/{result.identifier}/{IMAGE}" alt="" loading="lazy">'
        f"<span>{html.escape(_caption(result.about))}</span></button>"
        for result in results
    )
    return f'<div class="gallery">{cards}</div>' if cards else ""


def _caption(about: dict[str, Any]) -> str:
    made = f"{' and '.join(str(video['name']) for video in about['videos'])}, seed {about['seed']}"
    return f"{made}: {textwrap.shorten(about['prompt'], 60)}" if "prompt" in about else made
