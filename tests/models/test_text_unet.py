"""The UNets of Stable Diffusion 1.5 and AnimateDiff against diffusers, with random weights everywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import MotionAdapter as TorchMotionAdapter
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch_reference import random_params, to_torch, torch_state

from osv_jax.models.text_unet import (
    MotionAdapter,
    MotionConfig,
    MotionModule,
    SpatialTransformer,
    TextUNet,
    TextUNetConfig,
    frame_positions,
)

TOLERANCE = 2e-5
V1 = MotionConfig(motion_max_seq_length=24, use_motion_mid_block=False)
V2 = MotionConfig()
V3 = MotionConfig(use_motion_mid_block=False)

TINY = TextUNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    num_attention_heads=(2, 4),
    has_attention=(True, False),
    cross_attention_dim=24,
    norm_num_groups=8,
)
DEEP = dataclasses.replace(TINY, layers_per_block=2, transformer_layers_per_block=2, has_attention=(False, True))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a network runs twenty times slower on threads that have to wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_motion(config, version):
    return dataclasses.replace(
        version,
        block_out_channels=config.block_out_channels,
        motion_layers_per_block=config.layers_per_block,
        motion_num_attention_heads=4,
        motion_norm_num_groups=config.norm_num_groups,
    )


def torch_unet_2d(config):
    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.has_attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.has_attention)),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        transformer_layers_per_block=config.transformer_layers_per_block,
        attention_head_dim=config.num_attention_heads,
        cross_attention_dim=config.cross_attention_dim,
        norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
    )


def torch_adapter(motion):
    return TorchMotionAdapter(**dataclasses.asdict(motion))


def torch_motion_unet(config, motion):
    return UNetMotionModel.from_unet2d(torch_unet_2d(config), torch_adapter(motion), load_weights=False)


def fill(model, params):
    """Our parameters go into all of PyTorch's; its positions are computed, in either."""
    left = model.load_state_dict(torch_state(params), strict=False)
    assert not left.unexpected_keys
    assert all(name.endswith("pos_embed.pe") for name in left.missing_keys)
    return model.eval()


def random_inputs(config, frames, batch=2, tokens=7):
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((batch, frames, 9, 15, config.in_channels), np.float32)
    context = rng.standard_normal((batch, tokens, config.cross_attention_dim), np.float32)
    return sample, np.linspace(1, 999, batch, dtype=np.float32), context


def ours_and_theirs(config, motion, frames):
    network, inputs = TextUNet(config, motion), random_inputs(config, frames)
    params = random_params(network, *inputs)
    ours = jax.jit(network.apply)({"params": params}, *inputs)
    sample, t, context = (torch.tensor(x) for x in inputs)
    with torch.no_grad():
        # Neither of theirs repeats the text.
        context = context.repeat_interleave(frames, dim=0)
        if motion is None:
            model = fill(torch_unet_2d(config), params)
            theirs = model(to_torch(inputs[0]), t.repeat_interleave(frames, dim=0), context).sample
            theirs = theirs.permute(0, 2, 3, 1).reshape(ours.shape)
        else:
            model = fill(torch_motion_unet(config, motion), params)
            theirs = model(sample.permute(0, 4, 1, 2, 3), t, context).sample.permute(0, 2, 3, 4, 1)
    return ours, theirs.numpy()


@pytest.mark.integration
def test_2d_unet_matches_diffusers():
    ours, theirs = ours_and_theirs(DEEP, None, frames=2)
    assert ours.dtype == jnp.float32
    assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.integration
@pytest.mark.parametrize(
    ("version", "frames"),
    [pytest.param(V2, 16, id="16 frames, motion in the middle"), pytest.param(V1, 24, id="24 frames, none there")],
)
def test_motion_unet_matches_diffusers(version, frames):
    ours, theirs = ours_and_theirs(TINY, tiny_motion(TINY, version), frames)
    assert relative_error(ours, theirs) < TOLERANCE


def of_clip(theirs, x):
    return theirs.detach().reshape(*x.shape[:2], x.shape[-1], *x.shape[2:4]).permute(0, 1, 3, 4, 2).numpy()


