"""Pictures of a run, as far as they are not drawn by whole runs."""

import jax
import jax.numpy as jnp
import micro_finetune
import numpy as np
import pytest
import tiny

from osv_jax.convert.weights import save_component
from osv_jax.errors import UserError
from osv_jax.models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from osv_jax.objectives.players import Player, TrainState
from osv_jax.objectives.random_networks import random_frozen
from osv_jax.runtime.media import to_uint8
from osv_jax.training import previews, setup
from osv_jax.training.config import check_config
from osv_jax.training.sampling import Sampler

# That of the smallest VAE.
CONFIG = TinyDecoderConfig(channels=8, num_upsamples=1)


def config_with(config, folder):
    """A configuration whose weights have this tiny decoder, and nothing else."""
    params = random_frozen({"tiny_decoder": config}, np.float32)["tiny_decoder"]
    save_component(folder / "tiny_decoder", "tiny_decoder", config, params, folder)
    made = micro_finetune.get_config()
    made.weights, made.preview_decoder = str(folder), "tiny"
    return made, params


def test_the_tiny_decoder_decodes_pictures(tmp_path, monkeypatch):
    config, params = config_with(CONFIG, tmp_path)
    latents = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 6, 4), np.float32)

    class Sampled(Sampler):
        """Nothing is sampled: the latents of a sample are given."""

        def encode(self, *arguments):
            return None, None

        def student(self, *arguments):
            return jnp.asarray(latents[1])

    monkeypatch.setattr(previews, "Sampler", Sampled)
    rows = {}
    monkeypatch.setattr(
        previews.media, "sample_grid", lambda drawn: rows.update(drawn) or np.zeros((8, 8, 3), np.uint8)
    )
    networks = setup.networks_of(config)
    objective = setup.objective_of(config, networks)
    draw = previews.make_picture(config, objective, {"latents": latents[0]}, tiny.one_device_mesh())
    draw(TrainState(jnp.zeros((), jnp.int32), {"student": Player({}, {}, ())}), {})
    decode = jax.jit(lambda clip: TinyDecoder(CONFIG).apply({"params": params}, clip)[0])
    expected = [to_uint8(decode(clip))[0] for clip in latents]
    for label, frames in zip(("real clip, decoded from its latents", objective.preview_label), expected, strict=True):
        np.testing.assert_allclose(rows[label].astype(int), frames, atol=1)


def test_a_tiny_decoder_of_another_vae_is_refused_before_anything_is_made(tmp_path):
    config, _ = config_with(TinyDecoderConfig(channels=8), tmp_path)
    with pytest.raises(UserError, match="makes 8 x 8 pixels of a latent of 4 channels, but the VAE 2 x 2 of 4"):
        setup.networks_of(config)
    config.weights = str(tmp_path / "none")
    with pytest.raises(UserError, match=r"none/tiny_decoder does not exist: make it with .*tiny-decoder TAESDV_PTH"):
        setup.networks_of(config)
    config.weights = ""
    with pytest.raises(UserError, match=r"config.preview_decoder='tiny' is in a weights folder: set config.weights"):
        check_config(config)
