import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints
import torch
from conftest import quick_jit, relative_error
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file, save_file

from osv_jax.convert import importers
from osv_jax.convert.naming import to_torch
from osv_jax.convert.weights import load_config, load_params
from osv_jax.errors import UserError
from osv_jax.models.clip_vision import CLIPVision
from osv_jax.models.dinov2 import Dinov2
from osv_jax.models.svd_unet import SVDUNet
from osv_jax.models.svd_vae import SVDVAE

DIFFUSERS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def svd(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("svd")
    tiny_checkpoints.save_svd(folder)
    return folder


@pytest.fixture(scope="module")
def weights(svd, tmp_path_factory) -> pathlib.Path:
    """All four networks, imported in float32."""
    return tiny_checkpoints.import_all(svd, tmp_path_factory.mktemp("weights"))


@pytest.fixture
def vae_copy(svd, tmp_path) -> pathlib.Path:
    """An SVD folder with only a VAE in it, to be spoilt."""
    shutil.copytree(svd / "vae", tmp_path / "svd" / "vae")
    return tmp_path / "svd"


def import_vae(folder: pathlib.Path, output: pathlib.Path, **options) -> dict:
    importers.import_svd(folder, output, components=["vae"], **options)
    return load_params(output, "vae")


def assert_same(params: dict, expected: dict[str, np.ndarray], dtype) -> None:
    """Imported parameters are the torch tensors, bit for bit after a cast to `dtype`."""
    ours = dict(to_torch(path, np.asarray(leaf)) for path, leaf in flatten_dict(params).items())
    ignored = {"embeddings.mask_token"}
    assert ours.keys() == expected.keys() - ignored
    for name, array in ours.items():
        assert array.dtype == dtype
        assert array.tobytes() == expected[name].astype(dtype).tobytes(), name


@pytest.mark.parametrize("component", ["unet", "vae", "image_encoder"])
def test_imported_tensors_are_the_checkpoints(svd, weights, component):
    assert_same(load_params(weights, component), tiny_checkpoints.on_disk(svd / component), np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(svd, tmp_path, dtype):
    params = import_vae(svd, tmp_path, dtype=dtype)
    assert_same(params, tiny_checkpoints.on_disk(svd / "vae"), importers.DTYPES[dtype])
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_size", ["10GB", "500KB"])
@pytest.mark.parametrize("safe", [True, False])
def test_formats_written_by_diffusers(tmp_path, variant, shard_size, safe):
    network = tiny_checkpoints.vae()
    if variant:
        network = network.half()
    folder = tmp_path / "svd" / "vae"
    network.save_pretrained(folder, variant=variant, max_shard_size=shard_size, safe_serialization=safe)
    assert (len(list(folder.glob("*.index*"))) == 1) == (shard_size == "500KB")
    expected = {name: tensor.float().numpy() for name, tensor in network.state_dict().items()}
    # By default the VAE keeps the dtype that it has.
    assert_same(import_vae(tmp_path / "svd", tmp_path / "out"), expected, np.float16 if variant else np.float32)


def test_formats_written_by_transformers(tmp_path):
    network = tiny_checkpoints.image_encoder().to(torch.bfloat16)
    network.save_pretrained(tmp_path / "image_encoder", max_shard_size="20KB")
    assert (tmp_path / "image_encoder" / "model.safetensors.index.json").is_file()
    importers.import_svd(tmp_path, tmp_path / "out", components=["image_encoder"])
    expected = {name: tensor.float().numpy() for name, tensor in network.state_dict().items()}
    assert_same(load_params(tmp_path / "out", "image_encoder"), expected, ml_dtypes.bfloat16)


def test_by_default_only_the_unet_is_rounded(svd, tmp_path):
    importers.import_svd(svd, tmp_path)
    files = {name: tmp_path / name / "config.json" for name in importers.SVD_COMPONENTS}
    stored = {name: json.loads(file.read_text())["dtype"] for name, file in files.items()}
    assert stored == {"unet": "bfloat16", "vae": "float32", "image_encoder": "float32"}


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        ((torch.float16, torch.float16), np.float16),
        ((torch.bfloat16, torch.bfloat16), ml_dtypes.bfloat16),
        ((torch.float16, torch.float32), np.float32),
        ((torch.float16, torch.bfloat16), np.float32),
        ((torch.float64, torch.float64), np.float32),
    ],
)
def test_what_is_kept_of_a_checkpoint_in_several_dtypes(vae_copy, tmp_path, dtypes, stored):
    """The first tensor has one, all others another; float32 holds the values of both halves."""
    file = vae_copy / "vae" / DIFFUSERS
    state = {name: tensor.to(dtypes[i > 0]) for i, (name, tensor) in enumerate(load_file(file).items())}
    save_file(state, file)
    expected = {name: tensor.float().numpy() for name, tensor in state.items()}
    assert_same(import_vae(vae_copy, tmp_path / "out"), expected, stored)


