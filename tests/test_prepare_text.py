"""Datasets for videos from text: latents of the image VAE and states of the captions, as the originals make them."""

import argparse
import pathlib

import numpy as np
import pytest
import tiny_animatediff
import torch
import transformers
from conftest import relative_error

from osv_jax import prepare
from osv_jax.data import latents, world
from osv_jax.data.cutting import Location
from osv_jax.data.schemas import TextSchema, schema_of
from osv_jax.errors import UserError
from osv_jax.preparation import pipeline as preparation
from osv_jax.preparation.sources import Source, SourceVideo

SIZE = {"num_frames": 3, "height": 16, "width": 24}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animatediff")
    networks = tiny_animatediff.save_checkpoint(folder)
    tiny_animatediff.import_all(folder, folder / "weights")
    return folder, networks


def states_of(checkpoint, prompts):
    """As diffusers' `encode_prompt` makes them."""
    folder, networks = checkpoint
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "sd" / "tokenizer", model_max_length=77)
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return networks["text_encoder"](ids)[0].numpy()


def modes_of(checkpoint, clip):
    vae = checkpoint[1]["vae"]
    with torch.no_grad():
        frames = torch.tensor(clip.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        return (vae.encode(frames).latent_dist.mode() * vae.config.scaling_factor).permute(0, 2, 3, 1).numpy()


@pytest.mark.integration
def test_clips_and_captions_are_encoded_as_the_originals_do(checkpoint, rng):
    weights = str(checkpoint[0] / "weights")
    args = prepare._parser().parse_args(["--source=world", f"--weights={weights}"])
    _, networks = preparation._networks(args, None)
    settings = preparation._settings(args, None, networks)
    chosen = {name: settings[name] for name in ("num_frames", "fps", "height", "width")}
    assert chosen == {"num_frames": 16, "fps": 7.5, "height": 512, "width": 512}
    encoder = preparation._encoder(weights, None, networks, settings | SIZE)
    assert encoder.schema == TextSchema(3, 8, 12, 4, num_tokens=77, text_size=24)
    clips, captions = rng.integers(0, 256, (2, 3, 16, 24, 3), np.uint8), ["The cat", "and the car " * 40]
    encoded = encoder(clips, encoder.inputs([("a", i, caption) for i, caption in enumerate(captions)], 0))
    assert encoded.keys() == {"latents", "text_embeddings"}
    assert relative_error(encoded["text_embeddings"], states_of(checkpoint, captions)) < 2e-5
    expected = np.stack([modes_of(checkpoint, clip) for clip in clips])
    assert relative_error(encoded["latents"], expected) < 2e-5
    decoded = encoder.decode(encoded["latents"][0])
    assert decoded.shape == (3, 16, 24, 3) and decoded.dtype == np.uint8


@pytest.mark.integration  # The program, with its decoding processes, as a whole and in shards.
def test_the_world_becomes_a_dataset_with_texts(checkpoint, tmp_path, capsys):
    weights = checkpoint[0] / "weights"
    arguments = ["--source=world", f"--weights={weights}", "--max_videos=3", "--test_videos=1", "--workers=1"]
    arguments += ["--num_frames=3", "--height=16", "--width=24", "--min_motion=0", "--videos_per_file=2"]
    prepare.main([*arguments, f"--output={tmp_path / 'whole'}"])
    assert "with captions of 77 tokens" in capsys.readouterr().out
    assert (tmp_path / "whole" / "contact_sheet.png").is_file()
    for shard in (0, 1):
        prepare.main([*arguments, f"--shard={shard}/2", f"--output={tmp_path}/{shard}"])
    prepare.main(["--merge", f"{tmp_path}/0", f"{tmp_path}/1", f"--output={tmp_path / 'merged'}"])
    datasets = [latents.open_dataset(tmp_path / name) for name in ("whole", "merged")]
    assert datasets[0].content_hash == datasets[1].content_hash
    for dataset in datasets:
        batch = next(iter(latents.latent_batches(dataset, 2, seed=0)))
        assert {name: batch[name].shape for name in batch} == {
            "latents": (2, 3, 8, 12, 4),
            "text_embeddings": (2, 77, 24),
            "empty_text_embeddings": (2, 77, 24),
            "fps": (2,),
            "clip_id": (2,),
        }
        for row in range(2):
            assert relative_error(batch["empty_text_embeddings"][row], states_of(checkpoint, [""])[0]) < 5e-3
            record = dataset.read(int(batch["clip_id"][row]))
            number = int(record["source"].rsplit("/", 1)[1])
            scene = world.scene(world.Address(0, "train", number))
            assert record["caption"] == scene.caption
            clip = world.draw(scene, 3, 7.5, 16, 24)
            for name, made in (
                ("text_embeddings", states_of(checkpoint, [scene.caption])[0]),
                ("latents", modes_of(checkpoint, clip)),
            ):
                np.testing.assert_array_equal(batch[name][row], record[name])
                assert relative_error(record[name], made) < 5e-3, "rounded to bfloat16"


def test_videos_without_captions_are_told_of(capsys):
    videos = [
        SourceVideo(name, Location((name,)), 0, caption) for name, caption in (("a.mp4", ""), ("b.mp4", "A cat."))
    ]
    preparation._tell_missing_captions(Source({"train": videos}, []))
    assert capsys.readouterr().out == "1 of 2 videos have no caption: they are given the empty prompt.\n"


def test_a_tokenizer_of_another_checkpoint_is_refused(checkpoint):
    weights = str(checkpoint[0] / "weights")
    _, networks = preparation._networks(argparse.Namespace(weights=weights), None)
    networks["text_encoder"] = type(networks["text_encoder"])(vocab_size=7)
    with pytest.raises(UserError, match=r"a tokenizer of .* tokens, and the text encoder 7"):
        preparation._encoder(weights, None, networks, SIZE | {"batch_size": 8, "dtype": "float32"})


def test_metadata_without_the_empty_prompt_is_not_ours():
    sizes = {"num_frames": 3, "latent_height": 2, "latent_width": 2, "latent_channels": 4}
    sizes |= {"num_tokens": 5, "text_size": 6}
    assert schema_of(sizes) == TextSchema(3, 2, 2, 4, 5, 6)
    states = np.arange(30, dtype=np.float32).reshape(5, 6)
    whole = latents.encode_empty_text(states)
    assert latents._has_empty_text(whole, sizes)
    for spoilt in (
        {},
        {"empty_text_embeddings": 3},
        {"empty_text_embeddings": "?"},
        latents.encode_empty_text(states[1:]),
    ):
        assert not latents._has_empty_text(spoilt, sizes)
    dataset = latents.LatentDataset(pathlib.Path(), schema_of(sizes), whole, ())
    np.testing.assert_array_equal(dataset.empty_text.astype(np.float32), states)
