"""Importing TAESDV's decoder from its published file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from osv_jax.convert.architectures import make_config
from osv_jax.convert.importers import Plan, existing, make_plan
from osv_jax.convert.readers import Reader, open_weights
from osv_jax.errors import UserError
from osv_jax.models.tiny_decoder import BLOCKS, TinyDecoderConfig

_FIRST, _BLOCK = "decoder.1.weight", "decoder.3.conv.0.weight"
# Layers without a size of their own: at the beginning and the end, and for each doubling.
_ENDS, _LEVEL = 4, BLOCKS + 2


def plan_tiny_decoder(path: str | os.PathLike) -> Plan:
    """Plans the import of the decoder in `taesdv.pth` or the same as safetensors; its encoder is left out.

    Raises:
        UserError: nothing there, unreadable, or another network, as the decoder of single pictures (TAESD).
    """
    reader = open_weights(existing(path, "madebyollin/taesdv"))
    return make_plan("tiny_decoder", _config_of(reader), reader, _without_encoder)


def _without_encoder(name: str) -> Sequence[str]:
    return () if name.startswith("encoder.") else (name,)


def _config_of(reader: Reader) -> TinyDecoderConfig:
    layers = [int(match[1]) for name in reader.names() if (match := re.match(r"decoder\.(\d+)\.", name))]
    shapes = [reader.shape(name) if name in reader.names() else () for name in (_FIRST, _BLOCK)]
    if [len(shape) for shape in shapes] != [4, 4] or shapes[1][1] != 2 * shapes[0][0]:
        raise UserError(
            f"{reader.source} is not TAESDV: expected {_FIRST} and {_BLOCK}, which sees two frames, as in taesdv.pth"
            " of github.com/madebyollin/taesdv."
        )
    channels, latent_channels = shapes[0][:2]
    levels = max(1, (max(layers) - _ENDS) // _LEVEL)
    sizes = {"channels": channels, "latent_channels": latent_channels, "num_upsamples": levels}
    config: TinyDecoderConfig = make_config("tiny_decoder", sizes, reader.source)
    return config