def test_storing_in_float16_costs_less_of_the_latents_than_in_bfloat16(svd, weights, tmp_path, rng):
    images = rng.uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)
    vae, exact = SVDVAE(load_config(weights, "vae")), load_params(weights, "vae")
    encode = quick_jit(lambda params: vae.apply({"params": params}, images, method="encode")[0])
    errors = {}
    for dtype in (None, "float16", "bfloat16"):
        params = import_vae(svd, tmp_path / f"{dtype}", dtype=dtype)
        # In NumPy: XLA cannot convert float16 on processors without instructions for it.
        stored = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), params)
        errors[dtype] = relative_error(encode(stored), encode(exact))
    # They keep 11 and 8 bits.
    assert errors[None] == 0 < 4 * errors["float16"] < errors["bfloat16"] < 0.05


def test_imported_vae_gives_torch_output(weights, rng):
    images = rng.standard_normal((2, 18, 10, 3), np.float32)
    vae, params = SVDVAE(load_config(weights, "vae")), load_params(weights, "vae")
    mean, _ = quick_jit(lambda params: vae.apply({"params": params}, images, method="encode"))(params)
    with torch.no_grad():
        expected = (
            tiny_checkpoints.vae().encode(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).latent_dist.mean
        )
    assert relative_error(mean, expected.permute(0, 2, 3, 1)) < 2e-5


def test_imported_image_encoder_gives_torch_output(weights, rng):
    pixels = rng.standard_normal((2, 28, 28, 3), np.float32)
    encoder = CLIPVision(load_config(weights, "image_encoder"))
    embedding = quick_jit(encoder.apply)({"params": load_params(weights, "image_encoder")}, pixels)
    with torch.no_grad():
        expected = tiny_checkpoints.image_encoder()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).image_embeds
    assert relative_error(embedding, expected) < 2e-5


def test_imported_unet_gives_torch_output(weights, rng):
    unet = SVDUNet(load_config(weights, "unet"))
    sample = rng.standard_normal((2, 3, 6, 10, 8), np.float32)
    context = rng.standard_normal((2, 24), np.float32)
    timestep, ids = np.float32([0.3, -1.2]), np.float32([[6, 127, 0.02], [7, 30, 0.1]])
    output = quick_jit(unet.apply)({"params": load_params(weights, "unet")}, sample, timestep, context, ids)
    inputs = [torch.from_numpy(array) for array in (sample, timestep, context, ids)]
    # Contiguous, because torch's group norm on the CPU loses three digits on inputs with channels-last strides.
    inputs[0], inputs[2] = inputs[0].permute(0, 1, 4, 2, 3).contiguous(), inputs[2][:, None]
    with torch.no_grad():
        expected = tiny_checkpoints.unet()(*inputs).sample
    assert relative_error(output, expected.permute(0, 1, 3, 4, 2)) < 2e-5


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("form", ["transformers", "hub", "hub, chunked blocks"])
def test_dinov2(tmp_path, rng, swiglu, registers, form):
    network = tiny_checkpoints.dinov2(registers, swiglu)
    source = tmp_path / "dinov2"
    network.save_pretrained(source)
    expected = tiny_checkpoints.on_disk(source)
    if form != "transformers":
        state = load_file(source / "model.safetensors")
        source = tmp_path / "dinov2.pth"
        torch.save(tiny_checkpoints.to_hub(state, chunked="chunked" in form), source)
    plan = importers.plan_dinov2(source)
    assert plan.ignored == ["embeddings.mask_token" if form == "transformers" else "mask_token"]
    importers.write([plan], tmp_path / "out", dtype="float32")
    params, config = load_params(tmp_path / "out", "dinov2"), load_config(tmp_path / "out", "dinov2")
    assert_same(params, expected, np.float32)
    pixels = rng.standard_normal((2, 42, 42, 3), np.float32)
    last = (config.num_hidden_layers - 1,)
    (ours,) = quick_jit(lambda params: Dinov2(config).apply({"params": params}, pixels, last))(params)
    with torch.no_grad():
        hidden = network(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-1]
    reference = hidden[:, 1 + config.num_register_tokens :].reshape(ours.shape)
    assert relative_error(ours, reference) < 2e-5


