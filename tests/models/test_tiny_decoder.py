"""The tiny decoder against the same layers in PyTorch, from the file that these write."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from flax.traverse_util import unflatten_dict
from safetensors.torch import save_file
from tool import convert
from torch import nn
from torch_reference import randomise

from osv_jax.convert.tiny_decoder import plan_tiny_decoder
from osv_jax.convert.weights import load_config, load_params
from osv_jax.models.tiny_decoder import TinyDecoder, TinyDecoderConfig

CHANNELS, FRAMES, PART = 8, 25, 5
CONFIG = TinyDecoderConfig(channels=CHANNELS)
DECODER = TinyDecoder(CONFIG)


class Remembering(nn.Module):
    """A residual block of TAESDV: every frame beside the one before, zeros before the first."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(inputs * CHANNELS, CHANNELS, 3, padding=1) for inputs in (2, 1, 1)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x):
        before = torch.zeros_like(x)
        before[1:] = x[:-1]
        return torch.relu(x + self.conv(torch.cat([x, before], dim=1)))


def enlarged():
    blocks = [Remembering() for _ in range(3)]
    return [*blocks, nn.Upsample(scale_factor=2), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)]


class Reference(nn.Module):
    """TAESDV of a few channels, with an encoder in place of its own, for one clip [f c h w] at a time."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8, padding=1))
        first, last = nn.Conv2d(4, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 3, 3, padding=1)
        levels = [layer for _ in range(3) for layer in enlarged()]
        self.decoder = nn.Sequential(nn.Identity(), first, nn.ReLU(), *levels, Remembering(), last)

    def forward(self, latents):
        return self.decoder(3 * torch.tanh(latents / 3))


@pytest.fixture(scope="module")
def reference():
    return randomise(Reference()).requires_grad_(False)


@pytest.fixture(scope="module")
def file(reference, tmp_path_factory):
    file = tmp_path_factory.mktemp("taesdv") / "taesdv.pth"
    torch.save(reference.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def params(file):
    plan = plan_tiny_decoder(file)
    assert plan.config == CONFIG
    return unflatten_dict({tensor.path: tensor.read(plan.reader, np.float32) for tensor in plan.tensors})


@pytest.fixture(scope="module")
def latents():
    # Some of them so large that they are drawn in.
    return 2 * np.random.default_rng(0).standard_normal((2, FRAMES, 3, 5, 4), np.float32)


@pytest.fixture(scope="module")
def decode():
    return jax.jit(lambda params, *inputs: DECODER.apply({"params": params}, *inputs))


@pytest.fixture(scope="module")
def whole(decode, params, latents):
    return decode(params, latents, DECODER.memory(latents))[0]


def test_frames_are_the_originals(reference, latents, whole):
    clips = [reference(torch.tensor(clip).movedim(-1, 1)).movedim(1, -1).numpy() for clip in latents]
    assert whole.shape == (2, FRAMES, 24, 40, 3)
    # The original's are from 0 to 1.
    assert relative_error((whole + 1) / 2, np.stack(clips)) <= 2e-5


def test_a_film_is_the_same_in_parts(decode, params, latents, whole):
    """Whose memory is what they end with; without it every part would begin anew."""
    memory = none = DECODER.memory(latents)
    for start in range(0, FRAMES, PART):
        frames, memory = decode(params, latents[:, start : start + PART], memory)
        assert relative_error(frames, whole[:, start : start + PART]) <= 1e-6
    assert relative_error(decode(params, latents[:, -PART:], none)[0], whole[:, -PART:]) > 0.01


def test_half_precision_is_within_its_own(params, latents, whole):
    rough = TinyDecoder(CONFIG, jnp.bfloat16, jnp.bfloat16)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    frames, memory = jax.jit(rough.apply)({"params": half}, latents[:, :2])
    assert frames.dtype == jnp.float32 and {leaf.dtype for leaf in memory} == {jnp.dtype(jnp.bfloat16)}
    assert 0 < relative_error(frames, whole[:, :2]) < 0.07


def test_it_is_imported_beside_the_other_networks(reference, params, tmp_path, capsys):
    """Also from safetensors, and with names of an encoder that is not used."""
    save_file(reference.state_dict(), tmp_path / "taesdv.safetensors")
    (tmp_path / "weights" / "vae").mkdir(parents=True)
    assert convert(["tiny-decoder", str(tmp_path / "taesdv.safetensors"), str(tmp_path / "weights")]) == 0
    assert "tiny_decoder: 67 tensors" in capsys.readouterr().out
    assert load_config(tmp_path / "weights", "tiny_decoder") == CONFIG
    read = load_params(tmp_path / "weights", "tiny_decoder")
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # TAESD, which sees one picture.
        ({"decoder.3.conv.0.weight": torch.zeros(CHANNELS, CHANNELS, 3, 3)}, ["is not TAESDV", "sees two frames"]),
        ({"decoder.1.weight": None}, ["is not TAESDV"]),
        ({"decoder.9.conv.2.bias": None}, ["1 missing tensors (decoder.9.conv.2.bias)"]),
        ({"decoder.25.weight": torch.zeros(3)}, ["decoder.25.weight"]),
        ({"decoder.19.bias": torch.full((3,), torch.nan)}, ["decoder.19.bias", "NaN"]),
    ],
)
def test_other_files_are_refused(reference, change, words, tmp_path, capsys):
    tensors = {name: value for name, value in (reference.state_dict() | change).items() if value is not None}
    torch.save(tensors, tmp_path / "other.pth")
    assert convert(["tiny-decoder", str(tmp_path / "other.pth"), str(tmp_path / "weights")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert all(word in line for word in words), line
    assert not pathlib.Path(tmp_path / "weights" / "tiny_decoder").exists()
