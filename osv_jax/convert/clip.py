"""Importing a whole CLIP from transformers' folder, both towers and its tokenizer: what CLIPScore measures with."""

from __future__ import annotations

import os
from collections.abc import Sequence

from osv_jax.convert.importers import Plan, existing, make_plan, read_config
from osv_jax.convert.readers import Reader, open_weights
from osv_jax.errors import UserError

COMPONENTS = ("clip_text", "clip_vision")
_PARTS: dict[str, tuple[str, ...]] = {"clip_text": ("text_",), "clip_vision": ("vision_", "visual_")}
_INDICES = "position_ids"


def plan_clip(folder: str | os.PathLike) -> list[Plan]:
    """Plans the import of `clip_text` and `clip_vision`.

    Raises:
        UserError: no such folder, or see `importers.plan_svd`.
    """
    folder = existing(folder, "openai/clip-vit-large-patch14")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: expected a transformers folder such as clip-vit-large-patch14.")
    reader = open_weights(folder)
    plans = []
    for component in COMPONENTS:
        config = read_config(component, folder / "config.json")
        plans.append(make_plan(component, config, _Tower(reader, component), _name))
    return plans


def _name(name: str) -> Sequence[str]:
    return () if name.endswith(_INDICES) else (name,)


class _Tower:
    """The tensors of one tower, and of its projection; the temperature of the training is in neither."""

    def __init__(self, reader: Reader, component: str):
        self.source, self.shape, self.dtype, self.read = reader.source, reader.shape, reader.dtype, reader.read
        self._names = [name for name in reader.names() if name.startswith(_PARTS[component])]

    def names(self) -> list[str]:
        return self._names
