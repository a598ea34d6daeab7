"""AnimateLCM on SVD: consistency distillation without a discriminator, a row of OSV's and of SF-V's tables.

`configs/animatelcm.py` trains spatial and then temporal transformers, as its authors did with SVD;
`configs/animatelcm.py:miniature` distils the small SVD that comes with the package, on the clips that `make demo`
prepares; `configs/animatelcm.py:tiny` trains tiny random networks on the clips of a Python package.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from osv_jax.training.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    stage1 = runpy.run_path(str(pathlib.Path(__file__).with_name("stage1.py")))
    # All keys: osv_jax/objectives/options.py (RunOptions, StudentOptions), osv_jax/objectives/distillation.py
    # (DistillationOptions), osv_jax/objectives/consistency.py (ConsistencyOptions) and
    # osv_jax/objectives/animatelcm.py (AnimateLCMOptions).
    config = default_config("animatelcm")
    config.num_steps = 80_000
    config.trainable = ("spatial_transformer", "temporal_transformer")
    config.phases = ((0, "spatial_transformer", 1e-6), (30_000, "temporal_transformer", 3e-7))
    config.data.resolutions = ((0, 576, 1024),)
    config.picture_every = config.checkpoint_every = 500

    if variant == "tiny":
        stage1["make_tiny"](config)
        # Predictions of a random network hardly differ from one of 100 levels to the next: there is nothing to learn.
        config.num_levels = 5
        config.phases = ((0, "spatial_transformer", 1e-3), (30, "temporal_transformer", 1e-3))
    elif variant == "miniature":
        stage1["make_miniature"](config)
        config.data.dataset = "runs/demo/latents"
        config.batch_size = 1
        config.num_steps = 300
        config.phases = ((0, "spatial_transformer", 1e-3), (150, "temporal_transformer", 1e-3))
        config.picture_every = config.checkpoint_every = 50
    elif variant:
        raise ValueError(f"configs/animatelcm.py has the variants '', 'tiny' and 'miniature', not {variant!r}.")
    return config
