"""The CLIP text encoder and its projection against transformers, with random weights everywhere."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import relative_error
from torch_reference import random_params, torch_state

from osv_jax.models.clip_text import CLIPText, CLIPTextConfig, CLIPTextProjection, CLIPTextProjectionConfig

CONFIG = CLIPTextConfig(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=3,
    layer_norm_eps=1e-2,
    vocab_size=31,
    max_position_embeddings=11,
)
END = 30


def tokens_of(*lengths):
    """Prompts of random tokens, ended and filled up with the end token."""
    tokens = np.random.default_rng(0).integers(0, END, (len(lengths), 11), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = END
    return tokens


# transformers looks for the highest token where the config has the end token of old files, 2, and else for the end.
@pytest.mark.parametrize("end", [2, END])
def test_states_and_projection_match_transformers(end):
    wanted = CLIPTextProjectionConfig(**dataclasses.asdict(CONFIG), projection_dim=20)
    projected, tokens = CLIPTextProjection(wanted), tokens_of(3, 10, 0)
    params = random_params(projected, tokens)
    config = transformers.CLIPTextConfig(**dataclasses.asdict(CONFIG), projection_dim=20, eos_token_id=end)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    model.load_state_dict(torch_state(params))
    with torch.no_grad():
        expected = model(torch.tensor(tokens))
    states = jax.jit(CLIPText(CONFIG).apply)({"params": {"text_model": params["text_model"]}}, tokens)
    assert relative_error(states, expected.last_hidden_state) < 2e-5
    embeddings = jax.jit(projected.apply)({"params": params}, tokens)
    assert relative_error(embeddings, expected.text_embeds) < 2e-5


def test_real_size_is_that_of_stable_diffusion():
    shapes = jax.eval_shape(CLIPText(CLIPTextConfig()).init, jax.random.key(0), np.zeros((1, 77), np.int32))["params"]
    with torch.device("meta"):
        config = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        model = transformers.CLIPTextModelWithProjection(config)
    ours = torch_state(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes), copy=False)
    assert {name: x.shape for name, x in ours.items()} == {
        name: tuple(x.shape) for name, x in model.state_dict().items() if name != "text_projection.weight"
    }
    assert sum(x.size for x in ours.values()) == 123_060_480


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match=r"takes up to 11 tokens, got 12\."):
        jax.eval_shape(CLIPText(CONFIG).init, jax.random.key(0), np.zeros((1, 12), np.int32))
