"""LoRA files of PyTorch programs for the UNets of SVD and AnimateDiff, read and written.

Read: a PEFT adapter folder, or a bare safetensors file with the keys of diffusers, PEFT, kohya or ComfyUI. Written: the
same, always with alpha = rank and the scale folded into B, because some of what loads a bare file drops alpha without a
word.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from osv_jax.convert.adapter_config import AdapterConfig, parse_adapter_config
from osv_jax.convert.json_files import parse_json, read_json
from osv_jax.convert.naming import Path, flax_shape_to_torch, module_path, to_flax, to_torch, torch_module, torch_name
from osv_jax.convert.readers import Reader, open_weights, read_floats, safetensors_metadata
from osv_jax.convert.stability_names import unet_names
from osv_jax.convert.weights import locate
from osv_jax.errors import UserError
from osv_jax.models.lora import without_effect
from osv_jax.runtime import paths
from osv_jax.runtime.finite import check_finite
from osv_jax.runtime.ranges import POSITIVE

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

# Optional prefixes of PEFT and of diffusers' pipelines; then the module; then its half, or alpha.
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:unet\.)?(?P<module>.+?)\."
    r"(?:(?:(?P<a>lora_A|lora\.down|lora_down)|lora_B|lora\.up|lora_up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
_SHOWN = 10

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA read from a file.

    Attributes:
        lora: the tree that `models.lora` describes, float32 NumPy arrays, alpha / rank folded into `b`.
        dropped: PyTorch names of cross-attention q and k projections that the file covers. They have no effect in SVD,
            whose cross-attention has one key.
    """

    lora: dict[str, Any]
    dropped: list[str]

    @property
    def notice(self) -> str:
        """A sentence about what was dropped, or nothing."""
        if not self.dropped:
            return ""
        return (
            f"{len(self.dropped)} cross-attention q and k projections were left out (first: {self.dropped[0]}): SVD "
            "attends to one key, so they have no effect."
        )


def is_lora(path: str | os.PathLike) -> bool:
    """Whether `path` looks like what `read_lora` reads."""
    path = locate(path)
    return path.suffix == ".safetensors" or any((path / name).is_file() for name in (PEFT_CONFIG, DIFFUSERS_WEIGHTS))


def ranks(lora: Params) -> dict[Path, int]:
    """The rank of every module of a LoRA tree."""
    return {path[:-1]: leaf.shape[-1] for path, leaf in sorted(flatten_dict(lora).items()) if path[-1] == "a"}


def check_lora(lora: Params, shapes: Mapping[Path, Any], source: Any) -> None:
    """Checks a LoRA tree against the UNet it is meant for.

    Args:
        shapes: the UNet's parameters (or their shapes) by path; see `architectures.expected_params`.
        source: what messages call it.

    Raises:
        UserError: modules that the UNet does not have, or other sizes.
    """
    flat, unknown, misshapen = flatten_dict(lora), [], []
    for path, rank in ranks(lora).items():
        if (*path, "kernel") not in shapes:
            unknown.append(torch_module(path))
            continue
        *window, features = shapes[(*path, "kernel")].shape
        if flat[(*path, "a")].shape != (*window, rank) or flat[(*path, "b")].shape != (rank, features):
            misshapen.append(torch_module(path))
    _complain(source, {"modules that this UNet does not have": unknown, "modules of other sizes": misshapen})


