"""From other people's checkpoints to a weights folder of ours.

An import is planned first, from names and shapes alone: every parameter our network expects must have exactly one
tensor of the right shape, and no tensor may be left over. Only then is anything read, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from osv_jax.convert.architectures import ARCHITECTURES, Config, expected_params, parse_config
from osv_jax.convert.json_files import read_json
from osv_jax.convert.naming import Path, flax_shape_to_torch, renamed, to_flax, torch_name
from osv_jax.convert.readers import Reader, open_weights, read_floats
from osv_jax.convert.weights import cast, locate, save_component
from osv_jax.errors import UserError
from osv_jax.runtime import paths
from osv_jax.runtime.paths import as_path

SVD_COMPONENTS = ("unet", "vae", "image_encoder")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}
# To round these to bfloat16 would change every latent and every embedding.
_KEPT = frozenset({"vae", "image_encoder", "image_vae", "text_encoder"})

# Of the tensors that do not fit, so many are named in a message.
_NAMED = 3

# Tensors that released checkpoints carry and no forward pass uses.
IGNORED = frozenset(
    {
        "mask_token",
        "embeddings.mask_token",
        "position_ids",
        "vision_model.embeddings.position_ids",
        "text_model.embeddings.position_ids",
    }
)

# A translation maps a tensor's name on disk to the names of its equal parts along axis 0, usually one, or to none where
# no forward pass uses it.
Translation = Callable[[str], Sequence[str]]

# facebookresearch's DINOv2 names -> transformers' on-disk names, all applied in turn.
_HUB_NAMES = (
    # Files saved by sharded training have `blocks.<chunk>.<block>`.
    (r"^blocks\.(?:\d+\.)?(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^norm\.", "layernorm."),
)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter of ours and the tensor, or equal part `part` of `parts` along axis 0, that fills it."""

    path: Path
    shape: tuple[int, ...]
    name: str
    part: int = 0
    parts: int = 1

    def read(self, reader: Reader, dtype: Any) -> np.ndarray:
        """The parameter, contiguous, in our layout and in `dtype`.

        Raises:
            UserError: no floats, a value that is not finite, or too large for `dtype`.
        """
        array = np.split(read_floats(reader, self.name), self.parts)[self.part]
        return cast(to_flax(self.path, array), dtype, f"{reader.source}: {self.name}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one component will be imported.

    Attributes:
        tensors: one per parameter of ours.
        ignored: tensors on disk that nothing needs, by name.
    """

    component: str
    config: Config
    reader: Reader
    tensors: list[Tensor]
    ignored: list[str]

    @property
    def parameters(self) -> int:
        """How many numbers the network has."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def stored_dtype(self, asked: str | None) -> str:
        """The dtype that `write` stores the component in, one of `DTYPES`.

        By default bfloat16; but of the VAE and the image encoder the checkpoint's own, if all tensors share one of
        them, and float32, which holds every other, if they do not.

        Args:
            asked: for it, or None.
        """
        if asked is not None or self.component not in _KEPT:
            return asked or "bfloat16"
        found = {self.reader.dtype(tensor.name).name for tensor in self.tensors}
        return found.pop() if len(found) == 1 and found <= DTYPES.keys() else "float32"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What an import did: totals over its components."""

    parameters: int
    bytes: int
    seconds: float


def import_svd(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    dtype: str | None = None,
    components: Sequence[str] = SVD_COMPONENTS,
    overwrite: bool = False,
) -> Summary:
    """Imports a diffusers Stable Video Diffusion folder; see `plan_svd` and `write`."""
    return write(plan_svd(folder, components), output, dtype, overwrite)


def plan_svd(folder: str | os.PathLike, components: Sequence[str] = SVD_COMPONENTS) -> list[Plan]:
    """Plans the import of an SVD folder in diffusers layout (`unet/ vae/ image_encoder/`).

    Raises:
        UserError: not such a folder, an architecture we have no code for, unreadable weights, or tensors that do not
            match the architecture.
    """
    folder = existing(folder, "stabilityai/stable-video-diffusion-img2vid")
    unknown = [component for component in components if component not in SVD_COMPONENTS]
    if unknown:
        raise UserError(f"There is no component {unknown[0]!r} in SVD: expected some of {', '.join(SVD_COMPONENTS)}.")
    if folder.is_file():
        raise UserError(f"{folder} is a file: give the folder of the diffusers layout, with unet, vae, image_encoder.")
    missing = [component for component in components if not (folder / component / "config.json").is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]}/config.json: expected a Stable Video Diffusion folder in diffusers layout "
            f"with {', '.join(components)}; check the path and that the download is complete."
        )
    plans = []
    for component in components:
        config = read_config(component, folder / component / "config.json")
        translate = new_attention_name if component == "vae" else same_name
        plans.append(make_plan(component, config, open_weights(folder / component), translate))
    return plans


def plan_dinov2(path: str | os.PathLike) -> Plan:
    """Plans the import of DINOv2 from a transformers folder, or from a torch-hub `.pth`, whose sizes are inferred.

    Raises:
        UserError: as `plan_svd`.
    """
    path = existing(path, "facebook/dinov2-small")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json: expected a transformers DINOv2 folder, or give a .pth file.")
        config = read_config("dinov2", path / "config.json")
        return make_plan("dinov2", config, open_weights(path), same_name)
    reader = open_weights(path)
    return make_plan("dinov2", _hub_config(reader), reader, _from_hub_name)


def make_plan(component: str, config: Config, reader: Reader, translate: Translation) -> Plan:
    """Matches the tensors of `reader` with the parameters that `component` has under `config`.

    Raises:
        UserError: missing, left-over or misshapen tensors, with the first names and their number.
    """
    available: dict[str, tuple[str, int, int]] = {}
    left_over, ignored = set(), []
    for name in reader.names():
        targets = translate(name)
        for part, target in enumerate(targets):
            if target in available:
                left_over.add(name)
            available.setdefault(target, (name, part, len(targets)))
    tensors, missing, misshapen = [], [], []
    for path, leaf in expected_params(component, config).items():
        if (target := torch_name(path)) not in available:
            missing.append(target)
            continue
        name, part, parts = available.pop(target)
        wanted = flax_shape_to_torch(path, leaf.shape)
        if reader.shape(name) != (parts * wanted[0], *wanted[1:]):
            misshapen.append(f"{name} {list(reader.shape(name))} instead of {[parts * wanted[0], *wanted[1:]]}")
            continue
        tensors.append(Tensor(path, leaf.shape, name, part, parts))
    for target, (name, _, _) in available.items():
        if target in IGNORED:
            ignored.append(name)
        else:
            left_over.add(name)
    complaints = [
        f"{len(names)} {kind} tensors ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for kind, names in (("missing", missing), ("left-over", sorted(left_over)), ("misshapen", misshapen))
        if names
    ]
    if complaints:
        raise UserError(
            f"{reader.source} does not match its {component} config: {'; '.join(complaints)}; "
            "expected exactly the tensors of the released architecture."
        )
    return Plan(component, config, reader, tensors, ignored)


def write(
    plans: Sequence[Plan],
    output: str | os.PathLike,
    dtype: str | None = None,
    overwrite: bool = False,
    on_tensor: Callable[[np.ndarray], None] = lambda array: None,
) -> Summary:
    """Reads what was planned and writes `<output>/<component>/`, complete or not at all.

    Args:
        plans: one per component.
        output: the weights folder; components already there are left alone unless planned here.
        dtype: stored dtype: "bfloat16", "float32" or "float16"; None: see `Plan.stored_dtype`.
        overwrite: replace components that exist.
        on_tensor: called with every parameter read.

    Raises:
        UserError: an existing component without `overwrite`, an unknown dtype, or see `Tensor.read`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"There is no dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    check_output(plans, output, overwrite)
    output, start = as_path(output), time.perf_counter()
    parameters = size = 0
    # The components appear when all are made.
    with contextlib.ExitStack() as made:
        for plan in plans:
            flat, stored = {}, DTYPES[plan.stored_dtype(dtype)]
            for tensor in plan.tensors:
                flat[tensor.path] = array = tensor.read(plan.reader, stored)
                parameters, size = parameters + array.size, size + array.nbytes
                on_tensor(array)
            folder = made.enter_context(paths.new_folder(output / plan.component))
            save_component(folder, plan.component, plan.config, unflatten_dict(flat), plan.reader.source)
    return Summary(parameters, size, time.perf_counter() - start)


def check_output(plans: Sequence[Plan], output: str | os.PathLike, overwrite: bool) -> None:
    """To be called before the components are read.

    Raises:
        UserError: if `output` has one of the planned components already, unless it may be overwritten; if it cannot be
            written to, or a component would take the place of what it is made from.
    """
    paths.try_folder(as_path(output), "output")
    for plan in plans:
        paths.check_apart(as_path(output) / plan.component, plan.reader.source)
    existing = [plan.component for plan in plans if (as_path(output) / plan.component).exists()]
    if existing and not overwrite:
        raise UserError(
            f"{as_path(output) / existing[0]} exists: choose another output, or replace it with --overwrite."
        )


def existing(path: str | os.PathLike, example: str) -> paths.Path:
    """The path of a checkpoint; raises UserError if nothing is there, with how to get `example`, a Hugging Face id."""
    given = locate(path)
    if given.exists():
        return given
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) and not given.parent.exists():
        name = str(path).split("/")[1]
        raise UserError(
            f"{path} looks like a Hugging Face id, but conversion needs a local folder: download it with "
            f"`hf download {path} --local-dir {name}` and convert {name}."
        )
    raise UserError(
        f"{path} does not exist: give the local folder of a checkpoint "
        f"(`hf download {example} --local-dir FOLDER` makes one)."
    )


