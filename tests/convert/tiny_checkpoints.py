"""Tiny PyTorch networks with random weights everywhere, to be saved in the formats that checkpoints come in."""

import json
import pathlib
import tempfile

import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from osv_jax.convert import importers


def unet():
    return _randomise(
        UNetSpatioTemporalConditionModel(
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=24,
            num_attention_heads=(2, 4),
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
            num_frames=3,
        )
    )


def vae():
    return _randomise(
        AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=2
        )
    )


def image_encoder():
    return _randomise(
        CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                projection_dim=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
                hidden_act="gelu",
            )
        )
    )


def dinov2(registers: bool = False, swiglu: bool = False):
    network, config = (
        (Dinov2WithRegistersModel, Dinov2WithRegistersConfig) if registers else (Dinov2Model, Dinov2Config)
    )
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 14,
        "use_swiglu_ffn": swiglu,
    }
    return _randomise(network(config(**sizes)))


def save_svd(folder: pathlib.Path, **options) -> None:
    """A whole SVD folder, as `from_pretrained` would take it."""
    for component in (unet, vae, image_encoder):
        component().save_pretrained(folder / component.__name__, **options)


def import_all(svd: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """`output`, with an SVD folder's networks and a DINOv2, imported in float32."""
    importers.import_svd(svd, output, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        dinov2().save_pretrained(folder)
        importers.write([importers.plan_dinov2(folder)], output, dtype="float32")
    return output


def on_disk(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every float tensor of a folder's safetensors as float32, read by the reference reader."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: tensor.float().numpy() for name, tensor in load_file(file).items()}
    return tensors


def to_hub(state: dict[str, torch.Tensor], chunked: bool = False) -> dict[str, torch.Tensor]:
    """Tensors under transformers' on-disk names -> the same under facebookresearch's, written out by hand."""
    hub, width = {}, state["layernorm.weight"].shape[0]
    top = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.mask_token": "mask_token",
        "embeddings.register_tokens": "register_tokens",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
    block = {"attention.output.dense": "attn.proj", "mlp.weights_in": "mlp.w12", "mlp.weights_out": "mlp.w3"}
    scale = {"layer_scale1": "ls1.gamma", "layer_scale2": "ls2.gamma"}
    for name, tensor in state.items():
        if name in top:
            hub[top[name]] = tensor
            continue
        _, _, number, *module, leaf = name.split(".")
        prefix = f"blocks.{int(number) // 2}.{number}" if chunked else f"blocks.{number}"
        module = ".".join(module)
        if leaf == "lambda1":
            hub[f"{prefix}.{scale[module]}"] = tensor
        elif module.startswith("attention.attention."):
            shape = (3 * width, *tensor.shape[1:])
            rows = {"query": 0, "key": 1, "value": 2}[module.split(".")[-1]] * width
            hub.setdefault(f"{prefix}.attn.qkv.{leaf}", torch.zeros(shape))[rows : rows + width] = tensor
        else:
            hub[f"{prefix}.{block.get(module, module)}.{leaf}"] = tensor
    return hub


def edit_json(file: pathlib.Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _randomise(network):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            # A spread that keeps activations finite through a handful of layers.
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + 0.05)
    return network.eval()
