"""CLIP's tokenizer from the files of a checkpoint: `vocab.json` and `merges.txt`, as in its `tokenizer` folder.

Reference: transformers' `CLIPTokenizer`, and how diffusers' `encode_prompt` calls it. The byte pair encoding is that of
the package `tokenizers`, which transformers uses, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from osv_jax.convert.json_files import read_json
from osv_jax.errors import UserError
from osv_jax.runtime.paths import Path

FILES = ("vocab.json", "merges.txt")
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Prompts as a text encoder takes them.

    Attributes:
        ids: begin, the prompt's tokens, and the end token from there on.
        cut: of each prompt, what did not fit in, as text; mostly nothing.
    """

    ids: Int[np.ndarray, "b t"]
    cut: tuple[str, ...]


class Tokenizer:
    """Text to the indices of CLIP's byte pairs; lower case, one space for several, unknown bytes as bytes.

    Attributes:
        vocab_size: of the files; a text encoder must have as many embeddings.
    """

    def __init__(self, folder: Path):
        """Reads the files.

        Raises:
            UserError: a file that is missing or damaged, or no package to encode with.
        """
        vocabulary, merges = read_files(folder)
        _check_bytes(folder, vocabulary)
        self.vocab_size = len(vocabulary)
        self._end = vocabulary[END]
        self._encoder = _encoder(vocabulary, merges)

    def __call__(self, prompts: Sequence[str], length: int = 77) -> Tokens:
        """Tokens of prompts, `length` each with begin and end; what is too long is cut before the end token.

        An empty prompt is a begin and an end token, as diffusers' is: what classifier-free guidance leads away from.
        """
        encoded = [self._encoder.encode(prompt).ids for prompt in prompts]
        kept = [ids if len(ids) <= length else [*ids[: length - 1], self._end] for ids in encoded]
        cut = tuple(self._text(ids[length - 1 : -1]) if len(ids) > length else "" for ids in encoded)
        rows = [ids + [self._end] * (length - len(ids)) for ids in kept]
        return Tokens(np.array(rows, np.int32).reshape(len(prompts), length), cut)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._encoder.decode(ids)).replace("</w>", " ").strip()


def read_files(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The indices of all tokens, and the pairs that are merged, the first ones first.

    Raises:
        UserError: a file that is missing or damaged.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]}: expected the tokenizer folder of a Stable Diffusion 1.5 checkpoint,"
            f" with {' and '.join(FILES)}."
        )
    vocabulary = read_json(folder / FILES[0])
    if sorted(map(str, vocabulary.values())) != sorted(map(str, range(len(vocabulary)))):
        raise UserError(f"{folder / FILES[0]} does not number its tokens from 0: download it again.")
    if not {BEGIN, END} <= vocabulary.keys() or max(vocabulary, key=vocabulary.__getitem__) != END:
        raise UserError(f"{folder / FILES[0]} is not CLIP's: expected {BEGIN}, and {END} as the last token.")
    return vocabulary, _read_merges(folder / FILES[1], vocabulary)


def _read_merges(file: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): download it again.") from error
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    known = [pair for pair in merges if len(pair) == 2 and {*pair, "".join(pair)} <= vocabulary.keys()]
    if len(known) < len(merges):
        raise UserError(
            f"{file} and {FILES[0]} beside it do not belong together: {len(merges) - len(known)} of the pairs are not"
            " of tokens there; download both again."
        )
    return [(first, second) for first, second in known]


def _check_bytes(folder: Path, vocabulary: dict[str, int]) -> None:
    """What a text is made of must all have tokens, alone and at the end of a word: else words would end a prompt."""
    missing = [token for letter in byte_letters() for token in (letter, f"{letter}</w>") if token not in vocabulary]
    if missing:
        raise UserError(
            f"{folder / FILES[0]} has no token for {len(missing)} of the letters that texts are made of (first:"
            f" {missing[0]!r}), so prompts would have unknown tokens: download it again."
        )


def byte_letters() -> list[str]:
    """GPT-2's letters for bytes, in its order: visible ones are themselves, the others are the next from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]


def _encoder(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    except ImportError as error:
        raise UserError("Reading prompts needs the package tokenizers: `pip install 'osv_jax[text]'`.") from error
    encoder = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END))
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    encoder.decoder = decoders.ByteLevel()
    # Where they stand in a prompt, they are the tokens, not text.
    encoder.add_special_tokens([BEGIN, END])
    encoder.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (BEGIN, vocabulary[BEGIN]), trim_offsets=False, add_prefix_space=False
    )
    return encoder
