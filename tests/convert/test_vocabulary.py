"""CLIP's published vocabulary, from the package that ships it: indices as transformers' tokenizer and OpenAI's give."""

import gzip
import importlib.util
import pathlib
import sys
import zipfile

import numpy as np
import pytest
import tiny_tokenizer
import transformers
from test_tokenizer import PROMPTS
from tool import convert

from osv_jax.convert import vocabulary
from osv_jax.convert.text_to_video import tokenizer_of
from osv_jax.convert.tokenizer import Tokenizer, read_files
from osv_jax.errors import UserError

NAME = "bpe_simple_vocab_16e6.txt.gz"
MORE = [
    "a photo of a cat",
    "A cinematic shot of an astronaut riding a horse on Mars, 35mm film, golden hour, f/1.8, highly detailed, 8K.",
    "close-up of a girl's face; she's smiling... (bokeh:1.3), trending on artstation | unreal engine 5",
    "日本の桜が風に揺れる、スローモーション",
    "Una mujer camina por la playa al atardecer, cámara lenta",
]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published tokenizer, in a weights folder."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open-clip-torch is not installed: `make test` installs it, for its vocabulary")
    weights = tmp_path_factory.mktemp("weights")
    assert convert(["tokenizer", "open-clip-torch", str(weights)]) == 0
    return tokenizer_of(weights)


@pytest.fixture
def small(tmp_path):
    """A file such as the published one, with few pairs."""
    file = tmp_path / NAME
    file.write_bytes(gzip.compress("\n".join(['"#version: 0.2', *tiny_tokenizer.MERGES, ""]).encode()))
    return file


def test_prompts_are_tokenized_like_transformers_does(published):
    prompts = [*PROMPTS, *MORE]
    theirs = transformers.CLIPTokenizer.from_pretrained(published, model_max_length=77)
    ours = Tokenizer(published)
    expected = theirs(prompts, padding="max_length", truncation=True, return_tensors="np").input_ids
    for prompt, row, wanted in zip(prompts, ours(prompts).ids, expected, strict=True):
        np.testing.assert_array_equal(row, wanted, err_msg=repr(prompt))
    assert ours.vocab_size == theirs.vocab_size == 49_408


def test_indices_are_those_of_clip(published):
    np.testing.assert_array_equal(
        Tokenizer(published)(["a photo of a cat"], 8).ids, [[49406, 320, 1125, 539, 320, 2368, 49407, 49407]]
    )


def test_every_source_gives_the_same_files(small, tmp_path, capsys):
    wheel = tmp_path / "open_clip_torch-3.3.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("open_clip/__init__.py", "")
        archive.write(small, f"open_clip/{NAME}")
    tiny_tokenizer.save(tmp_path / "folder")
    for number, source in enumerate((small, wheel, tmp_path / "folder")):
        assert convert(["tokenizer", str(source), str(tmp_path / str(number))]) == 0
        assert "525 tokens, in " in capsys.readouterr().out
    first, *others = (read_files(tokenizer_of(tmp_path / str(number)))[1] for number in range(3))
    assert others == [first, first]
    # Only the order of the single bytes is another one in the folder of the tests, and no matter to the pairs.
    vocabularies = [read_files(tokenizer_of(tmp_path / str(number)))[0] for number in range(3)]
    assert vocabularies[0] == vocabularies[1] and vocabularies[0].keys() == vocabularies[2].keys()


def test_what_is_there_is_kept_unless_it_may_be_replaced(small, tmp_path, capsys):
    command = ["tokenizer", str(small), str(tmp_path / "weights")]
    assert convert(command) == 0
    assert convert(command) == 2 and "exists" in capsys.readouterr().err
    assert convert([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file: give bpe_simple_vocab"),
        (b"no gzip", "is not a readable bpe_simple_vocab"),
        (gzip.compress(b"#version\nt h\nthree of them\n"), "is not a readable bpe_simple_vocab"),
        (gzip.compress(b"\xff\xfe"), "is not a readable bpe_simple_vocab"),
        (gzip.compress(b"#version\nt h\n")[:-9], "is not a readable bpe_simple_vocab"),
    ],
    ids=["missing", "no gzip", "three", "no text", "cut"],
)
def test_spoilt_files_are_refused_in_one_sentence(tmp_path, content, message):
    file = tmp_path / NAME
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        vocabulary.read_vocabulary(file)


def test_a_wheel_without_it_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(UserError, match="nor a wheel with one"):
        vocabulary.read_vocabulary(tmp_path / "other.whl")


def test_without_the_package_it_says_which(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps open-clip-torch"):
        vocabulary.read_vocabulary("open-clip-torch")


def test_the_package_is_not_imported(published):
    """It would need PyTorch and more, which nobody who converts has to have."""
    assert pathlib.Path(importlib.util.find_spec("open_clip").origin).is_file()
    assert not any(name.split(".")[0] == "open_clip" for name in sys.modules)
