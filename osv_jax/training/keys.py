"""Which values the keys of a configuration may have; a key means the same in every program that trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from osv_jax.errors import UserError
from osv_jax.runtime.ranges import (
    COUNT,
    DECAY,
    FINITE,
    FPS,
    MOTION_BUCKET_ID,
    NOT_NEGATIVE,
    NUM_FRAMES,
    PIXELS,
    POSITIVE,
    PROBABILITY,
    SEED,
    WHOLE,
    Range,
)

# Without loss scaling, which there is not, 99.97 % of a LoRA's gradients are 0 in float16.
DTYPES = ("float32", "bfloat16")

_SHARE = Range(1, whole=True, also=-1)
# Of a tuple, of each of its numbers.
RANGES = {
    "seed": SEED,
    "batch_size": COUNT,
    "grad_accum": COUNT,
    # The step is an int32.
    "num_steps": Range(1, 2**31 - 1, whole=True),
    "log_every": COUNT,
    "picture_every": COUNT,
    "checkpoint_every": COUNT,
    "keep_checkpoints": COUNT,
    "data.num_workers": WHOLE,
    "data.num_frames": NUM_FRAMES,
    "data.fps": FPS,
    "data.motion_bucket_id": MOTION_BUCKET_ID,
    "mesh.data": _SHARE,
    "mesh.fsdp": _SHARE,
    "mesh.context": _SHARE,
    # 0 keeps what it is for as it is.
    "optimizer.learning_rate": NOT_NEGATIVE,
    "optimizer.disc_learning_rate": NOT_NEGATIVE,
    "optimizer.b1": DECAY,
    "optimizer.b2": DECAY,
    "optimizer.max_grad_norm": NOT_NEGATIVE,
    "ema_decay": DECAY,
    "lora.rank": COUNT,
    "lora.alpha": POSITIVE,
    # Distillation's.
    "num_levels": Range(1, 10_000, whole=True),
    "adversarial_weight": NOT_NEGATIVE,
    # Its square must not vanish in float32: the gradient of the distance at 0 would be 0 / 0.
    "huber_c": Range(1e-8),
    "discriminator_blocks": WHOLE,
    "discriminator_frames": WHOLE,
    "solver_steps": COUNT,
    "guidance.min": FINITE,
    "guidance.max": FINITE,
    "weight_exponent": NOT_NEGATIVE,
    # Fine-tuning's; e^20 is beyond all noise levels.
    "sigma.log_mean": Range(-20, 20),
    "sigma.log_std": Range(0, 20, above_low=True),
    "min_snr_gamma": NOT_NEGATIVE,
    "dropout.embedding": PROBABILITY,
    "dropout.latents": PROBABILITY,
    "dropout.both": PROBABILITY,
    # The VAE's.
    "learning_rate": NOT_NEGATIVE,
    "kl_weight": NOT_NEGATIVE,
    "lpips_weight": NOT_NEGATIVE,
    "data.height": PIXELS,
    "data.width": PIXELS,
    "data.crop": PIXELS,
}
# Keys with the fields of networks, which are sizes but for these.
_ARCHITECTURES = ("random_networks.", "architecture.")
_ARCHITECTURE_RANGES = {
    "layer_norm_eps": POSITIVE,
    "mlp_ratio": POSITIVE,
    "scaling_factor": POSITIVE,
    "num_register_tokens": WHOLE,
}


def check_keys(config: Mapping[str, Any]) -> None:
    """Checks every key by itself.

    Args:
        config: of a program that trains, nested.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    if config["dtype"] == "float16":
        raise UserError(
            "config.dtype='float16' cannot be trained with: nearly all gradients would be rounded to 0; use bfloat16,"
            " or float32."
        )
    if config["dtype"] not in DTYPES:
        raise UserError(f"config.dtype={config['dtype']!r} is not one of {', '.join(DTYPES)}.")
    check_numbers(config, "config.")


def check_numbers(config: Mapping[str, Any], where: str) -> None:
    """Checks the numbers, also of a configuration that was stored or is not whole.

    Args:
        where: what stands before a key in a message.

    Raises:
        UserError: see `check_keys`.
    """
    for key, value in flatten_dict(dict(config), sep=".").items():
        if key in RANGES:
            numbers, allowed = _numbers(value), RANGES[key]
        elif key.startswith(_ARCHITECTURES):
            numbers = [x for x in _numbers(value) if isinstance(x, (int, float)) and not isinstance(x, bool)]
            allowed = _ARCHITECTURE_RANGES.get(key.rpartition(".")[2], COUNT)
        else:
            numbers, allowed = [x for x in _numbers(value) if isinstance(x, float) and not math.isfinite(x)], FINITE
        for number in numbers:
            if number not in allowed:
                raise UserError(f"{where}{key}={value!r} must be {allowed}.")


def _numbers(value: Any) -> list[Any]:
    """A value, or what stands in a tuple of values or of tuples."""
    return [x for part in value for x in _numbers(part)] if isinstance(value, (tuple, list)) else [value]
