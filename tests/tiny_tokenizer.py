"""A CLIP tokenizer's files with every byte and a few words, built as the published ones are."""

import json
import pathlib

from tokenizers.pre_tokenizers import ByteLevel

MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "o n</w>", "a n", "an d</w>", "2 5</w>", "ca r", "Ã ©</w>", "' s</w>"]


def save(folder: pathlib.Path) -> int:
    """Writes vocab.json and merges.txt; returns how many tokens there are."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return len(vocabulary)