def test_old_vae_attention_names(vae_copy, tmp_path):
    file = vae_copy / "vae" / DIFFUSERS
    state, renamed = load_file(file), {}
    for name, tensor in state.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    assert len(renamed.keys() - state.keys()) == 16
    save_file(renamed, file)
    expected = {name: tensor.numpy() for name, tensor in state.items()}
    assert_same(import_vae(vae_copy, tmp_path / "out", dtype="float32"), expected, np.float32)


def test_position_ids_are_ignored(tmp_path):
    tiny_checkpoints.image_encoder().save_pretrained(tmp_path / "image_encoder")
    file = tmp_path / "image_encoder" / "model.safetensors"
    save_file(load_file(file) | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}, file)
    (plan,) = importers.plan_svd(tmp_path, ["image_encoder"])
    assert plan.ignored == ["vision_model.embeddings.position_ids"]


def test_missing_left_over_and_misshapen_tensors_are_listed(vae_copy, tmp_path):
    file = vae_copy / "vae" / DIFFUSERS
    state = load_file(file)
    for name in [name for name in state if name.startswith("encoder.down_blocks.0.resnets")]:
        del state[name]
    state |= {"intruder.weight": torch.zeros(2), "quant_conv.weight": torch.zeros(8, 7, 1, 1)}
    save_file(state, file)
    with pytest.raises(UserError) as raised:
        importers.import_svd(vae_copy, tmp_path / "out", components=["vae"])
    message = str(raised.value)
    missing, left_over, misshapen = re.findall(r"\d+ \S+ tensors \(.*?\)(?=;)", message)
    assert missing.startswith("16 missing tensors (encoder.down_blocks.0.resnets.0.conv1.bias, ")
    assert missing.endswith(", ...)")
    assert missing.count("encoder.down_blocks") == 3
    assert left_over == "1 left-over tensors (intruder.weight)"
    assert misshapen == "1 misshapen tensors (quant_conv.weight [8, 7, 1, 1] instead of [8, 8, 1, 1])"
    assert not (tmp_path / "out").exists()


def test_a_tensor_under_both_its_old_and_its_new_name_is_left_over(vae_copy):
    file = vae_copy / "vae" / DIFFUSERS
    state = load_file(file)
    name = "encoder.mid_block.attentions.0.to_q.weight"
    save_file(state | {name.replace("to_q", "query"): state[name].clone()}, file)
    with pytest.raises(UserError, match="1 left-over tensors"):
        importers.plan_svd(vae_copy, ["vae"])


def test_options_that_must_be_there(vae_copy):
    file = vae_copy / "vae" / "config.json"
    options = json.loads(file.read_text())
    del options["scaling_factor"]
    file.write_text(json.dumps(options))
    with pytest.raises(UserError, match="does not say scaling_factor"):
        importers.plan_svd(vae_copy, ["vae"])
    file.write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        importers.plan_svd(vae_copy, ["vae"])


