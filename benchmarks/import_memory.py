"""Peak memory and rate of importing a full-size SVD UNet in float16.

    python benchmarks/import_memory.py [FOLDER]

Writes a random UNet of 1,524.6 M parameters as fp16 safetensors shards into FOLDER (default: a temporary one; 3 GB for
the checkpoint and as much for the result), imports it in a process of its own, and reports that process's peak resident
memory.
"""

from __future__ import annotations

import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile

import numpy as np

from osv_jax.convert.architectures import expected_params
from osv_jax.convert.naming import flax_shape_to_torch, torch_name
from osv_jax.models.svd_unet import UNetConfig

SHARDS = 2

IMPORT = """
import resource, sys
import jax
jax.config.update("jax_platforms", "cpu")
from osv_jax.convert.importers import import_svd
summary = import_svd(sys.argv[1], sys.argv[2], components=["unet"])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"{summary.parameters / 1e6:.1f} M parameters, {summary.bytes / 1e9:.2f} GB in {summary.seconds:.1f} s, "
      f"{summary.bytes / 1e6 / summary.seconds:.0f} MB/s, peak {peak:.2f} GiB resident")
"""


def write_unet(folder: pathlib.Path) -> None:
    """Writes `unet/` of a diffusers folder, one tensor in memory at a time."""
    config = UNetConfig()
    kinds = [("CrossAttn" if attends else "") + "DownBlockSpatioTemporal" for attends in config.has_attention]
    description = {name: getattr(config, name) for name in UNetConfig.__dataclass_fields__}
    description |= {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "projection_class_embeddings_input_dim": config.addition_time_embed_dim * config.num_added_time_ids,
    }
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "unet" / "config.json").write_text(json.dumps(description))
    tensors = {
        torch_name(path): flax_shape_to_torch(path, leaf.shape)
        for path, leaf in expected_params("unet", config).items()
    }
    weight_map: dict[str, str] = {}
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        name = f"diffusion_pytorch_model-{shard + 1:05}-of-{SHARDS:05}.fp16.safetensors"
        chosen = {key: tensors[key] for key in sorted(tensors)[shard::SHARDS]}
        weight_map |= dict.fromkeys(chosen, name)
        _write_safetensors(folder / "unet" / name, chosen, rng)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def _write_safetensors(file: pathlib.Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for shape in shapes.values():
            rng.standard_normal(shape, np.float32).astype(np.float16).tofile(stream)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        write_unet(folder)
        subprocess.run([sys.executable, "-c", IMPORT, str(folder), str(folder / "imported")], check=True)


if __name__ == "__main__":
    main()
