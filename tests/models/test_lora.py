"""LoRA against PEFT on diffusers' UNet, module by module, and what makes student and teacher one network."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from conftest import relative_error
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxprs import equations
from torch_reference import flax_params, torch_unet

from osv_jax.convert import naming
from osv_jax.inference.trained import Trained
from osv_jax.models import lora
from osv_jax.models.layers import Conv, Dense
from osv_jax.models.svd_unet import SVDUNet, UNetConfig
from osv_jax.objectives.players import Student

RANK, ALPHA = 4, 6.0
# 64 channels: with 32, each normalisation group is one channel, and whatever only shifts a channel has no gradient. The
# transformers are in the middle: every kind of layer is there.
CONFIG = UNetConfig(
    block_out_channels=(64, 128),
    layers_per_block=1,
    num_attention_heads=(2, 2),
    has_attention=(False, False),
    cross_attention_dim=24,
    addition_time_embed_dim=8,
)
UNET = SVDUNet(CONFIG)
TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "others": (
        *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "ff_in.net.0.proj", "ff_in.net.2", "conv1", "conv2"),
        *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    ),
}


def torch_targets(model, kinds):
    """Names of the modules that end in a target, but for the queries and keys of cross-attention."""
    suffixes = tuple(f".{suffix}" for kind in kinds for suffix in TARGETS[kind])
    layers = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    names = [name for name, module in model.named_modules() if isinstance(module, layers) and name.endswith(suffixes)]
    return [name for name in names if not name.endswith(("attn2.to_q", "attn2.to_k"))]


def flax_lora(model, modules, read):
    """Our tree of `read(weight)` of PEFT's adapters."""
    tree = {}
    for path in modules:
        layer = model.get_submodule(naming.torch_module(path))
        a, b = (read(getattr(layer, name)["default"].weight).numpy() for name in ("lora_A", "lora_B"))
        tree[(*path, "a")] = jnp.array(naming.to_flax(("kernel",), a))
        tree[(*path, "b")] = jnp.array(b.reshape(b.shape[:2]).T)
    return unflatten_dict(tree)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 3, 7, 5, 8), np.float32)
    embedding = rng.standard_normal((2, CONFIG.cross_attention_dim), np.float32)
    return sample, np.array([-0.9, 1.2], np.float32), embedding, np.array([[6, 127, 0.1], [24, 30, 0.02]], np.float32)


@pytest.fixture(scope="module")
def reference(inputs):
    """Base parameters, random LoRA, the direction of the loss, and PEFT's output and gradients."""
    model = torch_unet(CONFIG)
    params = flax_params(model, "unet", CONFIG)
    names = torch_targets(model, ("attention", "others"))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name)
        if "lora_" in name:
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.3 * value[0].numel() ** -0.5)
    sample, c_noise, embedding, ids = map(torch.tensor, inputs)
    video = sample.permute(0, 1, 4, 2, 3).contiguous()
    output = model(video, c_noise, embedding[:, None], ids).sample.permute(0, 1, 3, 4, 2)
    direction = np.random.default_rng(2).standard_normal(output.shape).astype(np.float32)
    (output * torch.tensor(direction)).sum().backward()
    modules = [naming.module_path(name) for name in names]
    weights = flax_lora(model, modules, lambda weight: weight.detach())
    gradients = flax_lora(model, modules, lambda weight: weight.grad)
    return params, weights, direction, output.detach().numpy(), gradients


@pytest.fixture(scope="module")
def teacher(inputs):
    return jax.jit(lambda params: UNET.apply({"params": params}, *inputs))


@pytest.fixture(scope="module")
def student(inputs):
    return jax.jit(lambda params, tree: UNET.apply({"params": params, "lora": tree}, *inputs))


def test_output_and_every_gradient_match_peft(inputs, reference):
    params, weights, direction, output, expected = reference

    def loss(tree, params):
        y = UNET.apply({"params": params, "lora": lora.scale_lora(tree, ALPHA / RANK)}, *inputs)
        return jnp.sum(y * direction), y

    gradients, actual = jax.jit(jax.grad(loss, has_aux=True))(weights, params)
    assert relative_error(actual, output) < 2e-5
    gradients, expected = flatten_dict(gradients), flatten_dict(expected)
    assert {leaf.ndim for path, leaf in gradients.items() if path[-1] == "a"} == {2, 4, 5}
    assert any(path[-2] == "conv_shortcut" for path in gradients)
    errors = {"/".join(path): relative_error(leaf, expected[path]) for path, leaf in gradients.items()}
    assert len(errors) == len(expected)
    assert max(errors.values()) < 1e-4, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.integration