def test_wrong_sources(svd, tmp_path):
    with pytest.raises(UserError, match=r"Hugging Face id.*hf download stabilityai/stable-video-diff"):
        importers.plan_svd("stabilityai/stable-video-diffusion-img2vid")
    with pytest.raises(UserError, match="does not exist"):
        importers.plan_svd(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no unet/config\.json"):
        importers.plan_svd(svd / "vae")
    with pytest.raises(UserError, match="is a file"):
        importers.plan_svd(svd / "vae" / DIFFUSERS)
    with pytest.raises(UserError, match="no component 'text_encoder'"):
        importers.plan_svd(svd, ["text_encoder"])
    with pytest.raises(UserError, match="not a DINOv2 torch-hub file"):
        importers.plan_dinov2(svd / "vae" / DIFFUSERS)
    with pytest.raises(UserError, match="model_type"):
        importers.plan_dinov2(svd / "image_encoder")
    with pytest.raises(UserError, match=r"no config\.json"):
        importers.plan_dinov2(svd)


def test_values_beyond_float16_are_an_error(vae_copy, tmp_path):
    file = vae_copy / "vae" / DIFFUSERS
    state = load_file(file)
    state["quant_conv.bias"][3] = 1e5
    save_file(state, file)
    with pytest.raises(UserError, match=r"quant_conv\.bias has values beyond float16"):
        import_vae(vae_copy, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    params = import_vae(vae_copy, tmp_path / "out", dtype="bfloat16")
    assert params["quant_conv"]["bias"][3] == jnp.bfloat16(1e5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_an_error(vae_copy, tmp_path, value, dtype):
    file = vae_copy / "vae" / DIFFUSERS
    state = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    state["quant_conv.bias"][3] = value
    save_file(state, file)
    with pytest.raises(UserError, match=r"vae: quant_conv\.bias has values that are NaN or infinite"):
        import_vae(vae_copy, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_a_quantised_checkpoint_are_no_weights(vae_copy, tmp_path, dtype):
    file = vae_copy / "vae" / DIFFUSERS
    state = load_file(file)
    state["quant_conv.weight"] = state["quant_conv.weight"].to(dtype)
    save_file(state, file)
    with pytest.raises(UserError, match=r"vae.*: tensor quant_conv\.weight is stored as (int8|F8_E4M3)"):
        import_vae(vae_copy, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_a_factor_that_is_not_finite_is_an_error(vae_copy, weights, tmp_path):
    tiny_checkpoints.edit_json(vae_copy / "vae" / "config.json", scaling_factor=float("nan"))
    with pytest.raises(UserError, match=r"vae/config\.json: scaling_factor=nan must be a finite number above 0"):
        import_vae(vae_copy, tmp_path / "out")
    shutil.copytree(weights, tmp_path / "weights")
    file = tmp_path / "weights" / "vae" / "config.json"
    file.write_text(file.read_text().replace("0.18215", "Infinity"))
    with pytest.raises(UserError, match=r"vae/config\.json: scaling_factor=inf must be a finite number above 0"):
        load_config(tmp_path / "weights", "vae")


def test_existing_components_are_not_overwritten_unasked(svd, vae_copy, tmp_path):
    before = import_vae(svd, tmp_path / "out")
    tiny_checkpoints.edit_json(vae_copy / "vae" / "config.json", scaling_factor=0.5)
    with pytest.raises(UserError, match=r"vae exists.*--overwrite"):
        import_vae(vae_copy, tmp_path / "out")
    assert load_config(tmp_path / "out", "vae").scaling_factor == 0.18215
    after = import_vae(vae_copy, tmp_path / "out", overwrite=True)
    assert load_config(tmp_path / "out", "vae").scaling_factor == 0.5
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["vae"]


def test_a_killed_conversion_leaves_nothing_that_loads(svd, tmp_path):
    """SIGKILL after everything is on disk but before the final rename: the worst moment."""
    program = """
        import os, signal, sys
        from osv_jax.convert import importers
        from osv_jax.runtime import paths
        paths.replace_folder = lambda new, target: os.kill(os.getpid(), signal.SIGKILL)
        importers.import_svd(sys.argv[1], sys.argv[2], components=["vae"])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), svd, tmp_path / "out"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "out" / ".vae.partial" / "params").is_dir()
    with pytest.raises(UserError, match="does not exist"):
        load_params(tmp_path / "out", "vae")
    import_vae(svd, tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["vae"]
