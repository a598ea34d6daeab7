"""The autoencoders and their residual blocks against diffusers, with random weights everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from diffusers.models.resnet import Downsample2D, Upsample2D
from diffusers.models.resnet import SpatioTemporalResBlock as TorchSpatioTemporalResBlock
from flax.traverse_util import unflatten_dict
from jaxprs import equations
from tiny import CONFIGS as TINY_CONFIGS
from tiny import tiny_networks
from torch_reference import from_torch, random_params, to_torch, torch_state

from osv_jax.convert.architectures import expected_params
from osv_jax.errors import UserError
from osv_jax.models.resnet import Downsample, SpatioTemporalResBlock, Upsample
from osv_jax.models.svd_vae import SVDVAE, ImageVAE, VAEConfig

TOLERANCE = 1e-4
# The second one has the real depth of four stages, so that an image is eight times its latent.
CONFIGS = (VAEConfig(block_out_channels=(32, 64)), VAEConfig(block_out_channels=(32, 32, 64, 64)))


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: f"{len(config.block_out_channels)}stages")
def pair(request):
    config = request.param
    vae = SVDVAE(config)
    params = random_params(vae, jnp.zeros((1, 2, 16, 16, 3)))
    stages = len(config.block_out_channels)
    reference = AutoencoderKLTemporalDecoder(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * stages,
    ).eval()
    reference.load_state_dict(torch_state(params), strict=True)
    encode = jax.jit(lambda params, images: vae.apply({"params": params}, images, method="encode"))
    decode = jax.jit(lambda params, latents: vae.apply({"params": params}, latents, method="decode"))
    return config, vae, params, reference, encode, decode


def pixels(config, height, width, extra=0):
    return height * config.downscale + extra, width * config.downscale + extra


@pytest.mark.parametrize("extra", [0, 1], ids=["multiple", "remainder"])
def test_encoder_matches_diffusers(pair, rng, extra):
    config, _, params, reference, encode, _ = pair
    images = rng.uniform(-1, 1, (2, *pixels(config, 9, 15, extra), 3)).astype(np.float32)
    mean, logvar = encode(params, images)
    assert mean.shape == logvar.shape == (2, 9, 15, 4)
    with torch.no_grad():
        expected = reference.encode(to_torch(images)).latent_dist
    assert relative_error(mean, from_torch(expected.mean, (2,))) < TOLERANCE
    assert relative_error(logvar, from_torch(expected.logvar, (2,))) < TOLERANCE


def test_logvar_is_clipped_like_diffusers(pair, rng):
    config, _, params, reference, encode, _ = pair
    images = rng.uniform(-1, 1, (2, *pixels(config, 9, 15), 3)).astype(np.float32)
    wild = jax.tree.map(np.copy, params)
    wild["quant_conv"]["kernel"] *= 100
    with torch.no_grad():
        kernel = reference.quant_conv.weight.clone()
        reference.quant_conv.weight *= 100
        expected = reference.encode(to_torch(images)).latent_dist.logvar
        reference.quant_conv.weight.copy_(kernel)
    _, logvar = encode(wild, images)
    assert logvar.min() == -30
    assert logvar.max() == 20
    assert relative_error(logvar, from_torch(expected, (2,))) < TOLERANCE


@pytest.mark.parametrize(("frames", "size"), [(3, (9, 15)), pytest.param(14, (3, 5), marks=pytest.mark.integration)])
def test_decoder_matches_diffusers(pair, rng, frames, size):
    config, _, params, reference, _, decode = pair
    latents = rng.standard_normal((2, frames, *size, 4)).astype(np.float32)
    video = decode(params, latents)
    assert video.shape == (2, frames, *pixels(config, *size), 3)
    with torch.no_grad():
        expected = reference.decode(to_torch(latents), num_frames=frames).sample
    assert relative_error(video, from_torch(expected, (2, frames))) < TOLERANCE


@pytest.mark.integration
@pytest.mark.parametrize("pair", CONFIGS[1:], ids=["4stages"], indirect=True)
def test_whole_matches_diffusers(pair, rng):
    config, vae, params, reference, _, _ = pair
    video = rng.uniform(-1, 1, (2, 3, *pixels(config, 3, 5), 3)).astype(np.float32)
    with torch.no_grad():
        expected = from_torch(reference(to_torch(video), num_frames=3).sample, (2, 3))
    assert relative_error(jax.jit(vae.apply)({"params": params}, video), expected) < TOLERANCE


@pytest.mark.integration
@pytest.mark.parametrize("pair", CONFIGS[:1], ids=["2stages"], indirect=True)
def test_gradient_through_the_rematerialised_decoder_matches_torch(pair, rng):
    config, vae, params, reference, _, _ = pair
    latents = rng.standard_normal((2, 3, 3, 5, 4)).astype(np.float32)
    weights = rng.standard_normal((2, 3, *pixels(config, 3, 5), 3)).astype(np.float32)
    remat = vae.clone(remat="full")
    loss = lambda z, params: jnp.sum(remat.apply({"params": params}, z, method="decode") * weights)  # noqa: E731
    torch_latents = to_torch(latents).requires_grad_()
    (reference.decode(torch_latents, num_frames=3).sample * to_torch(weights)).sum().backward()
    gradient = jax.jit(jax.grad(loss))(latents, params)
    assert relative_error(gradient, from_torch(torch_latents.grad, (2, 3))) < TOLERANCE


@pytest.mark.parametrize(("method", "shape", "blocks"), [("encode", (1, 8, 8, 3), 7), ("decode", (1, 2, 4, 4, 4), 9)])
def test_remat_of_a_run_reaches_the_autoencoder(method, shape, blocks):
    """Every residual block and the attention are computed again."""
    params = unflatten_dict(expected_params("vae", TINY_CONFIGS["vae"]))

    def recomputed(remat):
        vae = tiny_networks(remat=remat).vae
        program = jax.make_jaxpr(lambda params, x: vae.apply({"params": params}, x, method=method))(
            params, jnp.zeros(shape)
        )
        return [eqn.params["policy"] for eqn in equations(program.jaxpr) if "prevent_cse" in eqn.params]

    assert recomputed("none") == []
    assert recomputed("full") == [None] * blocks
    assert recomputed("dots") == [jax.checkpoint_policies.dots_with_no_batch_dims_saveable] * blocks


@pytest.mark.integration
@pytest.mark.parametrize("pair", CONFIGS[:1], ids=["2stages"], indirect=True)
def test_bfloat16_stays_close(pair, rng):
    _, vae, params, _, _, decode = pair
    latents = rng.standard_normal((2, 3, 9, 15, 4)).astype(np.float32)
    half = vae.clone(dtype=jnp.bfloat16)
    rough = jax.jit(lambda params: half.apply({"params": params}, latents, method="decode"))(params)
    assert rough.dtype == jnp.bfloat16
    # bfloat16 resolves 0.4 %, which adds up to 1.1 % here.
    assert relative_error(rough, decode(params, latents)) < 0.15


def image_autoencoder(config):
    """PyTorch's autoencoder of Stable Diffusion 1.5."""
    stages = len(config.block_out_channels)
    return AutoencoderKL(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        norm_num_groups=config.norm_num_groups,
    )


