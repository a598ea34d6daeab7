"""The discriminator: pieces against PyTorch's, heads against a second implementation, what may depend on what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import quick_jit, relative_error
from torch import nn as tnn
from torch.nn.utils.parametrizations import spectral_norm

from osv_jax.errors import UserError
from osv_jax.models.dinov2 import Dinov2, Dinov2Config
from osv_jax.models.discriminator import (
    Discriminator,
    _resize_to_patches,
    discriminate,
    discriminate_pixels,
    init_discriminator,
    pixel_shuffle,
)
from osv_jax.models.heads import SpectralConv
from osv_jax.runtime import mesh

TOLERANCE = 2e-5
WIDTH = 64
DISC = Discriminator(blocks=(0, 2))
BACKBONE = Dinov2(Dinov2Config(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, image_size=28))
LATENT_TO_RGB = [
    [0.3512, 0.2297, 0.3227],
    [0.3250, 0.4974, 0.2350],
    [-0.2829, 0.1762, 0.2721],
    [-0.2120, -0.2616, -0.7177],
]


def randomised(params, rng):
    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return values / np.float32(np.prod(leaf.shape[:-1]) ** 0.5)
        return 1 + 0.3 * values if path[-1].key == "scale" else 0.3 * values

    return jax.tree.map_with_path(draw, params)


@pytest.fixture(scope="module")
def variables():
    variables = quick_jit(lambda key: init_discriminator(DISC, key, WIDTH))(jax.random.key(0))
    return {**variables, "params": randomised(variables["params"], np.random.default_rng(1))}


@pytest.fixture(scope="module")
def backbone_params():
    shapes = jax.eval_shape(lambda: BACKBONE.init(jax.random.key(0), jnp.zeros((1, 28, 28, 3)), (0,)))["params"]
    return randomised(shapes, np.random.default_rng(2))


@pytest.fixture(scope="module")
def judge(backbone_params):
    return jax.jit(
        lambda variables, latents, update: discriminate(DISC, BACKBONE, variables, backbone_params, latents, update),
        static_argnums=2,
    )


@pytest.fixture(scope="module")
def score():
    return jax.jit(lambda variables, features: DISC.apply(variables, features, False, method="score"))


def latent_video(rng, frames=3, batch=2):
    return rng.standard_normal((batch, frames, 5, 11, 4)).astype(np.float32)


def test_pixel_shuffle_orders_channels_like_torch(rng):
    x = rng.standard_normal((2, 3, 5, 7, 3 * 16)).astype(np.float32)
    expected = tnn.PixelShuffle(4)(torch.tensor(x).permute(0, 1, 4, 2, 3)).permute(0, 1, 3, 4, 2)
    np.testing.assert_array_equal(pixel_shuffle(x, 4), expected.numpy())


def test_initial_upsampler_is_the_linear_latent_to_rgb_map(rng):
    latents = latent_video(rng)
    fresh = DISC.init(jax.random.key(0), latents, method="pixels")
    pixels = DISC.apply(fresh, latents, method="pixels")
    rgb = latents.astype(np.float64) @ np.array(LATENT_TO_RGB)
    expected = (rgb.repeat(4, axis=2).repeat(4, axis=3) + 1) / 2
    assert relative_error(pixels, expected) < 1e-6


@pytest.mark.integration
def test_trained_upsampler_matches_torch(rng, variables):
    latents = latent_video(rng)
    upsampler = variables["params"]["upsampler"]
    conv = tnn.Conv2d(4, 48, 3, padding=1)
    conv.load_state_dict({"weight": torch_kernel(upsampler["kernel"]), "bias": torch.tensor(upsampler["bias"])})
    frames = torch.tensor(latents).flatten(0, 1).permute(0, 3, 1, 2)
    expected = ((tnn.PixelShuffle(4)(conv(frames)) + 1) / 2).permute(0, 2, 3, 1).unflatten(0, (2, 3))
    assert relative_error(DISC.apply(variables, latents, method="pixels"), expected.detach()) < TOLERANCE


@pytest.mark.parametrize(("side", "expected"), [(3, 14), (20, 14), (21, 28), (28, 28), (160, 154), (288, 294)])
def test_resize_goes_to_the_nearest_multiple_like_torch(rng, side, expected):
    image = rng.uniform(0, 1, (1, side, 30, 3)).astype(np.float32)
    resized = _resize_to_patches(image, 14)
    assert resized.shape == (1, expected, 28, 3)
    reference = tnn.functional.interpolate(
        torch.tensor(image).permute(0, 3, 1, 2), (expected, 28), mode="bilinear", align_corners=False, antialias=False
    )
    assert relative_error(resized, reference.permute(0, 2, 3, 1)) < TOLERANCE


def spectral_conv(rng):
    module, x = SpectralConv(6, (3, 3), jnp.float32, jnp.float32), rng.standard_normal((2, 5, 7, 4)).astype(np.float32)
    return module, x, module.init(jax.random.key(3), x, False)


def test_spectral_norm_finds_the_largest_singular_value(rng):
    module, x, variables = spectral_conv(rng)
    step = jax.jit(lambda variables: module.apply(variables, x, True, mutable=["spectral"]))
    for _ in range(30):
        y, updated = step(variables)
        variables = {**variables, **updated}
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    sigma = np.linalg.svd(kernel.reshape(-1, 6), compute_uv=False)[0]
    expected = tnn.functional.conv2d(
        torch.tensor(x).permute(0, 3, 1, 2), torch_kernel(kernel / sigma).float(), padding=1
    ).permute(0, 2, 3, 1)
    assert relative_error(y, expected) < 1e-4


def test_spectral_norm_starts_close_to_the_largest_singular_value(rng):
    *_, variables = spectral_conv(rng)
    kernel = np.asarray(variables["params"]["kernel"]).reshape(-1, 6)
    sigma = np.linalg.norm(kernel @ np.asarray(variables["spectral"]["u"]))
    assert relative_error(sigma, np.linalg.svd(kernel, compute_uv=False)[0]) < 0.02


def test_spectral_norm_and_its_gradient_match_torch_in_training(rng):
    module, x, variables = spectral_conv(rng)
    params = randomised(variables["params"], rng)
    u = rng.standard_normal(6).astype(np.float32)
    variables = {"params": params, "spectral": {"u": u / np.linalg.norm(u)}}
    weights = rng.standard_normal((2, 5, 7, 6)).astype(np.float32)

    def loss(params, x):
        y, updated = module.apply({**variables, "params": params}, x, True, mutable=["spectral"])
        return jnp.sum(y * weights), (y, updated["spectral"]["u"])

    gradients, (y, new_u) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    reference = torch_conv(params, variables["spectral"]["u"], padding=1).train()
    torch_x = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    torch_y = reference(torch_x)
    (torch_y.permute(0, 2, 3, 1) * torch.tensor(weights)).sum().backward()
    parametrization = reference.parametrizations.weight
    assert relative_error(y, torch_y.detach().permute(0, 2, 3, 1)) < TOLERANCE
    assert relative_error(new_u, parametrization[0]._u) < TOLERANCE
    assert relative_error(torch_kernel(gradients[0]["kernel"]), parametrization.original.grad) < TOLERANCE
    assert relative_error(gradients[1], torch_x.grad.permute(0, 2, 3, 1)) < TOLERANCE


def torch_kernel(kernel):
    """[*window in out] -> [out in *window]"""
    return torch.tensor(np.moveaxis(np.asarray(kernel), (-1, -2), (0, 1)).copy())


def torch_conv(params, u, padding):
    """A torch convolution with spectral norm, holding our kernel, bias and singular vector."""
    kernel = torch_kernel(params["kernel"])
    out_channels, in_channels, *window = kernel.shape
    conv = (tnn.Conv1d if len(window) == 1 else tnn.Conv2d)(in_channels, out_channels, window, padding=padding)
    conv = spectral_norm(conv)
    with torch.no_grad():
        conv.parametrizations.weight.original.copy_(kernel)
        conv.bias.copy_(torch.tensor(np.asarray(params["bias"])))
        norm = conv.parametrizations.weight[0]
        norm._u.copy_(torch.tensor(np.asarray(u)))
        norm._v.copy_(tnn.functional.normalize(kernel.flatten(1).T @ norm._u, dim=0))
    return conv.eval()


def torch_head(params, stats, x):
    """x: [n c *space]; the head of the paper's description, written with torch's layers."""
    convs = {
        name: torch_conv(params[name], stats[name]["u"], padding="same")
        for name in ("in_conv", "residual_conv", "out_conv")
    }

    def block(x, name):
        norm = params[f"{name}_norm"]
        y = tnn.functional.group_norm(
            convs[f"{name}_conv"](x), 32, torch.tensor(norm["scale"]), torch.tensor(norm["bias"])
        )
        return tnn.functional.leaky_relu(y, 0.2)

    x = block(x, "in")
    x = (x + block(x, "residual")) / np.sqrt(2)
    return convs["out_conv"](x)


@pytest.mark.parametrize("frames", [1, 5])
def test_heads_match_a_torch_implementation(rng, variables, score, frames):
    features = tuple(rng.standard_normal((2, frames, 3, 4, WIDTH)).astype(np.float32) for _ in DISC.blocks)
    logits = score(variables, features)
    expected = {"spatial": [], "temporal": []}
    with torch.no_grad():
        for level, x in enumerate(map(torch.tensor, features)):
            for kind, order in (("spatial", "b f c h w"), ("temporal", "b h w c f")):
                axes = ["bfhwc".index(axis) for axis in order.split()]
                lead = 2 if kind == "spatial" else 3
                name = f"{kind}_{level}"
                y = torch_head(
                    variables["params"][name],
                    variables["spectral"][name],
                    x.permute(axes).flatten(0, lead - 1),
                )
                expected[kind].append(y.reshape(2, -1))
    for kind, parts in expected.items():
        assert relative_error(logits[kind], torch.cat(parts, dim=1)) < TOLERANCE


@pytest.mark.integration
@pytest.mark.parametrize("frames", [1, 14, 25])
def test_any_number_of_frames_and_no_crosstalk_in_the_batch(rng, variables, judge, frames):
    latents = latent_video(rng, frames)
    logits, _ = judge(variables, latents, False)
    # 20 x 44 pixels become 14 x 42, which is 1 x 3 patches.
    assert logits["spatial"].shape == logits["temporal"].shape == (2, 2 * frames * 3)
    other = latents.copy()
    other[1] = latent_video(rng, frames)[1]
    changed, _ = judge(variables, other, False)
    for kind in logits:
        np.testing.assert_array_equal(logits[kind][0], changed[kind][0])
        assert relative_error(changed[kind][1], logits[kind][1]) > 0.01


def test_spatial_logits_see_one_frame_and_temporal_ones_one_track(rng, variables, score):
    features = tuple(rng.standard_normal((1, 5, 3, 4, WIDTH)).astype(np.float32) for _ in DISC.blocks)
    touched = tuple(x.copy() for x in features)
    for x in touched:
        x[0, 0, 0, 0] += 1
    before, after = (score(variables, x) for x in (features, touched))
    spatial = np.abs(after["spatial"] - before["spatial"]).reshape(2, 5, 12)
    temporal = np.abs(after["temporal"] - before["temporal"]).reshape(2, 12, 5)
    assert (spatial[:, 0] > 0).all()
    assert (spatial[:, 1:] == 0).all()
    assert (temporal[:, 0] > 0).all()
    assert (temporal[:, 1:] == 0).all()


def test_gradients_reach_all_of_psi_and_the_latents_but_not_the_backbone(rng, variables, backbone_params):
    @quick_jit
    def gradients(params, backbone_params, latents):
        def loss(params, backbone_params, latents):
            logits, _ = discriminate(
                DISC, BACKBONE, {**variables, "params": params}, backbone_params, latents, update_stats=False
            )
            return sum(jnp.mean(value**2) for value in logits.values())

        return jax.grad(loss, argnums=(0, 1, 2))(params, backbone_params, latents)

    psi, frozen, latents = gradients(variables["params"], backbone_params, latent_video(rng))
    for path, leaf in jax.tree_util.tree_leaves_with_path(psi):
        assert jnp.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    # The last rows and columns count too: every latent pixel is seen.
    assert (jnp.abs(latents).max(axis=-1) > 0).all()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(frozen))


@pytest.mark.integration
def test_update_stats_changes_only_what_the_next_call_starts_from(rng, variables, judge):
    latents = latent_video(rng)
    logits, kept = judge(variables, latents, False)
    jax.tree.map(np.testing.assert_array_equal, kept, variables["spectral"])
    trained, updated = judge(variables, latents, True)
    assert jax.tree.structure(updated) == jax.tree.structure(kept)
    assert relative_error(updated["spatial_0"]["in_conv"]["u"], kept["spatial_0"]["in_conv"]["u"]) > 1e-3
    assert relative_error(trained["spatial"], logits["spatial"]) > 1e-3
    # Judging with the updated vectors is what the updating call did.
    again, _ = judge({**variables, "spectral": updated}, latents, False)
    assert relative_error(again["spatial"], trained["spatial"]) < TOLERANCE


def test_backbone_sees_imagenet_normalised_patches(variables):
    class Seen(Exception):
        pass

    class Spy(Dinov2):
        def apply(self, variables, images, blocks, read):
            raise Seen(variables, images, blocks)

    grey = np.full((1, 2, 25, 30, 3), 0.5, np.float32)
    with pytest.raises(Seen) as seen:
        discriminate_pixels(DISC, Spy(BACKBONE.config), variables, {"weight": jnp.ones(1)}, grey, update_stats=False)
    params, images, blocks = seen.value.args
    assert params == {"params": {"weight": 1}}
    assert blocks == (0, 2)
    assert images.shape == (2, 28, 28, 3)
    expected = (0.5 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert relative_error(images, np.broadcast_to(expected, images.shape)) < TOLERANCE


@pytest.mark.integration
def test_bfloat16_is_finite_and_close(rng, variables, backbone_params, judge):
    latents = latent_video(rng)
    half = DISC.clone(dtype=jnp.bfloat16), BACKBONE.clone(dtype=jnp.bfloat16)
    logits, updated = jax.jit(lambda z: discriminate(*half, variables, backbone_params, z, True))(latents)
    exact, _ = judge(variables, latents, True)
    for kind, value in logits.items():
        assert value.dtype == jnp.float32
        assert relative_error(value, exact[kind]) < 0.1
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updated))


def test_odd_feature_width_is_refused():
    with pytest.raises(UserError, match="features of width 48"):
        init_discriminator(DISC, jax.random.key(0), 48)


@pytest.mark.integration
@pytest.mark.parametrize("frames", [4, 3])
def test_devices_that_share_a_clip_share_the_backbones_work(rng, variables, backbone_params, frames):
    """Also when they do not divide the number of frames; the tokens of an image cannot be split."""
    latents = rng.standard_normal((1, frames, 6, 4, 4), np.float32)
    arguments = (variables, backbone_params, latents)

    def logits(variables, backbone_params, latents):
        return discriminate(DISC, BACKBONE, variables, backbone_params, latents, False)[0]

    alone = jax.jit(logits).lower(*arguments).compile()
    devices = mesh.make_mesh(1, 1, 2, devices=jax.devices()[:2])
    with jax.set_mesh(devices):
        placed = (*jax.device_put(arguments[:2], mesh.replicated(devices)),)
        placed += (jax.device_put(latents, mesh.batch_shardings(devices, latents)),)
        shared = jax.jit(logits).lower(*placed).compile()
    part = -(-frames // 2) / frames
    assert shared.cost_analysis()["flops"] < (part + 0.1) * alone.cost_analysis()["flops"]
    for kind, value in alone(*arguments).items():
        assert relative_error(shared(*placed)[kind], value) < TOLERANCE
