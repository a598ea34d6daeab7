"""The SVD UNet against diffusers, with random weights everywhere, and what its options may and may not change."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import flat, quick_jit, relative_error
from flax.traverse_util import flatten_dict, unflatten_dict
from torch_reference import flax_params, torch_unet

from osv_jax.convert.architectures import expected_params
from osv_jax.models import attention, lora, products
from osv_jax.models.svd_unet import SVDUNet, TransformerSpatioTemporal, UNetConfig
from osv_jax.objectives.random_networks import random_params
from osv_jax.runtime import mesh

TOLERANCE = 2e-5
# bfloat16 resolves 0.4 %; what is rounded on the way to the output adds up to 1.3 %, and varies with the machine.
HALF_PRECISION = 0.15
THREE_LEVELS = UNetConfig(
    block_out_channels=(32, 64, 64),
    layers_per_block=2,
    num_attention_heads=(1, 2, 4),
    has_attention=(True, True, False),
    cross_attention_dim=24,
    addition_time_embed_dim=8,
)
TWO_LEVELS = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    num_attention_heads=(2, 2),
    has_attention=(False, True),
    transformer_layers_per_block=2,
    cross_attention_dim=24,
    addition_time_embed_dim=8,
)


def random_inputs(config, frames, height=9, width=15, batch=2, seed=0):
    """Sample, c_noise, embedding and ids, different for every clip."""
    rng = np.random.default_rng(seed)
    sample = rng.standard_normal((batch, frames, height, width, config.in_channels), np.float32)
    sigma = np.geomspace(0.01, 300.0, batch)
    embedding = rng.standard_normal((batch, config.cross_attention_dim), np.float32)
    ids = np.stack([np.linspace(6, 24, batch), np.linspace(127, 40, batch), np.geomspace(0.02, 0.3, batch)], axis=-1)
    return sample, (np.log(sigma) / 4).astype(np.float32), embedding, ids.astype(np.float32)


def run_torch(model, sample, c_noise, embedding, ids):
    sample = torch.tensor(sample).permute(0, 1, 4, 2, 3).contiguous()
    with torch.no_grad():
        out = model(sample, torch.tensor(c_noise), torch.tensor(embedding)[:, None], torch.tensor(ids)).sample
    return out.permute(0, 1, 3, 4, 2).numpy()


_THREE_LEVELS = pytest.param((THREE_LEVELS, 14), marks=pytest.mark.integration)


@pytest.fixture(scope="module", params=[_THREE_LEVELS, (TWO_LEVELS, 25)], ids=["three levels", "two levels"])
def network(request):
    """Config, frames, PyTorch's model, our parameters."""
    config, frames = request.param
    model = torch_unet(config)
    return config, frames, model, flax_params(model, "unet", config)


def test_network_matches_diffusers(network):
    config, frames, model, params = network
    inputs = random_inputs(config, frames)
    actual = jax.jit(SVDUNet(config).apply)({"params": params}, *inputs)
    assert actual.dtype == jnp.float32
    assert relative_error(actual, run_torch(model, *inputs)) < TOLERANCE


def test_transformer_matches_diffusers(network, rng):
    config, frames, model, params = network
    level = config.has_attention.index(True)
    heads, depth = config.num_attention_heads[level], config.transformer_layers_per_block
    channels = config.block_out_channels[level]
    x = rng.standard_normal((2, frames, 5, 7, channels), np.float32)
    context = rng.standard_normal((2, config.cross_attention_dim), np.float32)
    with torch.no_grad():
        expected = (
            model.down_blocks[level]
            .attentions[0](
                torch.tensor(x).permute(0, 1, 4, 2, 3).reshape(-1, channels, 5, 7).contiguous(),
                torch.tensor(context).repeat_interleave(frames, dim=0)[:, None],
                torch.zeros(2, frames),
            )
            .sample
        )
    expected = expected.reshape(2, frames, channels, 5, 7).permute(0, 1, 3, 4, 2)
    transformer = TransformerSpatioTemporal(heads, depth)
    actual = jax.jit(transformer.apply)({"params": params[f"down_blocks_{level}"]["attentions_0"]}, x, context)
    # Of what it adds to its input; the input itself would hide an error.
    assert relative_error(actual - x, expected.numpy() - x) < TOLERANCE


