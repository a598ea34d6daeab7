"""DINOv2 against transformers, through the files that `save_pretrained` writes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import relative_error
from flax import traverse_util

from osv_jax.models.dinov2 import EMBEDDING, Dinov2, Dinov2Config

_SMALL = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=70, patch_size=14)
CASES = {
    # The grid is not the trained 5 x 5, and not square.
    "mlp": (_SMALL, (42, 98)),
    # Smaller than the trained grid: antialiasing shows.
    "registers": (dataclasses.replace(_SMALL, num_register_tokens=3, mlp_ratio=3), (42, 56)),
    "swiglu": (dataclasses.replace(_SMALL, use_swiglu_ffn=True, hidden_size=40, num_attention_heads=2), (70, 28)),
    "swiglu_registers": (
        # An eps large enough to show when it is not passed on.
        dataclasses.replace(_SMALL, use_swiglu_ffn=True, num_register_tokens=1, patch_size=7, layer_norm_eps=1e-2),
        (91, 63),
    ),
    # The trained grid itself: no interpolation.
    "trained_size": (dataclasses.replace(_SMALL, num_register_tokens=2), (70, 70)),
}
BLOCKS = (1, 0)


def parameters_on_disk(model, folder):
    """Writes the torch model and reads it back as our tree."""
    model.save_pretrained(folder)
    tree = {}
    for name, array in safetensors.numpy.load_file(folder / "model.safetensors").items():
        *path, leaf = name.replace(".layer.", ".layer_").split(".")
        if leaf == "mask_token":
            continue
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[array.ndim])
        tree[(*path, leaf)] = jnp.asarray(array)
    return traverse_util.unflatten_dict(tree)


def randomise(model):
    """Random weights of a trained network's size, also where the initialisation is zero or one."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "lambda1" in name or ("norm" in name and name.endswith("weight")):
            weight.data = 1 + 0.3 * noise
        else:
            fan_in = weight[0].numel() if name.endswith("weight") else 10
            weight.data = noise / fan_in**0.5
    return model.eval()


def torch_model(config):
    fields = dataclasses.asdict(config)
    if config.num_register_tokens:
        return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**fields))
    del fields["num_register_tokens"]
    return transformers.Dinov2Model(transformers.Dinov2Config(**fields))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Our config, torch's weights in our tree, a batch of pixels, a cotangent for each block's features."""
    config, size = CASES[request.param]
    reference = randomise(torch_model(config)).requires_grad_(False)
    params = parameters_on_disk(reference, tmp_path_factory.mktemp("dinov2"))
    rng = np.random.default_rng(2)
    pixels = rng.standard_normal((2, *size, 3), dtype=np.float32)
    grid = [side // config.patch_size for side in size]
    directions = [rng.standard_normal((2, *grid, config.hidden_size), dtype=np.float32) for _ in BLOCKS]
    return config, reference, params, jnp.asarray(pixels), directions


@pytest.fixture(scope="module")
def expected(case):
    """Torch's features after `BLOCKS`, and gradient of the pixels."""
    config, reference, _, pixels, directions = case
    pixels = torch.from_numpy(np.array(pixels)).requires_grad_()
    out = reference(pixels.movedim(-1, 1), output_hidden_states=True)
    # hidden_states[0] are the embeddings.
    patches = [out.hidden_states[block + 1][:, 1 + config.num_register_tokens :] for block in BLOCKS]
    features = [patch.reshape(direction.shape) for patch, direction in zip(patches, directions, strict=True)]
    torch.autograd.backward(features, [torch.from_numpy(direction) for direction in directions])
    return [feature.detach() for feature in features], pixels.grad


@pytest.fixture(scope="module")
def actual(case):
    """The same from our network, as one compiled function."""
    config, _, params, pixels, directions = case
    model = Dinov2(config)

    @jax.jit
    def run(params, pixels, directions):
        features, pullback = jax.vjp(lambda pixels: model.apply({"params": params}, pixels, BLOCKS), pixels)
        return features, pullback(directions)[0]

    return run(params, pixels, tuple(directions))


def test_the_tree_is_the_checkpoints(case):
    config, _, params, pixels, _ = case
    ours = jax.eval_shape(lambda key: Dinov2(config).init(key, pixels, BLOCKS), jax.random.key(0))["params"]
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)


def test_features_match_transformers(actual, expected):
    for ours, theirs in zip(actual[0], expected[0], strict=True):
        assert relative_error(ours, theirs) <= 2e-5


def test_the_gradient_of_the_pixels_matches_torch(actual, expected):
    assert relative_error(actual[1], expected[1]) <= 2e-5


@pytest.mark.integration
def test_half_precision_stays_close(case, expected):
    config, _, params, pixels, _ = case
    run = jax.jit(Dinov2(config, dtype=jnp.bfloat16).apply, static_argnums=2)
    for ours, theirs in zip(run({"params": params}, pixels, BLOCKS), expected[0], strict=True):
        assert ours.dtype == jnp.bfloat16
        assert relative_error(ours, theirs) <= 0.1


def test_class_tokens_and_embeddings_match_transformers(tmp_path, rng):
    """What StyleGAN-T's heads read: each patch with the class token added, and the embedded patches."""
    config = dataclasses.replace(_SMALL, num_register_tokens=1)
    reference = randomise(torch_model(config))
    params, model = parameters_on_disk(reference, tmp_path), Dinov2(config)
    pixels = rng.standard_normal((2, 28, 42, 3)).astype(np.float32)
    with torch.no_grad():
        hidden = reference(torch.from_numpy(pixels).movedim(-1, 1), output_hidden_states=True).hidden_states
    run = jax.jit(model.apply, static_argnums=(2, 3))
    for block, tokens in ((EMBEDDING, hidden[0]), (1, hidden[2])):
        patches, classes = tokens[:, 2:].reshape(2, 2, 3, -1), tokens[:, 0]
        for read, wanted in (("patches", patches), ("class", classes), ("sum", patches + classes[:, None, None])):
            assert relative_error(run({"params": params}, pixels, (block,), read)[0], wanted) <= 2e-5
    with pytest.raises(ValueError, match="read must be one of"):
        model.apply({"params": params}, pixels, (0,), "registers")


# Width, blocks and heads on the cards of the released models.
@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"),
    [("small", 384, 12, 6), ("base", 768, 12, 12), ("large", 1024, 24, 16), ("giant", 1536, 40, 24)],
)
def test_released_sizes_have_as_many_parameters_as_in_transformers(name, width, depth, heads):
    # Without the mask token.
    config = Dinov2Config(width, depth, heads, use_swiglu_ffn=name == "giant")
    assert name != "small" or config == Dinov2Config()
    pixels = jnp.zeros((1, 14, 28, 3))
    ours = jax.eval_shape(lambda key: Dinov2(config).init(key, pixels, (depth - 1,)), jax.random.key(0))["params"]
    with torch.device("meta"):
        reference = transformers.Dinov2Model(
            transformers.Dinov2Config(
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                image_size=518,
                use_swiglu_ffn=name == "giant",
                use_mask_token=False,
            )
        )
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize(
    ("size", "blocks", "message"),
    [
        ((42, 41), (0,), "multiples of 14, got 42 x 41"),
        ((42, 42), (2,), "must lie in -1 .. 1, got"),
        ((42, 42), (-2,), "must lie in -1 .. 1, got"),
    ],
)
def test_mistakes_are_refused(size, blocks, message):
    with pytest.raises(ValueError, match=message):
        Dinov2(_SMALL).init(jax.random.key(0), jnp.zeros((1, *size, 3)), blocks)
