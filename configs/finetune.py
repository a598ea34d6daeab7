"""Fine-tuning of SVD: denoising of real clips as SVD itself was trained (SF-V Eq. 1 to 3).

`configs/finetune.py` trains a LoRA; `configs/finetune.py:tiny` trains every layer of tiny random networks on the clips
of a Python package; `configs/finetune.py:miniature` made the UNet of `--weights=miniature`, and
`configs/finetune.py:miniature_lora` adapts that UNet to other clips, see docs/miniature.md. The result is a teacher for
`configs/stage1.py`: see docs/training.md.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from osv_jax.training.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    stage1 = runpy.run_path(str(pathlib.Path(__file__).with_name("stage1.py")))
    # All keys: osv_jax/objectives/options.py (RunOptions, StudentOptions) and osv_jax/objectives/finetune.py
    # (FinetuneOptions).
    config = default_config("finetune")
    config.trainable = ("lora",)  # or ("all",): every layer
    if variant == "tiny":
        stage1["make_tiny"](config)
    elif variant in ("miniature", "miniature_lora"):
        stage1["make_miniature"](config)
    elif variant:
        raise ValueError(
            f"configs/finetune.py has the variants '', 'tiny', 'miniature' and 'miniature_lora', not {variant!r}."
        )

    if variant == "tiny":
        config.trainable = ("all",)
        config.ema_decay = 0.95
    elif variant == "miniature":
        _make_miniature(config)
    elif variant == "miniature_lora":
        _make_miniature_lora(config)
    else:
        config.num_steps = 10_000
        config.optimizer.learning_rate = 1e-5
        config.data.resolutions = ((0, 320, 576),)
        config.picture_every = config.checkpoint_every = 500
    return config


def _make_miniature(config: ConfigDict) -> None:
    """A UNet from scratch, for the VAE that comes with the package; CLIP there is random."""
    config.random_networks = ConfigDict(
        {
            "unet": {
                # At least two channels for each of a norm's 32 groups: one would lose what the time embedding adds.
                "block_out_channels": (64, 64, 96),
                "layers_per_block": 1,
                "num_attention_heads": (2, 2, 3),
                "has_attention": (False, True, False),
                "cross_attention_dim": 32,
                "addition_time_embed_dim": 32,
            }
        }
    )
    config.trainable = ("all",)
    config.num_steps = 2000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.max_grad_norm = 1.0
    config.ema_decay = 0.995
    _drop_both_or_none(config)
    config.log_every = 20
    config.picture_every = 400
    config.checkpoint_every = 100


def _make_miniature_lora(config: ConfigDict) -> None:
    """A LoRA of the UNet that comes with the package, on the clips that `make demo` prepares."""
    config.data.dataset = "runs/demo/latents"
    config.num_steps = 200
    config.optimizer.learning_rate = 1e-3
    config.ema_decay = 0.99
    _drop_both_or_none(config)
    config.picture_every = config.checkpoint_every = 100


def _drop_both_or_none(config: ConfigDict) -> None:
    """CLIP is random there: dropping its embedding alone teaches nothing, and guidance needs both to be dropped."""
    config.dropout.embedding = config.dropout.latents = 0.0
