"""ADD on SVD: a discriminator of decoded frames and score distillation from the teacher (OSV Fig. 3).

`configs/add.py` trains SVD on 8 devices; `configs/add.py:miniature` the small SVD that comes with the package, on the
clips that `make demo` prepares; `configs/add.py:tiny` tiny random networks on the clips of a Python package.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from osv_jax.training.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    stage1 = runpy.run_path(str(pathlib.Path(__file__).with_name("stage1.py")))
    # All keys: osv_jax/objectives/options.py (RunOptions, StudentOptions), osv_jax/objectives/distillation.py
    # (DistillationOptions), osv_jax/objectives/adversarial.py (AdversarialOptions) and osv_jax/objectives/add.py
    # (ADDOptions).
    config = default_config("add")
    config.data.resolutions = ((0, 320, 576),)
    config.num_steps = 20_000
    config.picture_every = config.checkpoint_every = 500

    if variant == "tiny":
        stage1["make_tiny"](config)
        config.lora.targets = "all"
        config.optimizer.learning_rate = 1e-2
        # Low: features of random networks say little about clips.
        config.adversarial_weight = 0.1
    elif variant == "miniature":
        stage1["make_miniature"](config)
        config.data.dataset = "runs/demo/latents"
        config.num_levels = 5
        config.optimizer.learning_rate = 1e-3
        config.num_steps = 300
    elif variant:
        raise ValueError(f"configs/add.py has the variants '', 'tiny' and 'miniature', not {variant!r}.")
    return config
