"""Fine-tuning of SVD: denoising of real clips as SVD itself was trained (SF-V Eq. 1 to 3).

`configs/finetune.py` trains a LoRA; `configs/finetune.py:tiny` trains every layer of tiny random networks on the clips
of a Python package. What comes out is a teacher for `configs/stage1.py`: see docs/training.md.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    stage1 = runpy.run_path(str(pathlib.Path(__file__).with_name("stage1.py")))
    config = stage1["get_config"]()
    if variant == "tiny":
        stage1["make_tiny"](config)
    elif variant:
        raise ValueError(f"configs/finetune.py has the variants '' and 'tiny', not {variant!r}.")
    _remove_distillation(config)

    config.objective = "finetune"
    # A workdir of `finetune` or a LoRA trained elsewhere to go on from; empty: from the weights.
    config.init_from = ""
    # Also spatial_transformer, temporal_transformer, spatial_resnet, temporal_resnet, other, all. Without lora there
    # is none, and config.lora means nothing.
    config.trainable = ("lora",)
    config.ema_decay = 0.999

    # P_mean and P_std of ln sigma.
    config.sigma = ConfigDict()
    config.sigma.log_mean = 0.7
    config.sigma.log_std = 1.6
    config.min_snr_gamma = 0.0  # 0: weight (sigma^2 + 1) / sigma^2; else min(1 / sigma^2, gamma)
    # Probabilities with which a clip loses one condition alone, the other alone, or both.
    config.dropout = ConfigDict()
    config.dropout.embedding = 0.1
    config.dropout.latents = 0.1
    config.dropout.both = 0.1

    if variant == "tiny":
        config.trainable = ("all",)
        config.ema_decay = 0.95
    else:
        config.num_steps = 10_000
        config.optimizer.learning_rate = 1e-5
        config.data.resolutions = ((0, 320, 576),)
        config.picture_every = config.checkpoint_every = 500
    return config


def _remove_distillation(config: ConfigDict) -> None:
    """Takes out what only a student with a discriminator has."""
    for key in ("num_levels", "adversarial_weight", "huber_c", "discriminator_blocks", "discriminator_input"):
        del config[key]
    del config.boundary
    del config.optimizer.disc_learning_rate
