"""Prompts as users give them, and names for what is made of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from osv_jax.convert.tokenizer import Tokens
from osv_jax.errors import UserError
from osv_jax.runtime.paths import as_path

_MOST_BYTES = 2**24
_NAME_LETTERS = 40


def read_prompts(file: str) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        UserError: a file that cannot be read as text, or has no prompts.
    """
    path = as_path(file)
    try:
        with path.open("rb") as opened:
            content = opened.read(_MOST_BYTES + 1)
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a text file with one prompt a line.") from error
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path} is longer than {_MOST_BYTES >> 20} MiB: give a text file with one prompt a line.")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts: write one on each line.")
    return prompts


def check_prompts(prompts: Sequence[str], negative: str = "") -> None:
    """Raises UserError for a prompt that says nothing, and for one, or a negative one, that is no text."""
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("A prompt is empty: say what the video is to show.")
    for prompt in (*prompts, negative):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # Of bytes that are no UTF-8, Python makes halves of letters.
            raise UserError(f"The prompt {_short(prompt)} is not UTF-8: type it anew.") from error


def names_of(prompts: Sequence[str]) -> list[str]:
    """A name for each prompt's video: its number, and the letters and digits it begins with."""
    names = []
    for i, prompt in enumerate(prompts):
        words = re.sub(r"[^\w]+|_+", "-", prompt.lower())[:_NAME_LETTERS].strip("-")
        names.append(f"{i + 1:03d}-{words}".rstrip("-"))
    return names


def cut_warnings(prompts: Sequence[str], tokens: Tokens) -> list[str]:
    """A sentence for every prompt that is longer than the text encoder takes, naming what it will not see."""
    length = tokens.ids.shape[1]
    return [
        f"The prompt {_short(prompt)} is longer than the {length} tokens of the text encoder, which will not see its"
        f" end: {cut!r}."
        for prompt, cut in zip(prompts, tokens.cut, strict=True)
        if cut
    ]


def _short(text: str) -> str:
    return repr(text if len(text) <= _NAME_LETTERS else f"{text[:_NAME_LETTERS]}...")