def test_student_with_zero_b_is_the_teacher(reference, teacher, student):
    params, weights, *_ = reference
    # Two programs: what XLA fuses, and so what it rounds, differs.
    assert relative_error(student(params, lora.scale_lora(weights, 0.0)), teacher(params)) < 2e-6


@pytest.mark.parametrize("layer", [Dense(5), Conv(5, (3, 3), strides=2), Conv(5, (3, 1, 1)), Conv(5, (1, 1))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_with_zero_b_is_the_base_layer_bitwise(rng, layer, dtype):
    x = jnp.asarray(rng.standard_normal((2, 4, 6, 7, 8)), dtype)
    layer = layer.clone(dtype=dtype)
    params = layer.init(jax.random.key(0), x)["params"]
    tree = lora.init_lora(jax.random.key(1), {"m": params}, 4, [("m",)])["m"]
    np.testing.assert_array_equal(layer.apply({"params": params, "lora": tree}, x), layer.apply({"params": params}, x))
    tree["b"] += 1
    assert np.any(layer.apply({"params": params, "lora": tree}, x) != layer.apply({"params": params}, x))


@pytest.mark.parametrize("layer", [Dense(5), Conv(5, (3, 3)), Conv(5, (3, 1, 1)), Conv(5, (1, 1))])
def test_low_rank_products_of_bfloat16_are_summed_in_float32(layer):
    x, layer = jnp.zeros((2, 4, 6, 7, 8), jnp.bfloat16), layer.clone(dtype=jnp.bfloat16, use_bias=False)
    params = layer.init(jax.random.key(0), x)["params"]
    tree = lora.init_lora(jax.random.key(1), {"m": params}, 4, [("m",)])["m"]
    program = jax.make_jaxpr(layer.apply)({"params": params, "lora": tree}, x).jaxpr
    products = [eqn for eqn in equations(program) if eqn.primitive.name in ("dot_general", "conv_general_dilated")]
    assert [eqn.outvars[0].aval.dtype for eqn in products] == [jnp.bfloat16, jnp.float32, jnp.float32]
    assert {operand.aval.dtype for eqn in products for operand in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
    assert program.outvars[0].aval.dtype == jnp.bfloat16


@pytest.mark.parametrize(("stored", "least", "most"), [(jnp.float32, 0.9, 1.1), (jnp.bfloat16, 0.0, 0.8)])
def test_merging_into_stored_float32_keeps_a_small_lora_in_bfloat16(rng, stored, least, most):
    """How much of the change is there once the kernel is bfloat16; one that was rounded before swallows a part."""
    kernel = jnp.asarray(rng.standard_normal((128, 128), np.float32)).astype(stored)
    a, b = (1e-3 * rng.standard_normal((128, 4), np.float32), 0.5 * rng.standard_normal((4, 128), np.float32))
    student = Student(lora={"m": {"a": a, "b": b}}, tuned={})
    merged = Trained(student).merge_into({"m": {"kernel": kernel}}, jnp.bfloat16)["m"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    change = merged.astype(jnp.float32) - kernel.astype(jnp.bfloat16).astype(jnp.float32)
    kept = float(jnp.vdot(change, a @ b) / jnp.vdot(a @ b, a @ b))
    assert least < kept < most


@pytest.mark.integration
def test_merged_weights_are_the_student(reference, teacher, student):
    params, weights, *_ = reference
    scaled = lora.scale_lora(weights, ALPHA / RANK)
    output = student(params, scaled)
    assert relative_error(teacher(lora.merge_lora(params, scaled)), output) < 2e-5
    assert relative_error(teacher(params), output) > 0.1


def test_merging_rounds_once_and_keeps_the_dtype(rng):
    kernel = jnp.asarray(rng.standard_normal((3, 1, 1, 8, 6)), jnp.bfloat16)
    a, b = rng.standard_normal((3, 1, 1, 8, 2)), rng.standard_normal((2, 6))
    params = {"conv": {"kernel": kernel, "bias": jnp.ones(6, jnp.bfloat16)}}
    merged = lora.merge_lora(params, {"conv": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}})
    expected = jnp.asarray(np.asarray(kernel, np.float64) + np.einsum("tijcr,ro->tijco", a, b), jnp.bfloat16)
    assert merged["conv"]["kernel"].dtype == jnp.bfloat16
    # A last digit may differ where float32 and float64 fall on two sides of a tie.
    assert np.mean(merged["conv"]["kernel"] != expected) < 0.01
    np.testing.assert_array_equal(merged["conv"]["bias"], params["conv"]["bias"])


def test_scale_is_folded_into_b():
    tree = {"m": {"a": jnp.full((2, 1), 3.0), "b": jnp.full((1, 2), 5.0)}}
    scaled = lora.scale_lora(tree, 0.5)
    np.testing.assert_array_equal(scaled["m"]["a"], tree["m"]["a"])
    np.testing.assert_array_equal(scaled["m"]["b"], 2.5)


@pytest.mark.parametrize(("targets", "kinds"), [("attention", ["attention"]), ("all", ["attention", "others"])])
def test_targets(reference, targets, kinds):
    expected = torch_targets(torch_unet(CONFIG), kinds)
    modules = lora.target_modules(reference[0], targets)
    assert modules == sorted(modules)
    assert {naming.torch_module(path) for path in modules} == set(expected)


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match=r"LoRA targets must be one of \['all', 'attention'\], got 'some'"):
        lora.target_modules({}, "some")


def test_initial_values_are_pefts(reference):
    params = reference[0]
    modules = lora.target_modules(params, "all")
    tree = flatten_dict(jax.jit(lambda key: lora.init_lora(key, params, 32, modules))(jax.random.key(0)))
    assert {path[:-1] for path in tree} == set(modules)
    for path in modules:
        kernel, a, b = flatten_dict(params)[(*path, "kernel")], tree[(*path, "a")], tree[(*path, "b")]
        assert a.shape == (*kernel.shape[:-1], 32)
        assert b.shape == (32, kernel.shape[-1])
        assert not b.any()
        # torch.nn.init.kaiming_uniform_(a, a=sqrt(5)), PEFT's default.
        bound = np.prod(kernel.shape[:-1]) ** -0.5
        assert 0.98 * bound < np.abs(a).max() <= 1.001 * bound
        assert abs(a.std() / bound - 3**-0.5) < 0.05
    sums = [float(leaf.sum()) for path, leaf in tree.items() if path[-1] == "a"]
    assert len(set(sums)) == len(sums)


def test_the_smaller_rank_is_the_closest(rng):
    """Eckart-Young: what is lost are the smallest singular values of the products."""
    given = {"conv": {"a": (3, 3, 5, 4), "b": (4, 6)}, "thin": {"a": (2, 4), "b": (4, 7)}}
    given = jax.tree.map(
        lambda shape: rng.standard_normal(shape, np.float32), given, is_leaf=lambda x: type(x) is tuple
    )
    products = {name: (module["a"].reshape(-1, 4) @ module["b"]).astype(np.float64) for name, module in given.items()}
    values = {name: np.linalg.svd(product)[1] for name, product in products.items()}
    for rank in (1, 2, 3, 4):
        smaller, error = lora.truncate_lora(given, rank)
        assert smaller["conv"]["a"].shape == (3, 3, 5, rank) and smaller["conv"]["b"].shape == (rank, 6)
        lost = 0.0
        for name, module in smaller.items():
            assert module["a"].dtype == module["b"].dtype == np.float32
            difference = np.linalg.norm(module["a"].reshape(-1, rank) @ module["b"] - products[name])
            tail = np.sqrt((values[name][rank:] ** 2).sum())
            # Of what the product was; rounding is in proportion to that, and the tail of rank 4 is zero.
            assert abs(difference - tail) < 1e-5 * np.linalg.norm(products[name])
            lost += tail**2
        whole = sum((product**2).sum() for product in products.values())
        assert abs(error - np.sqrt(lost / whole)) < 1e-5
    with pytest.raises(ValueError, match=r"rank must be in 1 \.\. 4, got 5"):
        lora.truncate_lora(given, 5)
