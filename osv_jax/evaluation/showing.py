"""What people look at: the films, a contact sheet, and the page with both and the table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from osv_jax.errors import UserError
from osv_jax.evaluation.page import write_page
from osv_jax.evaluation.parts import load_part
from osv_jax.evaluation.planning import Method, Plan, folder_of
from osv_jax.evaluation.table import REAL, Row, shown_columns
from osv_jax.runtime import paths
from osv_jax.runtime.media import sample_grid, write_picture, write_video
from osv_jax.runtime.paths import Path

SHEET = "contact_sheet.png"
PAGE = "index.html"
_FILMS = "films"
_FILM = re.compile(r"\d{2,}_\d{2,}\.mp4")
_SHEET_CLIPS = 2


def shown_clips(plan: Plan, method: Method | None, most: int) -> UInt8[np.ndarray, "n f h w 3"]:
    """Frames of the first clips of those whose films are kept: real ones (None), or made by a method."""
    found: list[np.ndarray] = []
    for numbers in plan.batches():
        if len(found) < min(most, plan.options.films, len(plan.clips)):
            part = load_part(plan.file(method, numbers), "shown")
            found += list(part["shown"]) if part else []
    return np.stack(found[:most])


def sheet_rows(plan: Plan, most: int = _SHEET_CLIPS) -> dict[str, UInt8[np.ndarray, "f h w 3"]]:
    """The first clips, each by every method, with labels."""
    clips = {name: shown_clips(plan, method, most) for name, method in kinds(plan)}
    count = len(clips[REAL])
    return {f"{name} ({number + 1})": made[number] for number in range(count) for name, made in clips.items()}


def check_films(plan: Plan) -> None:
    """Checks, before anything is made, that films can be written and replace nothing but films.

    Raises:
        UserError: a file has their folder's name, or the real clips are in that folder.
    """
    films, videos = plan.output / _FILMS, folder_of(plan.options.videos)
    if videos is not None and paths.real(films) in (videos, *videos.parents):
        raise UserError(f"{films}, where the output's films go, holds {plan.options.videos}: choose another output.")
    if films.exists() and not films.is_dir():
        raise UserError(f"{films} is a file, where films go: choose another output, or move it away.")


def remove_films(folder: Path) -> None:
    """Removes what a table has left there, and nothing else."""
    for file in folder.glob("*.mp4"):  # `iterdir` finds no folder in a bucket that nothing is in.
        if _FILM.fullmatch(file.name):
            file.unlink()


def show(plan: Plan, rows: Sequence[Row], about: Sequence[tuple[str, str]]) -> None:
    """Writes the films, the contact sheet and the page."""
    (plan.output / _FILMS).mkdir(exist_ok=True)
    remove_films(plan.output / _FILMS)  # There may have been more.
    films: dict[str, list[str]] = {}
    for kind, (name, method) in enumerate(kinds(plan)):
        clips = shown_clips(plan, method, plan.options.films)
        films[name] = [f"{_FILMS}/{kind:02d}_{number:02d}.mp4" for number in range(len(clips))]
        for film, clip in zip(films[name], clips, strict=True):
            write_video(plan.output / film, clip, plan.video.fps)
    write_picture(plan.output / SHEET, sample_grid(sheet_rows(plan)))
    write_page(plan.output, f"{plan.options.weights} and its students", about, shown_columns(rows), rows, films)


def kinds(plan: Plan) -> Iterator[tuple[str, Method | None]]:
    """What is shown, by name: the real clips (None) and every method."""
    yield REAL, None
    for method in plan.methods:
        yield method.name, method