def read_lora(path: str | os.PathLike, shapes: Mapping[Path, Any]) -> LoraFile:
    """Reads a PEFT adapter folder or a LoRA safetensors file for the UNet whose parameters are `shapes` (by path).

    Keys may be `<module>.lora_A.weight` and `.lora_B.weight`, or `.lora.down` and `.lora.up`, with or without the
    prefixes `base_model.model.` and `unet.`; or have modules as kohya and ComfyUI write them (`write_kohya`,
    `write_comfyui`). Alpha is taken from adapter_config.json, from `<module>.alpha`, or from the metadata that
    diffusers writes, and is the rank where none of them has it.

    Raises:
        UserError: nothing to read there; another kind of adapter, or one that is more than its A and B (see
            `adapter_config`); keys, shapes or ranks that do not match; a value that is no float, or not finite.
    """
    path = locate(path)
    file, config = _locate(path)
    reader = open_weights(file)
    halves: dict[str, dict[str, str]] = collections.defaultdict(dict)
    unknown, spelled = [], _spellings(shapes)
    for name in reader.names():
        match = _KEY.fullmatch(name)
        half = "a" if match and match["a"] else "alpha" if match and match["alpha"] else "b"
        module = spelled.get(match["module"]) if match else None
        if module is None or half in halves[module]:
            unknown.append(name)
        else:
            halves[module][half] = name
    incomplete = [module for module, names in halves.items() if not {"a", "b"} <= names.keys()]
    _complain(path, {"keys that match nothing in this UNet": unknown, "modules with only one of A and B": incomplete})
    if not halves:
        raise UserError(
            f"{path} has no LoRA in it: expected keys such as mid_block.attentions.0.proj_in.lora_A.weight."
        )

    lora, dropped, misshapen, uncovered = {}, [], [], []
    idle = without_effect(path[:-1] for path in shapes)
    for module, names in sorted(halves.items()):
        target = module_path(module)
        a, b = reader.shape(names["a"]), reader.shape(names["b"])
        out_features, *rest = flax_shape_to_torch((*target, "kernel"), shapes[(*target, "kernel")].shape)
        rank = a[0] if a else 0
        if not rank:
            raise UserError(f"{path}: the LoRA of {module} has rank 0, and so no values: export it again.")
        if b[1:2] not in ((), (rank,)):
            raise UserError(
                f"{path}: the ranks of A and B of {module} are {rank} and {b[1]}; they must be equal: export the LoRA"
                " again."
            )
        if (a, b) != ((rank, *rest), (out_features, rank, *[1] * len(rest[1:]))):
            misshapen.append(module)
        elif config is not None and not config.covers(module):
            uncovered.append(module)
        elif target in idle:
            dropped.append(module)
        else:
            scale = _scale(reader, names, module, rank, config)
            lora[(*target, "a")], lora[(*target, "b")] = _to_flax(reader, names, scale)
    complaints = {"modules of other sizes than this UNet's": misshapen, "modules that its config leaves out": uncovered}
    _complain(path, complaints)
    return LoraFile(unflatten_dict(lora), dropped)


def _scale(reader: Reader, names: Mapping[str, str], module: str, rank: int, config: AdapterConfig | None) -> float:
    """What A B is multiplied by: by the config, by alpha among the tensors, or 1."""
    if config is not None:
        if config.rank(module) != rank:
            raise UserError(
                f"{reader.source}: {module} has rank {rank}, but {config.rank(module)} by its config: they are of two"
                " adapters."
            )
        if "alpha" in names:
            raise UserError(
                f"{reader.source}: {module} has an alpha among the tensors and one in its config: remove one."
            )
        return config.scale(module)
    if "alpha" not in names:
        return 1.0
    alpha = reader.read(names["alpha"])
    if alpha.size != 1:
        raise UserError(f"{reader.source}: {names['alpha']} must be one number, not of shape {list(alpha.shape)}.")
    POSITIVE.check(f"{reader.source}: {names['alpha']}", float(alpha.reshape(())))
    return float(alpha.reshape(())) / rank