def test_image_autoencoder_matches_diffusers(rng):
    config = VAEConfig(block_out_channels=(16, 32), norm_num_groups=8)
    vae, images = ImageVAE(config), rng.uniform(-1, 1, (3, 18, 30, 3)).astype(np.float32)
    latents = rng.standard_normal((3, 9, 15, 4)).astype(np.float32)
    params = random_params(vae, images)
    reference = image_autoencoder(config).eval()
    reference.load_state_dict(torch_state(params), strict=True)
    encode = jax.jit(lambda x: vae.apply({"params": params}, x, method="encode"))
    decode = jax.jit(lambda x: vae.apply({"params": params}, x, method="decode"))
    with torch.no_grad():
        expected = reference.encode(to_torch(images)).latent_dist.mean, reference.decode(to_torch(latents)).sample
    assert relative_error(encode(images)[0], from_torch(expected[0], (3,))) < 2e-5
    assert relative_error(decode(latents), from_torch(expected[1], (3,))) < 2e-5


@pytest.mark.parametrize("network", [SVDVAE, ImageVAE])
def test_real_size_has_the_names_and_shapes_of_diffusers(network):
    images = jnp.zeros((1, 1, 8, 8, 3) if network is SVDVAE else (1, 8, 8, 3))
    shapes = jax.eval_shape(network(VAEConfig()).init, jax.random.key(0), images)["params"]
    with torch.device("meta"):
        if network is SVDVAE:
            reference = AutoencoderKLTemporalDecoder(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
            ).state_dict()
        else:
            reference = image_autoencoder(VAEConfig()).state_dict()
    ours = torch_state(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes), copy=False)
    assert {name: tuple(tensor.shape) for name, tensor in reference.items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }


