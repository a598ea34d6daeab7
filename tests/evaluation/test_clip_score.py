"""CLIPScore against transformers' CLIP, with its own preprocessing and tokenizer."""

import shutil

import numpy as np
import pytest
import tiny_tokenizer
import torch
import transformers
from tool import convert as main
from torch_reference import randomise

from osv_jax import evaluate
from osv_jax.convert.clip import plan_clip
from osv_jax.convert.weights import load_config
from osv_jax.errors import UserError
from osv_jax.evaluation.clip_score import CLIPScore, clip_pixels
from osv_jax.runtime.media import write_video

PROMPTS = ["The cat on the car", "and the cat " * 40]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of transformers' in which a tower says only what is not as in ViT-B/32, the model, and our weights."""
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = tiny_tokenizer.save(folder / "clip")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": vocabulary, "eos_token_id": vocabulary - 1},
        vision_config=sizes | {"patch_size": 14, "image_size": 28},
        projection_dim=20,
    )
    model = randomise(transformers.CLIPModel(config), seed=7)
    model.save_pretrained(folder / "clip")
    assert main(["clip", str(folder / "clip"), str(folder / "weights")]) == 0
    return folder, model


def test_the_score_is_that_of_transformers(clip, rng):
    folder, model = clip
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "clip", model_max_length=77)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    score = CLIPScore(str(folder / "weights"))
    found = []
    for prompt in PROMPTS:
        # Neither side a multiple of the other: what is resized has an odd rest.
        frames = rng.integers(0, 256, (3, 45, 71, 3), np.uint8)
        pixels = images(list(frames), return_tensors="pt").pixel_values
        ours = np.stack([clip_pixels(frame, 28) for frame in frames])
        np.testing.assert_allclose(ours, pixels.permute(0, 2, 3, 1), atol=1e-5)
        inputs = tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            made = model(**inputs, pixel_values=pixels)
            cosines = (made.image_embeds @ made.text_embeds.T).clamp(min=0)
        expected = 100 * cosines.mean().item()
        assert score(frames, prompt) == pytest.approx(expected, rel=1e-3, abs=1e-3)
        found.append(expected)
    assert max(found) > 1 and min(found) == 0, "one of the videos fits a little, and one not at all"


def test_the_program_says_the_mean_over_videos(clip, tmp_path, capsys, rng):
    folder, _ = clip
    (tmp_path / "videos").mkdir()
    for i in range(2):
        frames = np.repeat(
            rng.integers(0, 256, (1, 4, 6, 3), np.uint8).repeat(16, axis=1).repeat(16, axis=2), 3, axis=0
        )
        write_video(tmp_path / "videos" / f"{i}.mp4", frames, 8)
    (tmp_path / "prompts.txt").write_text("The cat\nThe car\n")
    arguments = ["clipscore", f"--videos={tmp_path}/videos", f"--weights={folder}/weights", "--frames=3"]
    evaluate.main([*arguments, f"--prompts={tmp_path}/prompts.txt"])
    assert "CLIPScore (100 max(cos, 0), the first 3 frames): " in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("The cat\n")
    with pytest.raises(UserError, match="There are 2 videos and 1 prompts"):
        evaluate.main([*arguments, f"--prompts={tmp_path}/prompts.txt"])


def test_released_sizes_are_read(clip):
    """CLIP ViT-L/14's config.json says of its towers what differs from the base model, and no more."""
    folder, _ = clip
    assert load_config(folder / "weights", "clip_text").projection_dim == 20
    assert {plan.component for plan in plan_clip(folder / "clip")} == {"clip_text", "clip_vision"}


def test_its_import_does_not_replace_its_source(clip, tmp_path, capsys):
    folder, _ = clip
    source = shutil.copytree(folder / "clip", tmp_path / "clip_text")
    before = sorted(source.iterdir())
    assert main(["clip", str(source), str(tmp_path), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert "clip_text is its source" in error and error.count("\n") == 1
    assert sorted(source.iterdir()) == before
