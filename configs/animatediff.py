"""AnimateDiff's own training, of a text-to-video teacher: `:unet` trains the 2-D UNet, and then '' the motion modules.

`configs/animatediff.py:tiny` trains the motion modules of tiny random networks on the clips of a Python package, all
with the empty prompt. `configs/animatediff.py:miniature_unet` and `configs/animatediff.py:miniature` make the teacher
of `configs/avdm2.py:miniature` from nothing, on a world that is drawn: see docs/text_to_video.md.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from osv_jax.training.config import default_config

_VARIANTS = ("", "unet", "tiny", "miniature", "miniature_unet")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in _VARIANTS:
        raise ValueError(f"configs/animatediff.py has the variants {_VARIANTS}, not {variant!r}.")
    avdm2 = runpy.run_path(str(pathlib.Path(__file__).with_name("avdm2.py")))
    # All keys: osv_jax/objectives/options.py (RunOptions) and osv_jax/objectives/animatediff.py (AnimateDiffOptions).
    config = default_config("animatediff")
    avdm2["set_data"](config)
    config.part = "unet" if "unet" in variant else "motion"
    config.num_steps = 100_000
    config.picture_every = config.checkpoint_every = 1000

    if variant == "tiny":
        avdm2["make_tiny"](config)
        config.optimizer.learning_rate = 1e-3
        config.ema_decay = 0.95
        config.num_steps = 60
    elif "miniature" in variant:
        avdm2["make_miniature"](config)
        config.optimizer.learning_rate = 1e-3
        config.ema_decay = 0.995
        config.num_steps = 1500
        if config.part == "unet":
            config.num_steps, config.batch_size = 2000, 16
    return config