def test_attention_to_one_key_does_not_depend_on_queries(network, rng):
    config, _, model, params = network
    level = config.has_attention.index(True)
    block = model.down_blocks[level].attentions[0].transformer_blocks[0].attn2
    context = rng.standard_normal((2, config.cross_attention_dim), np.float32)
    queries = rng.standard_normal((2, 11, config.block_out_channels[level]), np.float32)
    with torch.no_grad():
        expected = block(torch.tensor(queries), torch.tensor(context)[:, None]).numpy()
    mine = params[f"down_blocks_{level}"]["attentions_0"]["transformer_blocks_0"]["attn2"]
    actual = attention.SingleKeyAttention(queries.shape[-1]).apply({"params": mine}, context)
    assert relative_error(np.broadcast_to(actual[:, None], expected.shape), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("pixels", "window", "stride", "padding"),
    [
        ((2, 3), (3, 3), 1, 1),
        ((1, 2), (3, 3), 1, 1),
        ((2, 2), (3, 3), 2, 1),
        ((4, 5), (7, 3), 2, 3),
        ((2,), (3,), 1, 1),
    ],
)
def test_convolutions_of_images_smaller_than_their_window_match_torch(rng, pixels, window, stride, padding):
    x, kernel = rng.standard_normal((2, 3, *pixels, 8), np.float32), rng.standard_normal((*window, 8, 6), np.float32)
    rank = len(window)
    theirs = [torch.tensor(x).flatten(0, 1).movedim(-1, 1), torch.tensor(kernel).movedim(-1, 0).movedim(-1, 1)]
    theirs = [tensor.requires_grad_() for tensor in theirs]
    convolve = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d}[rank]
    y = convolve(*theirs, stride=stride, padding=padding)
    y.square().sum().backward()
    ours = lambda x, kernel: products.convolve(x, kernel, stride, ((padding, padding),) * rank)  # noqa: E731
    assert "conv_general_dilated" not in str(jax.make_jaxpr(ours)(x, kernel))
    assert relative_error(ours(x, kernel), y.detach().movedim(1, -1).unflatten(0, (2, 3))) < 2e-6
    gradients = jax.grad(lambda *args: jnp.square(ours(*args)).sum(), (0, 1))(x, kernel)
    wanted = theirs[0].grad.movedim(1, -1).unflatten(0, (2, 3)), theirs[1].grad.movedim(1, -1).movedim(0, -1)
    for actual, expected in zip(gradients, wanted, strict=True):
        assert relative_error(actual, expected) < 1e-5


def qkv(rng, length, dtype=jnp.float32, batch=2):
    return tuple(jnp.asarray(rng.standard_normal((batch, length, 2, 64)), dtype) for _ in range(3))


def attend_and_differentiate(implementation):
    """Attention's output, and the gradient of a random functional of it."""

    def run(q, k, v, direction):
        y, pull_back = jax.vjp(lambda *args: attention.dot_product_attention(*args, implementation), q, k, v)
        return y, *pull_back(direction)

    return jax.jit(run)