@pytest.mark.parametrize("switch_mix", [False, True], ids=["unet", "vae"])
def test_residual_block_with_time_embedding_matches_diffusers(rng, switch_mix):
    block = SpatioTemporalResBlock(64, 1e-6, 1e-3, switch_mix=switch_mix)
    x = rng.standard_normal((2, 3, 5, 7, 32)).astype(np.float32)
    temb = rng.standard_normal((2, 16)).astype(np.float32)
    params = random_params(block, x, temb)
    reference = TorchSpatioTemporalResBlock(
        32, 64, temb_channels=16, eps=1e-6, temporal_eps=1e-3, switch_spatial_to_temporal_mix=switch_mix
    )
    reference.load_state_dict(torch_state(params), strict=True)
    per_frame = torch.tensor(temb).repeat_interleave(3, dim=0)
    expected = from_torch(reference(to_torch(x), per_frame, torch.zeros(2, 3)), (2, 3))
    assert relative_error(block.apply({"params": params}, x, temb), expected) < TOLERANCE


@pytest.mark.parametrize("size", [(10, 14), (9, 13)], ids=["even", "odd"])
def test_resamplers_undo_each_other_like_diffusers(rng, size):
    x = rng.standard_normal((2, 3, *size, 32)).astype(np.float32)
    params = random_params(Downsample(), x)
    down, up = Downsample2D(32, use_conv=True, name="op"), Upsample2D(32, use_conv=True)
    down.load_state_dict(torch_state(params), strict=True)
    up.load_state_dict(torch_state(params), strict=True)
    small = Downsample().apply({"params": params}, x)
    expected = down(to_torch(x))
    assert relative_error(small, from_torch(expected, (2, 3))) < TOLERANCE
    large = Upsample().apply({"params": params}, small, size)
    assert relative_error(large, from_torch(up(expected, output_size=size), (2, 3))) < TOLERANCE


def test_gradients_through_upsampling_match_torch(rng):
    x, seen = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 5, 7, 32), (2, 3, 10, 14, 32)))
    params = random_params(Upsample(), x)
    torch_x = to_torch(x).requires_grad_()
    up = Upsample2D(32, use_conv=True)
    up.load_state_dict(torch_state(params), strict=True)
    (up(torch_x) * to_torch(seen)).sum().backward()
    x_bar, params_bar = jax.jit(
        jax.grad(lambda x, params: (Upsample().apply({"params": params}, x) * seen).sum(), argnums=(0, 1))
    )(x, params)
    assert relative_error(x_bar, from_torch(torch_x.grad, (2, 3))) < TOLERANCE
    for name, gradient in torch_state(params_bar).items():
        assert relative_error(gradient, up.get_parameter(name).grad) < TOLERANCE, name


def test_foreign_configs_are_refused():
    with pytest.raises(UserError, match="layers_per_block is 1"):
        VAEConfig(layers_per_block=1)
    with pytest.raises(UserError, match="multiples of 32"):
        VAEConfig(block_out_channels=(16, 32))
