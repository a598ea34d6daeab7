"""CLIP's tokenizer where there is no checkpoint's folder of it: OpenAI's vocabulary, as open-clip-torch ships it."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import zipfile
from typing import Any

from osv_jax.convert import text_to_video
from osv_jax.convert.tokenizer import BEGIN, END, FILES, byte_letters, read_files
from osv_jax.errors import UserError
from osv_jax.runtime import paths
from osv_jax.runtime.paths import Path, as_path

PACKAGE = "open-clip-torch"
_FILE = "bpe_simple_vocab_16e6.txt.gz"
_FETCH = f"`pip download --no-deps {PACKAGE}` fetches a package of 1.5 MB that has it"
# The file has 262,144 pairs, of which CLIP uses as many as make 49,408 tokens.
_PAIRS = 49_408 - 2 * 256 - 2
_MAX_BYTES = 2**25


def add_parser(commands: Any) -> None:
    """The command line of `run`."""
    parser = commands.add_parser("tokenizer", help="CLIP's tokenizer alone, for a model that came as one file")
    parser.add_argument("source", metavar="SOURCE", help=f"{PACKAGE}, its wheel, {_FILE}, or a tokenizer folder")
    parser.add_argument("output", metavar="OUTPUT", help="weights folder to write into")
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer that exists in OUTPUT")


def run(args: argparse.Namespace) -> None:
    """Writes it, and says how many tokens it has."""
    folder = text_to_video.tokenizer_of(args.output)
    if as_path(args.source).is_dir():
        text_to_video.copy_tokenizer(args.source, args.output, args.overwrite)
    else:
        made = read_vocabulary(args.source)
        text_to_video.check_tokenizer_output(args.output, args.overwrite)
        with paths.new_folder(folder) as partial:
            for name, text in zip(FILES, made, strict=True):
                (partial / name).write_text(text, encoding="utf-8")
    print(f"{len(read_files(folder)[0]):,} tokens, in {folder}")


def read_vocabulary(source: str | os.PathLike) -> tuple[str, str]:
    """What `vocab.json` and `merges.txt` of CLIP's tokenizer say.

    Tokens are numbered as in OpenAI's own tokenizer: bytes, bytes that end a word, what pairs make, begin and end.

    Args:
        source: `open-clip-torch` (the installed package), its wheel, or its bpe_simple_vocab_16e6.txt.gz.

    Raises:
        UserError: none of these, or a damaged one.
    """
    file = as_path(source)
    if str(source) == PACKAGE and not file.exists():
        advice = f"`pip install --no-deps {PACKAGE}` gives what is needed of it."
        file = paths.folder_of_package("open_clip", f"The package {PACKAGE} is not installed: {advice}") / _FILE
    if not file.is_file():
        raise UserError(f"{source} is no file: give {_FILE}, or the wheel it comes in ({_FETCH}).")
    try:
        _, *lines = _text(file).splitlines()
        pairs = [(first, second) for first, second in (line.split() for line in lines[:_PAIRS])]
    except Exception as error:  # What is damaged makes the unpackers raise anything.
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file} is not a readable {_FILE}, nor a wheel with one ({reason}): it is damaged or something else;"
            f" {_FETCH}."
        ) from error
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(f"{first}{second}" for first, second in pairs)]
    vocabulary = {token: index for index, token in enumerate([*tokens, BEGIN, END])}
    return json.dumps(vocabulary), "\n".join(["#version: 0.2", *map(" ".join, pairs), ""])


def _text(file: Path) -> str:
    data = file.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            data = wheel.read(next(name for name in wheel.namelist() if name.endswith(_FILE)))
    with gzip.open(io.BytesIO(data)) as unpacked:
        text = unpacked.read(_MAX_BYTES)
    return text.decode()