def test_attention_matches_torch(rng):
    q, k, v = qkv(rng, 37)
    heads_first = (torch.tensor(np.array(x)).transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    assert relative_error(attention.dot_product_attention(q, k, v, "xla"), expected) < 1e-5


def test_heads_one_by_one_match_torch_with_their_gradients(rng):
    (q, direction), (k, v) = qkv(rng, 261)[:2], qkv(rng, 283)[:2]
    attended = attend_and_differentiate("xla")
    assert "scan" in str(jax.make_jaxpr(attended)(q, k, v, direction))
    heads_first = [torch.tensor(np.array(x)).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    y.backward(torch.tensor(np.array(direction)))
    wanted = [y.detach(), *(x.grad.transpose(1, 2) for x in heads_first)]
    for actual, expected in zip(attended(q, k, v, direction), wanted, strict=True):
        assert relative_error(actual, expected) < 1e-5
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    assert relative_error(attention.dot_product_attention(*half, "xla"), y.detach()) < 0.04


def test_gradients_of_gradients_of_heads_one_by_one_are_those_of_all(rng, monkeypatch):
    """As gradient penalties take them."""
    q, k, v, direction = (x[:, :, :1] for x in (*qkv(rng, 256, batch=1), qkv(rng, 256, batch=1)[0]))

    def penalty(q, k, v):
        y, pull_back = jax.vjp(lambda *args: attention.dot_product_attention(*args, "xla"), q, k, v)
        return sum(jnp.square(gradient).sum() for gradient in pull_back(direction)) + jnp.square(y).sum()

    one_by_one = jax.jit(jax.grad(penalty, (0, 1, 2)))(q, k, v)
    monkeypatch.setattr(attention, "_MANY_TOKENS", 1000)
    assert "scan" not in str(jax.make_jaxpr(jax.grad(penalty))(q, k, v))
    for actual, expected in zip(one_by_one, jax.jit(jax.grad(penalty, (0, 1, 2)))(q, k, v), strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_queries_in_chunks_change_nothing(rng, monkeypatch):
    args = (*qkv(rng, 200), qkv(rng, 200)[0])
    whole = attend_and_differentiate("xla")(*args)
    monkeypatch.setattr(attention, "_QUERY_CHUNK", 64)
    chunked = attend_and_differentiate("xla")
    assert "scan" in str(jax.make_jaxpr(chunked)(*args))
    for actual, expected in zip(chunked(*args), whole, strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize(
    ("sizes", "batch", "parts"),
    [
        ((4, 2, 1), 8, (1, 256)),
        ((2, 2, 2), 8, (2, 128)),
        ((4, 2, 1), 14, (7, 256)),
        ((2, 2, 2), 3, (3, 128)),
        ((2, 1, 4), 2, (1, 64)),
    ],
)
def test_gpus_attend_each_to_its_own_part(rng, monkeypatch, sizes, batch, parts):
    """cuDNN's kernel cannot be run here: in its place is what it computes, given what it would be given."""
    args = qkv(rng, 256, jnp.bfloat16, batch)
    expected = attention.dot_product_attention(*args, "xla")
    given = []

    def kernel(q, k, v):
        given.append((q.shape[:2], k.shape[:2]))
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")

    monkeypatch.setattr(attention, "compiled_for", lambda: "gpu")
    monkeypatch.setattr(attention, "_cudnn_attention", kernel)
    devices = mesh.make_mesh(*sizes)
    # As what sharded weights give: split by heads.
    heads = jax.NamedSharding(devices, jax.P(None, None, "fsdp"))
    with jax.set_mesh(devices):
        y = jax.jit(attention.dot_product_attention)(*jax.device_put(args, heads))
    assert set(given) == {(parts, (parts[0], 256))}
    assert relative_error(y.astype(jnp.float32), expected.astype(jnp.float32)) < 0.01


@pytest.mark.integration
@pytest.mark.parametrize(
    ("sizes", "batch"),
    [(None, 2), ((4, 2, 1), 8), ((2, 2, 2), 8), ((4, 2, 1), 3)],
    ids=["one device", "mesh", "context", "clips that do not split"],
)
def test_splash_kernel_agrees_with_xla(rng, sizes, batch):
    args = (*qkv(rng, 256, batch=batch), qkv(rng, 256, batch=batch)[0])
    splash = attend_and_differentiate("splash")
    expected = attend_and_differentiate("xla")(*args)
    if sizes:
        devices = mesh.make_mesh(*sizes)
        with jax.set_mesh(devices):
            shardings = mesh.batch_shardings(devices, args) if batch == 8 else mesh.replicated(devices)
            args = jax.device_put(args, shardings)
            results, program = splash(*args), str(splash.trace(*args).jaxpr)
        assert "shard_map" in program
    else:
        results, program = splash(*args), str(splash.trace(*args).jaxpr)
    assert "pallas" in program
    for actual, wanted in zip(results, expected, strict=True):
        assert relative_error(actual, wanted) < 1e-5


ONE_LEVEL = UNetConfig(
    block_out_channels=(32,),
    layers_per_block=1,
    num_attention_heads=(2,),
    has_attention=(False,),
    cross_attention_dim=8,
    addition_time_embed_dim=8,
)


def objective_of(config):
    """Random parameters, and remat policy -> a scalar function of them."""
    shapes = unflatten_dict(expected_params("unet", config))
    params = random_params({"unet": shapes}, 0, np.float32)["unet"]
    inputs = random_inputs(config, 3, 4, 6)
    direction = np.random.default_rng(1).standard_normal((2, 3, 4, 6, 4), np.float32)

    def of(remat):
        unet = SVDUNet(config, remat=remat)
        return lambda params: jnp.sum(direction * unet.apply({"params": params}, *inputs))

    return params, of


@pytest.fixture(scope="module")
def objective():
    return objective_of(ONE_LEVEL)


@pytest.fixture(scope="module")
def plain_gradient(objective):
    params, of = objective
    return quick_jit(jax.grad(of("none")))(params)


@pytest.mark.integration
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(objective, plain_gradient, remat):
    params, of = objective
    gradient = jax.jit(jax.grad(of(remat)))(params)
    assert relative_error(flat(gradient), flat(plain_gradient)) < 1e-5


def test_rematerialisation_keeps_less():
    params, of = objective_of(dataclasses.replace(ONE_LEVEL, has_attention=(True,)))

    def kept(remat):
        residuals = jax.eval_shape(lambda params: jax.vjp(of(remat), params)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    assert kept("none") > 1.5 * kept("dots") > 1.5**2 * kept("full")


@pytest.mark.integration
def test_only_what_one_key_makes_irrelevant_has_no_gradient(plain_gradient):
    gradient = flatten_dict(plain_gradient)
    blocks = {path[:3] for path in gradient if "transformer_blocks" in "/".join(path)}
    irrelevant = (("attn2", "to_q", "kernel"), ("attn2", "to_k", "kernel"), ("norm2", "scale"), ("norm2", "bias"))
    assert len(blocks) == 2
    assert {path for path, leaf in gradient.items() if not np.any(leaf)} == {
        (*b, *p) for b in blocks for p in irrelevant
    }


@pytest.mark.integration
def test_bfloat16_is_finite_and_close(objective):
    params, _ = objective
    inputs = random_inputs(ONE_LEVEL, 3, 4, 6)
    half = SVDUNet(ONE_LEVEL, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    actual = jax.jit(half.apply)({"params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)}, *inputs)
    expected = quick_jit(SVDUNet(ONE_LEVEL).apply)({"params": params}, *inputs)
    assert actual.dtype == jnp.float32
    assert relative_error(actual, expected) < HALF_PRECISION


@pytest.mark.parametrize("option", ["attention", "remat"])
def test_unknown_option_is_refused(option):
    unet = SVDUNet(ONE_LEVEL, **{option: "flash"})
    with pytest.raises(ValueError, match=rf"^{option} must be one of .*, got 'flash'\."):
        jax.eval_shape(unet.init, jax.random.key(0), *random_inputs(ONE_LEVEL, 1, 2, 2))


@pytest.fixture(scope="module")
def full_size_shapes():
    return unflatten_dict(expected_params("unet", UNetConfig()))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_size_of_stable_video_diffusion(full_size_shapes):
    assert count(full_size_shapes) == 1_524_623_082


# PEFT's adapters on the same modules count 536 and 116.8 M, 256 and 26.6 M: with cross-attention's 64 queries and keys.
@pytest.mark.parametrize(
    ("targets", "modules", "parameters"), [("all", 472, 109_944_832), ("attention", 192, 19_668_992)]
)
def test_size_of_lora(full_size_shapes, targets, modules, parameters):
    paths = lora.target_modules(full_size_shapes, targets)
    tree = jax.eval_shape(lambda key: lora.init_lora(key, full_size_shapes, 64, paths), jax.random.key(0))
    assert len(paths) == modules
    assert count(tree) == parameters


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_size_network_matches_diffusers():
    config = UNetConfig()
    inputs = random_inputs(config, 14, 8, 16, batch=1)
    model = torch_unet(config)
    expected = run_torch(model, *inputs)
    params = flax_params(model, "unet", config)
    del model
    gc.collect()
    actual = jax.jit(SVDUNet(config).apply)({"params": params}, *inputs)
    error = relative_error(actual, expected)
    print(f"relative error {error:.2e}")
    assert error < 1e-4