def read_config(component: str, file: paths.Path) -> Config:
    """A checkpoint's config.json, as our architecture; raises UserError for one that is damaged or ours."""
    fields = read_json(file)
    if {"format", "component"} <= fields.keys():
        raise UserError(f"{file} is of weights that are converted already: use them as they are, as --weights.")
    return parse_config(component, fields)


def same_name(name: str) -> Sequence[str]:
    """For networks whose names are the checkpoint's."""
    return (name,)


def new_attention_name(name: str) -> Sequence[str]:
    """The VAE's attention as diffusers named it before 0.15 -> as it is named now."""
    match = re.fullmatch(r"(.*\.attentions\.\d+\.)(\w+)(\.\w+)", name)
    if match and match[2] in _OLD_ATTENTION:
        return (match[1] + _OLD_ATTENTION[match[2]] + match[3],)
    return (name,)


def _from_hub_name(name: str) -> Sequence[str]:
    name = renamed(name, _HUB_NAMES)
    if ".attn.qkv." in name:
        return tuple(name.replace(".attn.qkv.", f".attention.attention.{part}.") for part in ("query", "key", "value"))
    return (name,)


def _hub_config(reader: Reader) -> Config:
    """DINOv2's sizes from the shapes in a torch-hub file; every released model has heads of 64."""
    names = set(reader.names())
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= names:
        raise UserError(
            f"{reader.source} is not a DINOv2 torch-hub file: expected cls_token, pos_embed, patch_embed.proj.weight "
            "and blocks, as in dinov2_vits14_pretrain.pth."
        )
    width, _, _, patch = reader.shape("patch_embed.proj.weight")
    patches = reader.shape("pos_embed")[1] - 1
    blocks = {match[1] for name in names if (match := re.match(r"blocks\.(?:\d+\.)?(\d+)\.[a-z]", name))}
    return ARCHITECTURES["dinov2"].config(
        hidden_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=width // 64,
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
        use_swiglu_ffn=any(".mlp.w12." in name for name in names),
        num_register_tokens=reader.shape("register_tokens")[1] if "register_tokens" in names else 0,
    )