@pytest.mark.parametrize("kind", ["spatial", "motion"])
def test_transformers_and_their_gradients_match_diffusers(rng, kind):
    motion, channels, frames = tiny_motion(TINY, V3), 32, 16
    x = rng.standard_normal((2, frames, 5, 7, channels), np.float32)
    context = rng.standard_normal((2, 7, TINY.cross_attention_dim), np.float32)
    direction = rng.standard_normal(x.shape, np.float32)
    theirs_x, theirs_context = to_torch(x).requires_grad_(), torch.tensor(context).requires_grad_()
    if kind == "motion":
        ours, inputs = MotionModule(motion), (x,)
        block = torch_motion_unet(TINY, motion).down_blocks[1].motion_modules[0]
        call = lambda: block(theirs_x, num_frames=frames)  # noqa: E731
    else:
        ours, inputs = SpatialTransformer(4, 2, 8), (x, context)
        block = torch_unet_2d(DEEP).down_blocks[1].attentions[0]
        per_frame = theirs_context.repeat_interleave(frames, dim=0)
        call = lambda: block(theirs_x, per_frame, return_dict=False)[0]  # noqa: E731
    params = random_params(ours, *inputs)
    fill(block, params)
    y, pull_back = jax.vjp(jax.jit(lambda *args: ours.apply({"params": params}, *args)), *inputs)
    expected = call()
    expected.backward(to_torch(direction))
    # Of what it adds to its input; the input itself would hide an error.
    assert relative_error(y - x, of_clip(expected, x) - x) < TOLERANCE
    gradients = pull_back(direction)
    assert relative_error(gradients[0] - direction, of_clip(theirs_x.grad, x) - direction) < TOLERANCE
    if kind == "spatial":
        assert relative_error(gradients[1], theirs_context.grad) < TOLERANCE


def test_positions_are_those_that_adapters_carry():
    block = torch_motion_unet(TINY, tiny_motion(TINY, V1)).down_blocks[1].motion_modules[0].transformer_blocks[0]
    assert relative_error(frame_positions(24, 32), block.pos_embed.pe[0]) < 1e-6


def shapes_of(module, *shapes):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    state = torch_state(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params), copy=False)
    return {name: x.shape for name, x in state.items()}


def their_shapes(model):
    return {name: tuple(x.shape) for name, x in model.state_dict().items() if not name.endswith("pos_embed.pe")}


def adapter_shapes(motion):
    return shapes_of(MotionAdapter(motion), *((1, 1, 1, 1, channels) for channels in motion.block_out_channels))


def test_real_sizes_are_those_of_diffusers():
    image = shapes_of(TextUNet(TextUNetConfig()), (1, 1, 8, 8, 4), (1,), (1, 1, 768))
    with torch.device("meta"):
        assert image == their_shapes(torch_unet_2d(TextUNetConfig()))
        for motion in (V1, V2, V3):
            assert adapter_shapes(motion) == their_shapes(torch_adapter(motion))
    # As published for Stable Diffusion 1.5.
    assert sum(map(np.prod, image.values())) == 859_520_964


@pytest.mark.parametrize("version", [V2, V3], ids=["v2", "v3"])
def test_a_video_model_is_a_2d_unet_and_a_motion_adapter(version):
    motion = tiny_motion(TINY, version)
    clip = (1, 1, 4, 4, 4), (1,), (1, 1, TINY.cross_attention_dim)
    video, image = shapes_of(TextUNet(TINY, motion), *clip), shapes_of(TextUNet(TINY), *clip)
    assert video == image | adapter_shapes(motion)
    assert not image.keys() & adapter_shapes(motion).keys()


def test_more_frames_than_positions_and_another_unet_are_refused():
    motion = tiny_motion(TINY, V1)
    shapes = random_inputs(TINY, 25)
    with pytest.raises(ValueError, match=r"takes up to 24 frames, got 25\."):
        jax.eval_shape(TextUNet(TINY, motion).init, jax.random.key(0), *shapes)
    with pytest.raises(ValueError, match="not made for the UNet"):
        jax.eval_shape(TextUNet(DEEP, motion).init, jax.random.key(0), *random_inputs(DEEP, 2))
