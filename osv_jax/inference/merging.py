"""Weights folders whose UNet is what a run trained: the teachers of other runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from osv_jax.convert import weights
from osv_jax.convert.architectures import ARCHITECTURES, Config, expected_params
from osv_jax.convert.exporters import check_output, new_folder
from osv_jax.convert.importers import DTYPES
from osv_jax.convert.text_to_video import TOKENIZER, copy_tokenizer, tokenizer_of
from osv_jax.errors import UserError
from osv_jax.inference import bases
from osv_jax.inference.trained import Trained
from osv_jax.objectives.random_networks import random_architecture, random_components, random_frozen
from osv_jax.runtime import paths
from osv_jax.runtime.paths import as_path


def merge_run(
    trained: Trained,
    source: str | os.PathLike,
    output: str | os.PathLike,
    base: str | os.PathLike | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> list[str]:
    """Writes a weights folder: the UNet with LoRA and tuned layers merged, the other networks as they were.

    Args:
        trained: the student; see `inference.trained.load_trained`.
        source: the workdir it comes from, for messages and for the UNet's config.json.
        base: the weights folder it was trained from; by default the one that the run names. A run that began with
            random networks has none; they are drawn again.
        dtype: stored dtype of the UNet (and of random networks): "bfloat16", "float32" or "float16".

    Returns:
        The networks that the folder holds. DINOv2 is among them if `base` has it.

    Raises:
        UserError: if `output` exists, unless it may be overwritten, or the base is missing or does not fit.
    """
    config = trained.config
    folder: Any = base or config.get("weights")
    if not folder and not config.get("random_networks"):
        raise UserError("The run has no weights folder of its own: give the base's with --weights.")
    check_output(output, overwrite, source, *([folder] if folder else []))
    if bases.is_text_to_video(trained, base):
        return _merge_video(trained, source, output, base, dtype, overwrite)
    random = {} if base else _random_architectures(config)
    with new_folder(output, overwrite) as partial:
        architecture = random["unet"] if "unet" in random else weights.load_config(folder, "unet")
        trained.check_fits(expected_params("unet", architecture), source)
        made = random_frozen(random, DTYPES[config["dtype"]]) if random else {}
        params = made["unet"] if "unet" in made else weights.load_params(folder, "unet", dtype=np.float32)
        merged = trained.merge_into(jax.tree.map(lambda x: np.asarray(x).astype(np.float32), params))
        weights.save_component(partial / "unet", "unet", architecture, _cast(merged, dtype), as_path(source))
        written = ["unet"]
        for name in ARCHITECTURES:
            if name == "unet":
                continue
            if name in made:
                weights.save_component(partial / name, name, random[name], made[name], as_path(source))
            elif folder and (weights.locate(folder) / name).is_dir():
                weights.load_config(folder, name)  # Raises if it is incomplete.
                paths.copy_folder(weights.locate(folder) / name, partial / name)
            else:
                continue
            written.append(name)
        weights.save_video(partial, trained.video)
    return written


def _merge_video(
    trained: Trained,
    source: str | os.PathLike,
    output: str | os.PathLike,
    base: str | os.PathLike | None,
    dtype: str,
    overwrite: bool,
) -> list[str]:
    """`merge_run` of AnimateDiff: its 2-D UNet and motion adapter, and the other parts of the folder as they were."""
    found = bases.load_video_base(trained, source, base)
    merged = flatten_dict(trained.merge_into(found.params))
    written = []
    with new_folder(output, overwrite) as partial:
        parts: tuple[tuple[str, Config], ...] = ((bases.PARTS[0], found.unet), (bases.PARTS[1], found.motion))
        for name, config in parts:
            params = unflatten_dict({path: merged[path] for path in expected_params(name, config)})
            weights.save_component(partial / name, name, config, _cast(params, dtype), as_path(source))
            written.append(name)
        for name in ("image_vae", "text_encoder", TOKENIZER):
            if (found.folder / name).is_dir():
                paths.copy_folder(found.folder / name, partial / name)
                written.append(name)
        weights.save_video(partial, trained.video)
    return written


def pack_weights(
    source: str | os.PathLike, output: str | os.PathLike, dtype: str = "bfloat16", overwrite: bool = False
) -> list[str]:
    """Writes the networks of a weights folder as one file each; see `convert.weights`.

    Args:
        dtype: stored dtype: "bfloat16", "float32" or "float16".

    Returns:
        The networks that the folder holds, and `tokenizer` if it has that.

    Raises:
        UserError: if `output` exists, unless it may be overwritten, or the source holds no networks.
    """
    components = [name for name in ARCHITECTURES if (weights.locate(source) / name).is_dir()]
    if not components:
        raise UserError(f"{source} is no weights folder: it holds none of {', '.join(ARCHITECTURES)}.")
    check_output(output, overwrite, source)
    with new_folder(output, overwrite) as partial:
        for name in components:
            config = weights.load_config(source, name)
            params = _cast(weights.load_params(source, name), dtype)
            weights.save_packed(partial / name, name, config, params, as_path(source))
        weights.save_video(partial, weights.load_video(source))
        if tokenizer_of(source).is_dir():
            copy_tokenizer(source, partial)
            components.append(TOKENIZER)
    return components


def _random_architectures(config: Mapping[str, Any]) -> dict[str, Config]:
    """The networks of SVD that a run drew, and DINOv2, which not every run has, if the configuration names it."""
    chosen = config["random_networks"]
    names = random_components(config) & {"unet", "vae", "image_encoder", *chosen}
    return {name: random_architecture(chosen, name) for name in ARCHITECTURES if name in names}


def _cast(params: Any, dtype: str) -> Any:
    """NumPy arrays of a stored dtype."""
    return jax.tree.map_with_path(
        lambda path, x: weights.cast(np.asarray(x), DTYPES[dtype], "/".join(key.key for key in path)), params
    )