def write_peft(folder: pathlib.Path, lora: Params) -> None:
    """Writes a PEFT adapter folder that `PeftModel.from_pretrained(unet, folder)` loads.

    Args:
        folder: an existing folder.
        lora: with the scale folded in (alpha = rank).
    """
    found = {torch_module(path): rank for path, rank in ranks(lora).items()}
    # (most_common has the first of equals first, so the files of two exports are the same.)
    rank = collections.Counter(found.values()).most_common(1)[0][0]
    others = {module: r for module, r in found.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        # One by one: from suffixes loaders would make cross-attention q and k too, which are not in the file.
        "target_modules": sorted(found),
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": None,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {f"base_model.model.{name}": array for name, array in torch_tensors(lora).items()}
    save_file(tensors, folder / PEFT_WEIGHTS, {"format": "pt"})


def write_diffusers(file: pathlib.Path, lora: Params) -> None:
    """Writes one safetensors file with diffusers' keys `unet.<module>.lora_A.weight`, `unet.<module>.lora_B.weight`."""
    tensors = {f"unet.{name}": array for name, array in torch_tensors(lora).items()}
    save_file(tensors, file, {"format": "pt"})


def write_kohya(file: pathlib.Path, lora: Params) -> None:
    """Writes one safetensors file with the keys of kohya's scripts, made of diffusers' names of the modules.

    They are `lora_unet_<module with _ for .>.lora_down.weight`, `.lora_up.weight` and `.alpha`.
    """
    _write_down_up(file, lora, lambda module: module)


def write_comfyui(file: pathlib.Path, lora: Params, shapes: Mapping[Path, Any]) -> None:
    """The same with Stability's names of the modules, which ComfyUI has for all of SVD's.

    (Of diffusers' names it knows those of the layers that SVD shares with Stable Diffusion.)

    Args:
        shapes: the UNet's parameters (or their shapes) by path.
    """
    modules = _stability_modules(shapes)
    _write_down_up(file, lora, modules.__getitem__)


def _write_down_up(file: pathlib.Path, lora: Params, spell: Callable[[str], str]) -> None:
    tensors = {}
    for name, array in torch_tensors(lora).items():
        module, half, _ = name.rsplit(".", 2)
        spelled = f"lora_unet_{spell(module).replace('.', '_')}"
        tensors[f"{spelled}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = array
        if half == "lora_A":
            tensors[f"{spelled}.alpha"] = np.asarray(len(array), array.dtype)
    rank = str(max(ranks(lora).values()))
    # What programs show of a file, and merging tools go by.
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    save_file(tensors, file, {"format": "pt", **metadata})


def _stability_modules(shapes: Mapping[Path, Any]) -> dict[str, str]:
    """diffusers' names of the modules that have a kernel -> Stability's."""
    renamed = unet_names(map(torch_name, shapes))
    kernels = [torch_name(path) for path in shapes if path[-1] == "kernel"]
    return {name.removesuffix(".weight"): renamed[name].removesuffix(".weight") for name in kernels}


def _spellings(shapes: Mapping[Path, Any]) -> dict[str, str]:
    """Every way in which the files that are read write a module -> its name in diffusers."""
    spelled = {}
    for module, theirs in _stability_modules(shapes).items():
        for way in (module, f"lora_unet_{module.replace('.', '_')}", f"lora_unet_{theirs.replace('.', '_')}"):
            spelled[way] = module
        spelled[f"diffusion_model.{theirs}"] = module
    return spelled


def torch_tensors(lora: Params) -> dict[str, np.ndarray]:
    """A LoRA tree as PEFT's tensors, `<module>.lora_A.weight` [r, in, *window] and `lora_B.weight` [out, r, 1 ...]."""
    flat, tensors = flatten_dict(lora), {}
    for path in ranks(lora):
        module, a, b = torch_module(path), np.asarray(flat[(*path, "a")]), np.asarray(flat[(*path, "b")])
        _, tensors[f"{module}.lora_A.weight"] = to_torch(("kernel",), a)
        tensors[f"{module}.lora_B.weight"] = b.T.reshape(*b.T.shape, *[1] * (a.ndim - 2))
    # Safetensors writes an array's memory, whatever its strides.
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _to_flax(reader: Reader, names: Mapping[str, str], scale: float) -> tuple[np.ndarray, np.ndarray]:
    a = to_flax(("kernel",), _read_finite(reader, names["a"]))
    b = _read_finite(reader, names["b"])
    with np.errstate(over="ignore"):
        b = np.ascontiguousarray(b.reshape(b.shape[:2]).T) * np.float32(scale)
    check_finite(b, f"{reader.source}: {names['b']} times alpha / rank = {scale:g}")
    return np.ascontiguousarray(a), b


def _read_finite(reader: Reader, name: str) -> np.ndarray:
    """A tensor in float32."""
    with np.errstate(over="ignore"):  # What is infinite then is told of here.
        array = read_floats(reader, name).astype(np.float32)
    check_finite(array, f"{reader.source}: {name}")
    return array


def _locate(path: paths.Path) -> tuple[paths.Path, AdapterConfig | None]:
    """The weights file, and PEFT's config of it if it has one."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a PEFT adapter folder or a LoRA .safetensors file.")
    if path.is_file():
        return path, _diffusers_config(path)
    if (path / PEFT_CONFIG).is_file():
        config = parse_adapter_config(read_json(path / PEFT_CONFIG), path / PEFT_CONFIG)
        file = path / PEFT_WEIGHTS
        return (file if file.is_file() else path / "adapter_model.bin"), config
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return path / DIFFUSERS_WEIGHTS, _diffusers_config(path / DIFFUSERS_WEIGHTS)
    raise UserError(f"{path} holds no LoRA: expected {PEFT_CONFIG} or {DIFFUSERS_WEIGHTS} in it.")


def _diffusers_config(file: paths.Path) -> AdapterConfig | None:
    """The adapter config that diffusers (since 0.34) keeps in the metadata of a file.

    A pipeline's `save_lora_weights` puts `unet.` before every key, a network's `save_lora_adapter` nothing.
    """
    if file.suffix != ".safetensors":
        return None
    metadata = safetensors_metadata(file)
    if "lora_adapter_metadata" not in metadata:
        return None
    source = f"{file}: lora_adapter_metadata"
    fields = parse_json(metadata["lora_adapter_metadata"], source)
    prefix = "unet."
    of_unet = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    return parse_adapter_config(of_unet or fields, source)


def _complain(source: Any, complaints: Mapping[str, list[str]]) -> None:
    told = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in complaints.items()
        if names
    ]
    if told:
        raise UserError(f"{source} does not fit: it has {'; '.join(told)}. Expected a LoRA for this UNet.")
