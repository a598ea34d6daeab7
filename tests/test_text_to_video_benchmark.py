"""The benchmark of text to video in miniature: its networks, what it would train, and its results."""

import importlib
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from osv_jax.convert.tokenizer import Tokenizer
from osv_jax.errors import UserError
from osv_jax.models.clip_text import CLIPTextConfig
from osv_jax.models.layers import apply
from osv_jax.models.svd_vae import SVDVAE, ImageVAE, VAEConfig
from osv_jax.objectives.random_networks import random_params, shapes_of
from osv_jax.runtime import command_line
from osv_jax.training.config import check_config

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # in ml_collections
BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.mark.parametrize("name", ["tiny", "full"])
def test_students_differ_in_score_matching_alone(load, name, tmp_path):
    benchmark = load("text_to_video")
    steps = benchmark.plan_steps(benchmark.SIZES[name], tmp_path)
    names, configs = [step.name for step in steps], {}
    for number, step in enumerate(steps):
        assert set(step.after) <= set(names[:number])
        if step.program == "train":
            configs[step.name] = command_line.read_config([a for a in step.arguments if a[:9] != "--workdir"])
            check_config(configs[step.name])
            assert configs[step.name].data.dataset == str(tmp_path / "latents")
    with_scores, without = (configs[name].to_dict() for name in ("student", "student_gan"))
    changed = {key: value for key, value in without.items() if value != with_scores[key]}
    assert changed == {"sdm_weight": 0.0} and with_scores["weights"] == str(tmp_path / "teacher")
    assert {way.student for way in benchmark.WAYS} == {"", "student", "student_gan"}
    assert (configs["unet"].part, configs["motion"].part) == ("unet", "motion")
    assert steps[0].command.startswith("python benchmarks/text_world.py ")


def test_every_word_of_a_caption_is_one_token(load, tmp_path):
    world, benchmark = load("text_world"), load("text_to_video")
    size = world.save_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    assert tokenizer.vocab_size == size
    prompts = benchmark.captions(range(50))
    tokens = tokenizer(prompts)
    assert not any(tokens.cut)
    words = [prompt.replace(";", " ;").replace(",", " ,").replace(".", " .").split() for prompt in prompts]
    # Begin, words, and ends up to the length.
    assert [int((row != row[-1]).sum()) for row in tokens.ids] == [1 + len(some) for some in words]
    assert tokenizer(["an unknown thing"]).cut == ("",)


def test_the_image_vae_is_the_video_vae_of_still_frames(load):
    """Without what looks along the frames; the end of the decoder is what it is to a frame that stands still."""
    world, config = load("text_world"), VAEConfig(block_out_channels=(16,), norm_num_groups=8)
    video = random_params(shapes_of({"vae": config})["vae"], 0, np.float32)
    params = {**video, "decoder": world.spatial(video["decoder"]), "post_quant_conv": world.identity(4)}
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 4, 4), np.float32))
    # Blocks that see each frame alone: the share of what looks along the frames is the factor's sigmoid.
    flat = flatten_dict(video["decoder"])
    decoder = {path: leaf - 40 if path[-1] == "mix_factor" else leaf for path, leaf in flat.items()}
    images = apply(ImageVAE(config), {"params": params}, latents, method="decode")
    alone, still = {**video, "decoder": unflatten_dict(decoder)}, jnp.repeat(latents[:, None], 3, axis=1)
    frames = apply(SVDVAE(config), {"params": alone}, still, method="decode")
    assert relative_error(frames[:, 1], images) < 1e-4


def test_motion_modules_begin_as_no_change(load):
    world = load("text_world")
    text = CLIPTextConfig(8, 8, 1, 1, vocab_size=8)
    made = world.first_parameters({"motion_adapter": world.MOTION, "text_encoder": text})
    module = made["motion_adapter"]["mid_block"]["motion_modules_0"]
    assert not np.any(module["proj_out"]["kernel"]) and np.any(module["proj_in"]["kernel"])


def test_results_are_made_of_what_is_there(load, tmp_path, monkeypatch, capsys):
    """With steps that do nothing, and clips in the place of samples."""
    benchmark = load("text_to_video")
    done = []
    for program in ("prepare", "train", "merge", "text_world"):
        monkeypatch.setitem(load("programs_in_steps").PROGRAMS, program, lambda arguments: done.append(arguments))
    monkeypatch.setattr(benchmark, "_load", lambda *_: None)
    rng = np.random.default_rng(0)
    made = []

    def some(model, what, *rest):
        made.append(what)
        return rng.integers(0, 256, (2, 16, 32, 48, 3), np.uint8)

    monkeypatch.setattr(benchmark, "decoded_clips", some)
    monkeypatch.setattr(benchmark, "sample", some)
    arguments = ["--size=tiny", f"--output={tmp_path / 'made'}"]
    benchmark.main(arguments)
    assert len(done) == 8 and made[:2] == [range(2), range(2, 4)] and made[2:] == list(benchmark.WAYS)
    found = json.loads((tmp_path / "made" / "text_to_video.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["real clips", "other real clips", *benchmark._names()]
    markdown = (tmp_path / "made" / "text_to_video.md").read_text()
    assert markdown.count("python -m osv_jax.train") == 4 and "| teacher, 25 steps |  |  | " in markdown
    with Image.open(tmp_path / "made" / "text_to_video.png") as picture:
        assert picture.width > 6 * 96
    benchmark.main(arguments)
    assert len(done) == 8 and len(made) == 2 + len(benchmark.WAYS)
    with pytest.raises(UserError, match="nowhere"):
        benchmark.main(["--size=tiny", f"--output={tmp_path / 'x'}", "--fvd_weights=nowhere"])


@pytest.mark.slow  # Eleven programs are compiled: minutes.
@pytest.mark.timeout(1800)
def test_the_whole_tiny_run(load, tmp_path):
    load("text_to_video").main(["--size=tiny", f"--output={tmp_path / 'made'}"])
    found = json.loads((tmp_path / "made" / "text_to_video.json").read_text())
    assert len(found["rows"]) == 6 and all(0 <= row["change"] < 255 for row in found["rows"])
