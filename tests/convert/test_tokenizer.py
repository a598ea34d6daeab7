"""CLIP's tokenizer against transformers', on files of the published form; what is wrong with files, in one sentence."""

import json
import sys

import numpy as np
import pytest
import tiny_tokenizer
import transformers

from osv_jax.convert.tokenizer import Tokenizer
from osv_jax.errors import UserError

PROMPTS = [
    "",
    "   ",
    "The cat and the car on  25 caramels, it's CAT's!",
    "Un café d'ÉTÉ; cafe\u0301 in two code points",
    "İstanbul ΣΑΣ straße ﬁn Ⅷ ½ x²",
    "猫が走る 🐈\u200d⬛ \u00a0\u2003\ttabs\nand lines\r\n",
    "a <|endoftext|> inside, <|startoftext|>, <| endoftext |>",
    "don't we'll they'd I'm you've we're 'quoted' ''s",
    "(((masterpiece:1.2))), best_quality--ar 16:9 \\ / @#$%^&*",
    "\x00\x07 control \ufffd \ud7ff",
    "the cat " * 60,
    "word" * 40,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


@pytest.mark.parametrize("length", [77, 9])
def test_prompts_are_tokenized_like_transformers_does(folder, theirs, length):
    tokens = Tokenizer(folder)(PROMPTS, length)
    expected = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids
    assert tokens.ids.dtype == np.int32
    for prompt, ours, wanted in zip(PROMPTS, tokens.ids, expected, strict=True):
        np.testing.assert_array_equal(ours, wanted, err_msg=repr(prompt))


def test_an_empty_prompt_is_begin_and_end(folder):
    tokenizer = Tokenizer(folder)
    begin, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    np.testing.assert_array_equal(tokenizer([""], 5).ids, [[begin, end, end, end, end]])
    assert tokenizer([], 5).ids.shape == (0, 5)


def test_what_is_cut_is_told_as_diffusers_tells_it(folder, theirs):
    prompts = ["the cat on the car", "and then the cat " * 30]
    cut = Tokenizer(folder)(prompts).cut
    whole = theirs(prompts[1:]).input_ids
    assert cut == ("", theirs.batch_decode([whole[0][76:-1]])[0])
    assert cut[1].endswith("the cat")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "has no merges.txt"),
        (lambda folder: (folder / "vocab.json").write_text('{"a": 0, "b": 2}'), "does not number its tokens"),
        (lambda folder: (folder / "vocab.json").write_text('{"a": 0, "b": 1}'), "is not CLIP's"),
        (lambda folder: (folder / "merges.txt").write_text("t h\nno such</w>\n"), "1 of the pairs"),
        (lambda folder: (folder / "merges.txt").write_bytes(b"\xff\xfe"), "cannot be read"),
    ],
    ids=["missing", "numbers", "no end", "foreign merges", "no text"],
)
def test_spoilt_files_are_refused_in_one_sentence(tmp_path, spoil, message):
    tiny_tokenizer.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        Tokenizer(tmp_path)


def test_a_vocabulary_without_all_letters_would_have_unknown_tokens(folder, tmp_path):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["word"] = vocabulary.pop("x</w>")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text((folder / "merges.txt").read_text())
    with pytest.raises(UserError, match=r"no token for 1 of the letters .*'x</w>'.*unknown tokens"):
        Tokenizer(tmp_path)


def test_without_the_package_it_says_which(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'osv_jax\[text\]'"):
        Tokenizer(folder)


def test_the_vocabulary_is_numbered_as_json_says(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    tokenizer = Tokenizer(folder)
    assert tokenizer.vocab_size == len(vocabulary)
    assert tokenizer(["cat"], 4).ids[0, 1] == vocabulary["cat</w>"]
